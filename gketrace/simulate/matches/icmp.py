"""``icmp`` and ``icmp6``.

Source: icmp_match() and icmp6_match() in net/netfilter/xt_tcpudp.c; libxt_icmp.h of iptables for
the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, integer
from gketrace.simulate.matches.base import negation, only_options
from gketrace.simulate.state import NO, YES, Answer, Environment, PacketState, decide, unknown

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ICMP6_TYPES", "ICMP_TYPES", "Icmp6Match", "IcmpMatch"]

TypeCode: TypeAlias = tuple[int, int | None]
"""Type, and code; None: any code."""

ICMP_TYPES: Final[Mapping[str, TypeCode]] = {
    "any": (255, None),
    "echo-reply": (0, None), "pong": (0, None),
    "destination-unreachable": (3, None),
    "network-unreachable": (3, 0), "host-unreachable": (3, 1), "protocol-unreachable": (3, 2),
    "port-unreachable": (3, 3), "fragmentation-needed": (3, 4), "source-route-failed": (3, 5),
    "network-unknown": (3, 6), "host-unknown": (3, 7), "network-prohibited": (3, 9),
    "host-prohibited": (3, 10), "TOS-network-unreachable": (3, 11),
    "TOS-host-unreachable": (3, 12), "communication-prohibited": (3, 13),
    "host-precedence-violation": (3, 14), "precedence-cutoff": (3, 15),
    "source-quench": (4, None),
    "redirect": (5, None), "network-redirect": (5, 0), "host-redirect": (5, 1),
    "TOS-network-redirect": (5, 2), "TOS-host-redirect": (5, 3),
    "echo-request": (8, None), "ping": (8, None),
    "router-advertisement": (9, None), "router-solicitation": (10, None),
    "time-exceeded": (11, None), "ttl-exceeded": (11, None),
    "ttl-zero-during-transit": (11, 0), "ttl-zero-during-reassembly": (11, 1),
    "parameter-problem": (12, None), "ip-header-bad": (12, 0), "required-option-missing": (12, 1),
    "timestamp-request": (13, None), "timestamp-reply": (14, None),
    "address-mask-request": (17, None), "address-mask-reply": (18, None),
}  # fmt: skip
ICMP6_TYPES: Final[Mapping[str, TypeCode]] = {
    "destination-unreachable": (1, None), "no-route": (1, 0),
    "communication-prohibited": (1, 1), "beyond-scope": (1, 2), "address-unreachable": (1, 3),
    "port-unreachable": (1, 4), "failed-policy": (1, 5), "reject-route": (1, 6),
    "packet-too-big": (2, None),
    "time-exceeded": (3, None), "ttl-exceeded": (3, None),
    "ttl-zero-during-transit": (3, 0), "ttl-zero-during-reassembly": (3, 1),
    "parameter-problem": (4, None), "bad-header": (4, 0), "unknown-header-type": (4, 1),
    "unknown-option": (4, 2),
    "echo-request": (128, None), "ping": (128, None),
    "echo-reply": (129, None), "pong": (129, None),
    "mld-listener-query": (130, None), "mld-listener-report": (131, None),
    "mld-listener-done": (132, None), "mld-listener-reduction": (132, None),
    "router-solicitation": (133, None), "router-advertisement": (134, None),
    "neighbour-solicitation": (135, None), "neighbor-solicitation": (135, None),
    "neighbour-advertisement": (136, None), "neighbor-advertisement": (136, None),
    "redirect": (137, None),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class IcmpMatch(Match):
    """``-m icmp --icmp-type``."""

    module: ClassVar[str] = "icmp"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--icmp-type": 1}
    NAMES: ClassVar[Mapping[str, TypeCode]] = ICMP_TYPES
    ANY: ClassVar[int | None] = 255
    """The type that stands for all."""

    type: int
    code: int | None = None
    """None: any code."""
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        text = options[0].value
        named = cls.NAMES.get(text)
        if named is None:
            number, slash, code = text.partition("/")
            named = (integer(number, 0, 255), integer(code, 0, 255) if slash else None)
        return cls(type=named[0], code=named[1], negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        packet = state.packet
        if packet.fragment:
            return NO
        if self.type == self.ANY:
            return NO if self.negated else YES
        if packet.icmp_type is None:
            return unknown("the ICMP type is not known")
        if packet.icmp_type != self.type or self.code is None:
            return decide(packet.icmp_type == self.type, negated=self.negated)
        if packet.icmp_code is None:
            return unknown("the ICMP code is not known")
        return decide(packet.icmp_code == self.code, negated=self.negated)

    def render(self) -> str:
        option = next(iter(self.OPTIONS))
        shown = "any" if self.type == self.ANY else f"{self.type}"
        if self.code is not None:
            shown += f"/{self.code}"
        return f"-m {self.module} {negation(self.negated)}{option} {shown}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Icmp6Match(IcmpMatch):
    """``-m icmp6 --icmpv6-type``."""

    module: ClassVar[str] = "icmp6"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--icmpv6-type": 1}
    NAMES: ClassVar[Mapping[str, TypeCode]] = ICMP6_TYPES
    ANY: ClassVar[int | None] = None
