"""Targets after which the packet goes on: logs, counters, header fields, tracking options.

Source: the files net/netfilter/xt_NAME.c; all return XT_CONTINUE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.conntrack import CtState
from gketrace.packet import TcpFlags
from gketrace.ruleset.model import Target
from gketrace.ruleset.options import Option, integer, quote
from gketrace.simulate.evolve import evolve
from gketrace.simulate.matches.base import by_name, negation, only_options
from gketrace.simulate.matches.fields import DSCP_CLASSES, parse_tos
from gketrace.simulate.state import Environment, PacketState, VerdictKind
from gketrace.simulate.targets.base import Effect, pass_on
from gketrace.simulate.tracking import template
from gketrace.trace import StepAction

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "PASSING",
    "CtTarget",
    "DscpTarget",
    "EcnTarget",
    "HlTarget",
    "NotrackTarget",
    "PassingTarget",
    "TosTarget",
    "TtlTarget",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassingTarget(Target):
    """Base of targets that change nothing that decides a packet's way."""

    name: ClassVar[str] = ""
    NOTE: ClassVar[str] = ""
    """What it does, one clause."""

    options: tuple[Option, ...]

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        return cls(options=options)

    def apply(self, state: PacketState, env: Environment) -> Effect:
        return pass_on(state, self.NOTE)

    def render(self) -> str:
        return " ".join((f"-j {self.name}", *render_options(self.options)))


def render_options(options: tuple[Option, ...]) -> tuple[str, ...]:
    """Options as they came."""
    return tuple(
        " ".join((negation(option.negated) + option.name, *(quote_value(a) for a in option.args)))
        for option in options
    )


def quote_value(text: str) -> str:
    """Quoted only where it must be: numbers with dots and the like stay bare."""
    return quote(text) if not text or any(c in text for c in " \t\"'\\") else text


_LOG_FLAGS: Final = {
    "--log-tcp-sequence": 0,
    "--log-tcp-options": 0,
    "--log-ip-options": 0,
    "--log-uid": 0,
    "--log-macdecode": 0,
}

_LIST: Final[tuple[tuple[str, str, Mapping[str, int]], ...]] = (
    ("AUDIT", "writes to the audit log", {"--type": 1}),
    ("CHECKSUM", "fills in the checksum", {"--checksum-fill": 0}),
    ("CLASSIFY", "sets the traffic class", {"--set-class": 1}),
    ("CONNSECMARK", "copies the security mark", {"--save": 0, "--restore": 0}),
    ("IDLETIMER", "restarts an idle timer", {"--timeout": 1, "--label": 1, "--alarm": 0}),
    (
        "LED",
        "triggers an LED",
        {"--led-trigger-id": 1, "--led-delay": 1, "--led-always-blink": 0},
    ),
    ("LOG", "writes to the kernel log", {"--log-level": 1, "--log-prefix": 1, **_LOG_FLAGS}),
    (
        "NFLOG",
        "hands a copy to a logging program",
        {
            "--nflog-group": 1,
            "--nflog-prefix": 1,
            "--nflog-range": 1,
            "--nflog-size": 1,
            "--nflog-threshold": 1,
        },
    ),
    (
        "RATEEST",
        "feeds a rate estimator",
        {"--rateest-name": 1, "--rateest-interval": 1, "--rateest-ewmalog": 1},
    ),
    ("SECMARK", "sets the security mark", {"--selctx": 1}),
    ("TCPOPTSTRIP", "strips TCP options", {"--strip-options": 1}),
    ("TEE", "sends a copy to another machine", {"--gateway": 1, "--oif": 1}),
    ("TRACE", "has the kernel trace this packet's rules", {}),
    (
        "ULOG",
        "hands a copy to a logging program",
        {"--ulog-nlgroup": 1, "--ulog-prefix": 1, "--ulog-cprange": 1, "--ulog-qthreshold": 1},
    ),
)


def _class(name: str, note: str, options: Mapping[str, int]) -> type[PassingTarget]:
    fields = {
        "__doc__": f"``-j {name}``: {note}; the packet goes on.",
        "__module__": __name__,
        "__slots__": (),
        "name": name,
        "NOTE": f"{name} {note}; the packet goes on",
        "OPTIONS": options,
    }
    return type(f"{name.title()}Target", (PassingTarget,), fields)


PASSING: Final[tuple[type[PassingTarget], ...]] = tuple(_class(*row) for row in _LIST)
"""One class for each."""


_MSS_OPTION: Final = 2
_MSS_BYTES: Final = 4


class TcpmssTarget(PassingTarget):
    """``-j TCPMSS``: changes the MSS option, or adds it where there is none.

    Source: tcpmss_mangle_packet() in net/netfilter/xt_TCPMSS.c: the option is added to a segment
    without data only, which makes the packet four bytes longer.
    """

    __slots__ = ()
    name: ClassVar[str] = "TCPMSS"
    NOTE: ClassVar[str] = "TCPMSS changes the TCP MSS option; the packet goes on"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--set-mss": 1, "--clamp-mss-to-pmtu": 0}

    def apply(self, state: PacketState, env: Environment) -> Effect:
        packet = state.packet
        if packet.tcp_options is not None and _MSS_OPTION in packet.tcp_options:
            return pass_on(state, self.NOTE)
        if packet.tcp_options is None or packet.length is None:
            # Whether the option is there, and so how long the packet is now, is not known.
            return pass_on(evolve(state, packet=evolve(packet, length=None)), self.NOTE)
        longer = evolve(
            packet,
            length=packet.length + _MSS_BYTES,
            tcp_options=(_MSS_OPTION, *packet.tcp_options),
        )
        return pass_on(
            evolve(state, packet=longer), "TCPMSS adds the TCP MSS option; the packet goes on"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NotrackTarget(Target):
    """``-j NOTRACK``: as ``-j CT --notrack``; nothing happens to a packet that is tracked."""

    name: ClassVar[str] = "NOTRACK"

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 0)
        return cls()

    def apply(self, state: PacketState, env: Environment) -> Effect:
        return _untrack(state)

    def render(self) -> str:
        return "-j NOTRACK"


def _attached(state: PacketState) -> bool:
    """skb->_nfct != 0, as xt_ct_target() asks: an entry, a template, or the mark of untracked."""
    return state.notrack or (state.ct is not None and state.ct.state is not CtState.INVALID)


def _untrack(state: PacketState) -> Effect:
    """xt_ct_target(): only where nothing is attached; one found INVALID on lo's way has none."""
    if _attached(state):
        return pass_on(state, "tracking is settled already: nothing changes")
    return pass_on(evolve(state, notrack=True), "connection tracking and NAT will not see it")


@dataclass(frozen=True, slots=True, kw_only=True)
class CtTarget(Target):
    """``-j CT``: what connection tracking, which comes after raw, shall do."""

    name: ClassVar[str] = "CT"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--notrack": 0,
        "--helper": 1,
        "--timeout": 1,
        "--ctevents": 1,
        "--expevents": 1,
        "--zone": 1,
        "--zone-orig": 1,
        "--zone-reply": 1,
    }

    options: tuple[Option, ...]
    notrack: bool
    zone: int | None
    """None: the default zone; -1: the packet's mark."""
    one_way: bool = False
    """Its zone is that of one direction: the other has another one."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        zone = found.get("--zone")
        number = None
        if zone is not None:
            number = -1 if zone.value == "mark" else integer(zone.value, 0, 65535)
        one_way = bool({"--zone-orig", "--zone-reply"} & set(found))
        return cls(options=options, notrack="--notrack" in found, zone=number, one_way=one_way)

    def apply(self, state: PacketState, env: Environment) -> Effect:
        if self.notrack:
            return _untrack(state)
        if _attached(state):
            return pass_on(state, "tracking is settled already: nothing changes")
        if self.one_way:
            return Effect(
                action=StepAction.UNKNOWN,
                state=state,
                verdict=VerdictKind.UNKNOWN,
                note="conntrack zones of one direction are not simulated",
            )
        zone = self.zone or 0
        ct = template(state.packet.family, max(zone, 0))
        note = "conntrack zone " + ("of the packet's mark" if zone < 0 else str(zone))
        return pass_on(evolve(state, ct=ct, zone=zone), note if self.zone is not None else "")

    def render(self) -> str:
        return " ".join(("-j CT", *render_options(self.options)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DscpTarget(Target):
    """``-j DSCP --set-dscp``."""

    name: ClassVar[str] = "DSCP"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--set-dscp": 1, "--set-dscp-class": 1}

    value: int

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        text = options[0].value
        if options[0].name == "--set-dscp-class":
            if text.upper() not in DSCP_CLASSES:
                raise ValueError(f"no such class: {text}")
            return cls(value=DSCP_CLASSES[text.upper()])
        return cls(value=integer(text, 0, 63))

    def apply(self, state: PacketState, env: Environment) -> Effect:
        packet = evolve(state.packet, dscp=self.value)
        return Effect(action=StepAction.REWRITE, state=evolve(state, packet=packet))

    def render(self) -> str:
        return f"-j DSCP --set-dscp {self.value:#04x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TosTarget(Target):
    """``-j TOS --set-tos VALUE/MASK``: new = (old & ~mask) ^ value."""

    name: ClassVar[str] = "TOS"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--set-tos": 1,
        "--and-tos": 1,
        "--or-tos": 1,
        "--xor-tos": 1,
    }

    value: int
    mask: int

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        option = options[0]
        if option.name == "--set-tos":
            value, mask = parse_tos(option.value)
            return cls(value=value, mask=mask)
        number = integer(option.value, 0, 255)
        if option.name == "--and-tos":
            return cls(value=0, mask=~number & 0xFF)
        return cls(value=number, mask=number if option.name == "--or-tos" else 0)

    def apply(self, state: PacketState, env: Environment) -> Effect:
        old = state.packet.dscp << 2 | state.packet.ecn
        new = (old & ~self.mask & 0xFF) ^ self.value
        packet = evolve(state.packet, dscp=new >> 2, ecn=new & 3)
        return Effect(action=StepAction.REWRITE, state=evolve(state, packet=packet))

    def render(self) -> str:
        return f"-j TOS --set-tos {self.value:#04x}/{self.mask:#04x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TtlTarget(Target):
    """``-j TTL --ttl-set|inc|dec``."""

    name: ClassVar[str] = "TTL"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--ttl-set": 1, "--ttl-inc": 1, "--ttl-dec": 1}

    how: str
    """``set``, ``inc`` or ``dec``."""
    value: int

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        how = options[0].name.rpartition("-")[2]
        return cls(how=how, value=integer(options[0].value, 0, 255))

    def apply(self, state: PacketState, env: Environment) -> Effect:
        old = state.packet.ttl
        if self.how == "set":
            new: int | None = self.value
        elif old is None:
            new = None
        else:
            # ttl_tg(): clipped to 0 and 255.
            new = max(0, min(255, old + (self.value if self.how == "inc" else -self.value)))
        packet = evolve(state.packet, ttl=new)
        return Effect(action=StepAction.REWRITE, state=evolve(state, packet=packet))

    def render(self) -> str:
        return f"-j {self.name} --{self.name.lower()}-{self.how} {self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HlTarget(TtlTarget):
    """``-j HL``: IPv6's hop limit."""

    name: ClassVar[str] = "HL"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--hl-set": 1, "--hl-inc": 1, "--hl-dec": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class EcnTarget(Target):
    """``-j ECN --ecn-tcp-remove``: clears TCP's ECE and CWR."""

    name: ClassVar[str] = "ECN"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--ecn-tcp-remove": 0}

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        return cls()

    def apply(self, state: PacketState, env: Environment) -> Effect:
        flags = state.packet.tcp_flags & ~(TcpFlags.ECE | TcpFlags.CWR)
        packet = evolve(state.packet, tcp_flags=flags)
        return Effect(action=StepAction.REWRITE, state=evolve(state, packet=packet))

    def render(self) -> str:
        return "-j ECN --ecn-tcp-remove"
