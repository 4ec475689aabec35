"""A world of fixed facts, for the matches."""

from __future__ import annotations

from dataclasses import dataclass, field

from gketrace.packet import IPAddress, Packet
from gketrace.snapshot import IpSet, Maybe, RecentEntry, Unavailable

__all__ = ["FixedEnvironment"]


@dataclass
class FixedEnvironment:
    """What is not given is not known."""

    local: tuple[str, ...] = ("10.0.0.1", "127.0.0.1", "fd00::1")
    types: dict[str, str] = field(default_factory=dict)
    interfaces: dict[str, str] = field(default_factory=dict)
    reverse: bool | None = None
    lists: dict[str, tuple[RecentEntry, ...]] = field(default_factory=dict)
    sets: dict[str, IpSet] = field(default_factory=dict)
    now: float = 1000.0

    def address_type(self, address: IPAddress, interface: str | None) -> Maybe[str]:
        text = str(address)
        if text == "10.99.99.99":
            return Unavailable(reason="no routes")
        if interface is not None and self.interfaces.get(text) != interface:
            return "UNICAST"
        return "LOCAL" if text in self.local else self.types.get(text, "UNICAST")

    def reverse_path(
        self, packet: Packet, interface: str, *, loose: bool, validmark: bool, accept_local: bool
    ) -> Maybe[bool]:
        return Unavailable(reason="no routes") if self.reverse is None else self.reverse

    def recent(self, name: str) -> Maybe[tuple[RecentEntry, ...]]:
        return self.lists.get(name, Unavailable(reason="not read"))

    def ipset(self, name: str) -> Maybe[IpSet]:
        return self.sets.get(name, Unavailable(reason="not read"))

    def sysctl(self, name: str) -> Maybe[str | None]:
        return None
