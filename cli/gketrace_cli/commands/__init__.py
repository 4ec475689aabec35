"""The commands, one file each.  A module imports little at its top; see `gketrace_cli.app`."""

from __future__ import annotations
