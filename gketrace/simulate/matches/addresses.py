"""``addrtype`` and ``iprange``.

Source: addrtype_mt_v1() in net/netfilter/xt_addrtype.c, iprange_mt4() in xt_iprange.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.packet import IPAddress
from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option
from gketrace.simulate.matches.base import by_name, every, negation
from gketrace.simulate.state import NO, YES, Answer, Environment, PacketState, decide, unknown
from gketrace.snapshot import Unavailable

if TYPE_CHECKING:
    from typing import Self

__all__ = ["AddrtypeMatch", "IprangeMatch"]

_TYPES: Final = (
    "UNSPEC", "UNICAST", "LOCAL", "BROADCAST", "ANYCAST", "MULTICAST", "BLACKHOLE", "UNREACHABLE",
    "PROHIBIT", "THROW", "NAT", "XRESOLVE",
)  # fmt: skip
_BY_ROUTE6: Final = frozenset({"LOCAL", "ANYCAST", "UNREACHABLE"})
"""What IPv6 asks the routing table for; the rest it reads off the address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeTest:
    """``--src-type`` or ``--dst-type``."""

    types: frozenset[str]
    negated: bool

    @classmethod
    def of(cls, option: Option | None) -> TypeTest | None:
        if option is None:
            return None
        types = frozenset(option.value.upper().split(","))
        for word in types - set(_TYPES):
            raise ValueError(f"no such address type: {word}")
        return cls(types=types, negated=option.negated)

    def holds(self, address: IPAddress, interface: str | None, env: Environment) -> Answer:
        if isinstance(address, IPv6Address):
            # match_type6(): the static types must all hold, then the route decides.
            unicast = not address.is_multicast and int(address) != 0
            if (
                ("MULTICAST" in self.types and not address.is_multicast)
                or ("UNICAST" in self.types and not unicast)
                or ("UNSPEC" in self.types and int(address) != 0)
            ):
                return decide(False, negated=self.negated)
            if self.types.isdisjoint(_BY_ROUTE6):
                return decide(True, negated=self.negated)
        found = env.address_type(address, interface)
        if isinstance(found, Unavailable):
            return unknown(f"the type of {address}: {found.reason}")
        return decide(found in self.types, negated=self.negated)

    def render(self, name: str) -> str:
        listed = ",".join(word for word in _TYPES if word in self.types)
        return f" {negation(self.negated)}{name} {listed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddrtypeMatch(Match):
    """``-m addrtype``."""

    module: ClassVar[str] = "addrtype"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--src-type": 1,
        "--dst-type": 1,
        "--limit-iface-in": 0,
        "--limit-iface-out": 0,
    }

    source: TypeTest | None = None
    destination: TypeTest | None = None
    limit: str = ""
    """``in`` or ``out``: the address must be of this type on that interface."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        limit = "in" if "--limit-iface-in" in found else ""
        return cls(
            source=TypeTest.of(found.get("--src-type")),
            destination=TypeTest.of(found.get("--dst-type")),
            limit="out" if "--limit-iface-out" in found else limit,
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return every(self._answers(state, env))

    def _answers(self, state: PacketState, env: Environment) -> Iterator[Answer]:
        interface = None
        if self.limit:
            interface = (state.in_iface if self.limit == "in" else state.out_iface) or None
        if self.source is not None:
            yield self.source.holds(state.packet.src, interface, env)
        if self.destination is not None:
            yield self.destination.holds(state.packet.dst, interface, env)

    def render(self) -> str:
        return (
            "-m addrtype"
            + (self.source.render("--src-type") if self.source else "")
            + (self.destination.render("--dst-type") if self.destination else "")
            + (f" --limit-iface-{self.limit}" if self.limit else "")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressRange:
    """``FIRST-LAST``, both included."""

    first: IPAddress
    last: IPAddress
    negated: bool

    @classmethod
    def of(cls, option: Option | None, family: int) -> AddressRange | None:
        if option is None:
            return None
        low, _, high = option.value.partition("-")
        first = ip_address(low)
        last = ip_address(high) if high else first
        if first.version != family or last.version != family:
            raise ValueError(f"{option.value} is not IPv{family}")
        return cls(first=first, last=last, negated=option.negated)

    def holds(self, address: IPAddress) -> bool:
        return (int(self.first) <= int(address) <= int(self.last)) is not self.negated

    def render(self, name: str) -> str:
        return f" {negation(self.negated)}{name} {self.first}-{self.last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class IprangeMatch(Match):
    """``-m iprange``."""

    module: ClassVar[str] = "iprange"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--src-range": 1, "--dst-range": 1}

    source: AddressRange | None = None
    destination: AddressRange | None = None

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        return cls(
            source=AddressRange.of(found.get("--src-range"), family),
            destination=AddressRange.of(found.get("--dst-range"), family),
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        if self.source is not None and not self.source.holds(state.packet.src):
            return NO
        if self.destination is not None and not self.destination.holds(state.packet.dst):
            return NO
        return YES

    def render(self) -> str:
        return (
            "-m iprange"
            + (self.source.render("--src-range") if self.source else "")
            + (self.destination.render("--dst-range") if self.destination else "")
        )
