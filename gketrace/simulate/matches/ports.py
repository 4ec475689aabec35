"""``tcp``, ``udp``, ``udplite``, ``sctp``, ``dccp`` and ``multiport``.

Source: tcp_mt(), udp_mt() in net/netfilter/xt_tcpudp.c, sctp_mt() in xt_sctp.c, dccp_mt() in
xt_dccp.c, ports_match_v1() in xt_multiport.c.  None of them matches a second or later fragment,
whatever is negated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.packet import Packet, TcpFlags
from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, integer, interval, interval_text
from gketrace.simulate.matches.base import by_name, every, negation, within
from gketrace.simulate.state import NO, YES, Answer, Environment, PacketState, decide, unknown

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "DccpMatch",
    "MultiportMatch",
    "PortRange",
    "SctpMatch",
    "TcpMatch",
    "UdpMatch",
    "UdpliteMatch",
]

_ALIASES: Final = {"--source-port": "--sport", "--destination-port": "--dport"}
_PORT_OPTIONS: Final = {"--sport": 1, "--dport": 1, "--source-port": 1, "--destination-port": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class PortRange:
    """First and last port, both included."""

    low: int
    high: int
    negated: bool = False

    @classmethod
    def of(cls, option: Option | None) -> PortRange | None:
        if option is None:
            return None
        low, high = interval(option.value)
        if high < low:
            raise ValueError(f"{option.value} is no range of ports")
        return cls(low=low, high=high, negated=option.negated)

    def holds(self, port: int | None, what: str) -> Answer:
        return within(port, (self.low, self.high), negated=self.negated, what=what)

    def render(self, name: str) -> str:
        return f" {negation(self.negated)}--{name} {interval_text((self.low, self.high))}"


def _ports(packet: Packet, sport: PortRange | None, dport: PortRange | None) -> Iterator[Answer]:
    if packet.fragment:
        yield NO
        return
    if sport is not None:
        yield sport.holds(packet.sport, "source port")
    if dport is not None:
        yield dport.holds(packet.dport, "destination port")


def _render_ports(sport: PortRange | None, dport: PortRange | None) -> str:
    return (sport.render("sport") if sport else "") + (dport.render("dport") if dport else "")


_FLAGS: Final[dict[str, int]] = {
    name: int(TcpFlags[name]) for name in ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
}


def parse_tcp_flags(text: str) -> int:
    """``SYN,ACK``, ``ALL`` (the six classic ones) or ``NONE``.  Raises `ValueError`."""
    bits = 0
    for name in text.upper().split(","):
        if name == "ALL":
            bits |= 0x3F
        elif name in _FLAGS:
            bits |= _FLAGS[name]
        elif name != "NONE":
            raise ValueError(f"no such TCP flag: {name}")
    return bits


def _flags_text(bits: int) -> str:
    return ",".join(name for name, bit in _FLAGS.items() if bits & bit) or "NONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagsTest:
    """``--tcp-flags MASK COMP``."""

    mask: int
    comp: int
    negated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpMatch(Match):
    """``-m tcp``."""

    module: ClassVar[str] = "tcp"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        **_PORT_OPTIONS,
        "--tcp-flags": 2,
        "--syn": 0,
        "--tcp-option": 1,
    }

    sport: PortRange | None = None
    dport: PortRange | None = None
    flags: FlagsTest | None = None
    option: tuple[int, bool] | None = None
    """TCP option kind, and whether the test is negated."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options, _ALIASES)
        flags = None
        if given := found.get("--tcp-flags"):
            mask, comp = (parse_tcp_flags(text) for text in given.args)
            flags = FlagsTest(mask=mask, comp=comp, negated=given.negated)
        elif syn := found.get("--syn"):
            flags = FlagsTest(mask=0x17, comp=0x02, negated=syn.negated)
        kind = found.get("--tcp-option")
        return cls(
            sport=PortRange.of(found.get("--sport")),
            dport=PortRange.of(found.get("--dport")),
            flags=flags,
            option=None if kind is None else (integer(kind.value, 1, 255), kind.negated),
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return every(self._answers(state.packet))

    def _answers(self, packet: Packet) -> Iterator[Answer]:
        yield from _ports(packet, self.sport, self.dport)
        if (test := self.flags) is not None:
            yield decide(packet.tcp_flags & test.mask == test.comp, negated=test.negated)
        if self.option is not None:
            kind, negated = self.option
            if packet.tcp_options is None:
                yield unknown("the TCP options are not known")
            else:
                yield decide(kind in packet.tcp_options, negated=negated)

    def render(self) -> str:
        text = "-m tcp" + _render_ports(self.sport, self.dport)
        if self.option is not None:
            text += f" {negation(self.option[1])}--tcp-option {self.option[0]}"
        if (test := self.flags) is not None:
            text += f" {negation(test.negated)}--tcp-flags"
            text += f" {_flags_text(test.mask)} {_flags_text(test.comp)}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpMatch(Match):
    """``-m udp``."""

    module: ClassVar[str] = "udp"
    OPTIONS: ClassVar[Mapping[str, int]] = _PORT_OPTIONS

    sport: PortRange | None = None
    dport: PortRange | None = None

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options, _ALIASES)
        return cls(
            sport=PortRange.of(found.get("--sport")), dport=PortRange.of(found.get("--dport"))
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return every(_ports(state.packet, self.sport, self.dport))

    def render(self) -> str:
        return f"-m {self.module}" + _render_ports(self.sport, self.dport)


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpliteMatch(UdpMatch):
    """``-m udplite``."""

    module: ClassVar[str] = "udplite"


@dataclass(frozen=True, slots=True, kw_only=True)
class SctpMatch(Match):
    """``-m sctp``; which chunks a packet carries is not modelled."""

    module: ClassVar[str] = "sctp"
    OPTIONS: ClassVar[Mapping[str, int]] = {**_PORT_OPTIONS, "--chunk-types": 2}

    sport: PortRange | None = None
    dport: PortRange | None = None
    chunks: tuple[str, str, bool] | None = None
    """``all``, ``any`` or ``only``; the list of chunks; negated."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options, _ALIASES)
        chunks = None
        if given := found.get("--chunk-types"):
            if given.args[0] not in ("all", "any", "only"):
                raise ValueError(f"--chunk-types {given.args[0]}")
            chunks = (given.args[0], given.args[1], given.negated)
        return cls(
            sport=PortRange.of(found.get("--sport")),
            dport=PortRange.of(found.get("--dport")),
            chunks=chunks,
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        ports = every(_ports(state.packet, self.sport, self.dport))
        if self.chunks is None or ports is NO:
            return ports
        return unknown("the SCTP chunks are not known")

    def render(self) -> str:
        text = "-m sctp" + _render_ports(self.sport, self.dport)
        if self.chunks is not None:
            how, which, negated = self.chunks
            text += f" {negation(negated)}--chunk-types {how} {which}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class DccpMatch(Match):
    """``-m dccp``; packet types and options are not modelled."""

    module: ClassVar[str] = "dccp"
    OPTIONS: ClassVar[Mapping[str, int]] = {**_PORT_OPTIONS, "--dccp-types": 1, "--dccp-option": 1}

    sport: PortRange | None = None
    dport: PortRange | None = None
    others: tuple[tuple[str, str, bool], ...] = ()
    """Option, value, negated."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options, _ALIASES)
        return cls(
            sport=PortRange.of(found.get("--sport")),
            dport=PortRange.of(found.get("--dport")),
            others=tuple(
                (o.name, o.value, o.negated) for o in options if o.name.startswith("--dccp")
            ),
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        ports = every(_ports(state.packet, self.sport, self.dport))
        return ports if ports is NO or not self.others else unknown("the DCCP type is not known")

    def render(self) -> str:
        text = "-m dccp" + _render_ports(self.sport, self.dport)
        return text + "".join(f" {negation(n)}{name} {value}" for name, value, n in self.others)


_MULTIPORT: Final[dict[str, str]] = {
    "--sports": "sports", "--source-ports": "sports",
    "--dports": "dports", "--destination-ports": "dports",
    "--ports": "ports", "--port": "ports",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiportMatch(Match):
    """``-m multiport``."""

    module: ClassVar[str] = "multiport"
    OPTIONS: ClassVar[Mapping[str, int]] = dict.fromkeys(_MULTIPORT, 1)

    which: str
    """``sports``, ``dports`` or ``ports`` (either)."""
    ports: tuple[tuple[int, int], ...]
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        if len(options) != 1:
            raise ValueError("multiport takes one list of ports")
        option = options[0]
        return cls(
            which=_MULTIPORT[option.name],
            ports=tuple(interval(part) for part in option.value.split(",")),
            negated=option.negated,
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        packet = state.packet
        if packet.fragment:
            return NO
        sides: list[tuple[int | None, str]] = []
        if self.which != "dports":
            sides.append((packet.sport, "source port"))
        if self.which != "sports":
            sides.append((packet.dport, "destination port"))
        missing = ""
        for port, what in sides:
            if port is None and (0, 0xFFFF) not in self.ports:
                missing = missing or what
            elif port is None or any(low <= port <= high for low, high in self.ports):
                return NO if self.negated else YES
        if missing:
            return unknown(f"the {missing} is not known")
        return YES if self.negated else NO

    def render(self) -> str:
        listed = ",".join(interval_text(pair) for pair in self.ports)
        return f"-m multiport {negation(self.negated)}--{self.which} {listed}"
