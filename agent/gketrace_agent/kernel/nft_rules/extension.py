"""What a module of xtables is to `gketrace_agent.kernel.nft_rules`: a struct and its printer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from gketrace_agent.kernel.nft_rules.sets import SetNames

__all__ = ["Render", "Renderers"]

Render: TypeAlias = Callable[[bytes, int, SetNames], str]
"""(struct, IP version, names of ipsets) → text with a leading blank, the module's name included.
Raises NotRendered for a flag, a mode or a value that is not known."""
Renderers: TypeAlias = Mapping[tuple[str, int], tuple[int, Render]]
"""(name, revision) → (bytes of the struct, function)."""
