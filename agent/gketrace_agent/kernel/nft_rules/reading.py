"""What has been read of one rule, until it is printed."""

from __future__ import annotations

from typing import Final, NamedTuple

from gketrace_agent.kernel.nft_rules.template import Pieces, Value
from gketrace_agent.kernel.nft_rules.words import NotRendered

__all__ = ["TCP", "UDP", "Load", "Reading"]

TCP: Final = 6
UDP: Final = 17


class Load(NamedTuple):
    """What a register holds."""

    kind: str
    """``meta``, ``payload`` or ``immediate``."""
    key: tuple[int, ...]
    """(key,), (base, offset, length) or (value,)."""
    mask: bytes | None = None


class Reading:
    """What has been read of one rule."""

    def __init__(self) -> None:
        self.registers: dict[int, Load] = {}
        self.where: dict[str, Pieces] = {}
        """s, d, i, o, p and f: the options before the matches."""
        self.protocol = 0
        """0: any, or any but one."""
        self.matches: list[Pieces] = []
        self.transport: dict[str, Pieces] | None = None
        """The options of the one tcp or udp match that native expressions make up."""
        self.transport_at = 0
        self.counters: tuple[Value, Value] | None = None
        self.end: Pieces | None = None
        """The target or verdict."""

    def put(self, option: str, pieces: Pieces) -> None:
        if option in self.where:
            raise NotRendered(f"two tests for -{option}")
        self.where[option] = pieces

    def finish(self, piece: str | Value) -> None:
        self.end = [piece]

    def rest(self) -> Pieces:
        """All the text behind the chain's name."""
        if self.transport is not None:
            name = " -m tcp" if self.protocol == TCP else " -m udp"
            said: Pieces = [name]
            for option in ("--sport", "--dport", "--tcp-flags"):
                said += self.transport.get(option, [])
            self.matches[self.transport_at] = said
        pieces: Pieces = []
        for option in "sdiopf":
            pieces += self.where.get(option, [])
        for match in self.matches:
            pieces += match
        return pieces + (self.end or [])
