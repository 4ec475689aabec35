"""Plain header fields: ``dscp``, ``tos``, ``ttl``, ``hl``, ``length``, ``ecn``.

Source: net/netfilter/xt_dscp.c, xt_hl.c, xt_length.c, xt_ecn.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.packet import Protocol, TcpFlags
from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, integer, interval, interval_text, value_mask
from gketrace.simulate.matches.base import by_name, negation, only_options
from gketrace.simulate.state import NO, YES, Answer, Environment, PacketState, decide, unknown

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DscpMatch", "EcnMatch", "HlMatch", "LengthMatch", "TosMatch", "TtlMatch"]

DSCP_CLASSES: Final[Mapping[str, int]] = {
    **{f"CS{n}": n << 3 for n in range(8)},
    **{f"AF{c}{d}": c << 3 | d << 1 for c in range(1, 5) for d in range(1, 4)},
    "BE": 0,
    "EF": 0x2E,
}
"""RFC 2474, 2597, 3246."""
TOS_NAMES: Final[Mapping[str, int]] = {
    "Minimize-Delay": 0x10,
    "Maximize-Throughput": 0x08,
    "Maximize-Reliability": 0x04,
    "Minimize-Cost": 0x02,
    "Normal-Service": 0x00,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DscpMatch(Match):
    """``-m dscp --dscp``."""

    module: ClassVar[str] = "dscp"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--dscp": 1, "--dscp-class": 1}

    value: int
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        option = options[0]
        if option.name == "--dscp-class":
            if option.value.upper() not in DSCP_CLASSES:
                raise ValueError(f"no such class: {option.value}")
            return cls(value=DSCP_CLASSES[option.value.upper()], negated=option.negated)
        return cls(value=integer(option.value, 0, 63), negated=option.negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return decide(state.packet.dscp == self.value, negated=self.negated)

    def render(self) -> str:
        return f"-m dscp {negation(self.negated)}--dscp {self.value:#04x}"


def parse_tos(text: str, name_mask: int = 0x3F) -> tuple[int, int]:
    """``0x10/0x3f``, ``16`` or a name → value and mask.  Raises `ValueError`."""
    if text in TOS_NAMES:
        return TOS_NAMES[text], name_mask
    return value_mask(text, 0xFF, 0xFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class TosMatch(Match):
    """``-m tos --tos VALUE/MASK``: the whole byte, DSCP and ECN."""

    module: ClassVar[str] = "tos"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--tos": 1}

    value: int
    mask: int
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        value, mask = parse_tos(options[0].value)
        return cls(value=value, mask=mask, negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        tos = state.packet.dscp << 2 | state.packet.ecn
        return decide(tos & self.mask == self.value, negated=self.negated)

    def render(self) -> str:
        return f"-m tos {negation(self.negated)}--tos {self.value:#04x}/{self.mask:#04x}"


_HOW: Final[Mapping[str, str]] = {"eq": "eq", "lt": "lt", "gt": "gt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TtlMatch(Match):
    """``-m ttl``."""

    module: ClassVar[str] = "ttl"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--ttl-eq": 1,
        "--ttl-lt": 1,
        "--ttl-gt": 1,
        "--ttl": 1,
    }

    how: str
    """``eq``, ``ne``, ``lt`` or ``gt``."""
    value: int

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        option = options[0]
        how = option.name.rpartition("-")[2]
        how = _HOW.get(how, "eq")
        if option.negated:
            if how != "eq":
                raise ValueError(f"! {option.name}")
            how = "ne"
        return cls(how=how, value=integer(option.value, 0, 255))

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        ttl = state.packet.ttl
        if ttl is None:
            return unknown("the TTL is not known")
        return decide(
            {
                "eq": ttl == self.value,
                "ne": ttl != self.value,
                "lt": ttl < self.value,
                "gt": ttl > self.value,
            }[self.how]
        )

    def render(self) -> str:
        mark = negation(self.how == "ne")
        how = "eq" if self.how == "ne" else self.how
        return f"-m {self.module} {mark}--{self.module}-{how} {self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HlMatch(TtlMatch):
    """``-m hl``: IPv6's hop limit."""

    module: ClassVar[str] = "hl"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--hl-eq": 1, "--hl-lt": 1, "--hl-gt": 1, "--hl": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthMatch(Match):
    """``-m length``: the packet's total length."""

    module: ClassVar[str] = "length"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--length": 1}

    low: int
    high: int
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        low, high = interval(options[0].value)
        return cls(low=low, high=high, negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        length = state.packet.length
        if length is None:
            return unknown("the packet's length is not known")
        return decide(self.low <= length <= self.high, negated=self.negated)

    def render(self) -> str:
        return f"-m length {negation(self.negated)}--length {interval_text((self.low, self.high))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EcnMatch(Match):
    """``-m ecn``: the ECN bits of IP, and TCP's ECE and CWR."""

    module: ClassVar[str] = "ecn"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--ecn-tcp-ece": 0,
        "--ecn-tcp-cwr": 0,
        "--ecn-ip-ect": 1,
    }

    ece: bool | None = None
    """None: not asked; False: negated."""
    cwr: bool | None = None
    ect: int | None = None
    ect_negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        ece, cwr, ect = (found.get(name) for name in cls.OPTIONS)
        if not found:
            raise ValueError("ecn without an option")
        return cls(
            ece=None if ece is None else not ece.negated,
            cwr=None if cwr is None else not cwr.negated,
            ect=None if ect is None else integer(ect.value, 0, 3),
            ect_negated=ect is not None and ect.negated,
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        packet = state.packet
        if self.ect is not None and (packet.ecn == self.ect) is self.ect_negated:
            return NO
        if self.ece is None and self.cwr is None:
            return YES
        if packet.protocol != Protocol.TCP or packet.fragment:
            return NO
        flags = packet.tcp_flags
        for asked, bit in ((self.ece, TcpFlags.ECE), (self.cwr, TcpFlags.CWR)):
            if asked is not None and bool(flags & bit) is not asked:
                return NO
        return YES

    def render(self) -> str:
        text = "-m ecn"
        if self.ece is not None:
            text += f" {negation(not self.ece)}--ecn-tcp-ece"
        if self.cwr is not None:
            text += f" {negation(not self.cwr)}--ecn-tcp-cwr"
        if self.ect is not None:
            text += f" {negation(self.ect_negated)}--ecn-ip-ect {self.ect}"
        return text
