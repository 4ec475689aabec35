"""Bundles: what an answer needs, saved, so that every command can be run on it later.

`record` asks the API server and the agents, `store` writes and reads the file, `replay` puts it in
the place of API server and agents, so that no command knows the difference.  `redact` masks names
and addresses; `compare` finds what differs between two.  The format: docs/bundles.md.
"""

from __future__ import annotations
