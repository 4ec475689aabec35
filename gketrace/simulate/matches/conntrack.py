"""``conntrack`` and ``state``.

Source: conntrack_mt() and ct_proto_port_check_v3() in net/netfilter/xt_conntrack.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.conntrack import CtState, CtStatus
from gketrace.packet import IPAddress, Protocol, Tuple5
from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, interval, interval_text
from gketrace.simulate.matches.base import by_name, every, is_tracked, negation, within
from gketrace.simulate.matches.header import (
    ProtocolIs,
    masked_address,
    masked_text,
)
from gketrace.simulate.state import (
    NO,
    YES,
    Answer,
    CtInfo,
    Direction,
    Environment,
    PacketState,
    decide,
    unknown,
)

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ConntrackMatch", "StateMatch"]

_STATES: Final = ("INVALID", "NEW", "RELATED", "ESTABLISHED", "UNTRACKED", "SNAT", "DNAT")
"""In the order in which libxt_conntrack.c prints them."""
# Plain numbers: an operation on a member of an enum costs ten times as much.
_SRC_NAT: Final = int(CtStatus.SRC_NAT)
_DST_NAT: Final = int(CtStatus.DST_NAT)
_STATUS: Final[Mapping[str, CtStatus]] = {
    "EXPECTED": CtStatus.EXPECTED,
    "SEEN_REPLY": CtStatus.SEEN_REPLY,
    "ASSURED": CtStatus.ASSURED,
    "CONFIRMED": CtStatus.CONFIRMED,
}
_ADDRESSES: Final = ("--ctorigsrc", "--ctorigdst", "--ctreplsrc", "--ctrepldst")
_PORTS: Final = ("--ctorigsrcport", "--ctorigdstport", "--ctreplsrcport", "--ctrepldstport")


def states_of(text: str, known: tuple[str, ...]) -> frozenset[str]:
    """``NEW,RELATED`` → its words.  Raises `ValueError`."""
    words = frozenset(text.upper().split(","))
    for word in words - set(known):
        raise ValueError(f"no such state: {word}")
    return words


def state_words(state: PacketState) -> frozenset[str]:
    """What ``--ctstate`` sees: the state, and SNAT and DNAT by the entry's status.

    Without an entry the packet is UNTRACKED when NOTRACK said so and INVALID otherwise, which is
    also what the raw table sees before tracking has looked.
    """
    ct = state.ct
    if ct is None or not is_tracked(state):
        untracked = state.notrack or (ct is not None and ct.state is CtState.UNTRACKED)
        return frozenset({"UNTRACKED" if untracked else "INVALID"})
    words = {ct.state.value}
    if ct.status & _SRC_NAT:
        words.add("SNAT")
    if ct.status & _DST_NAT:
        words.add("DNAT")
    return frozenset(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressTest:
    """``--ctorigsrc ADDRESS[/MASK]`` and its siblings."""

    name: str
    address: IPAddress
    mask: int
    negated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PortTest:
    """``--ctorigsrcport PORT[:PORT]`` and its siblings."""

    name: str
    low: int
    high: int
    negated: bool


def _tuple_port(tuple5: Tuple5, destination: bool) -> int | None:
    """The ``u.all`` half of a tuple: for ICMP the identifier, or type and code."""
    if not destination:
        return tuple5.sport
    if tuple5.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        if tuple5.icmp_type is None:
            return None
        return tuple5.icmp_type << 8 | (tuple5.icmp_code or 0)
    return tuple5.dport


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackMatch(Match):
    """``-m conntrack``."""

    module: ClassVar[str] = "conntrack"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--ctstate": 1,
        "--ctproto": 1,
        "--ctstatus": 1,
        "--ctexpire": 1,
        "--ctdir": 1,
        **dict.fromkeys(_ADDRESSES, 1),
        **dict.fromkeys(_PORTS, 1),
    }

    states: frozenset[str] | None = None
    states_negated: bool = False
    protocol: ProtocolIs | None = None
    addresses: tuple[AddressTest, ...] = ()
    ports: tuple[PortTest, ...] = ()
    status: int | None = None
    """`CtStatus` bits, any of which; ``NONE`` is no bit and matches nothing."""
    status_negated: bool = False
    expire: tuple[int, int] | None = None
    """Seconds, both ends included."""
    expire_negated: bool = False
    direction: Direction | None = None
    direction_negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        if not found:
            raise ValueError("conntrack without an option")
        states = found.get("--ctstate")
        protocol = found.get("--ctproto")
        status = found.get("--ctstatus")
        expire = found.get("--ctexpire")
        direction = found.get("--ctdir")
        addresses = []
        for name in _ADDRESSES:
            if option := found.get(name):
                address, mask = masked_address(option.value, family)
                addresses.append(
                    AddressTest(name=name, address=address, mask=mask, negated=option.negated)
                )
        ports = []
        for name in _PORTS:
            if option := found.get(name):
                low, high = interval(option.value)
                ports.append(PortTest(name=name, low=low, high=high, negated=option.negated))
        return cls(
            states=states_of(states.value, _STATES) if states else None,
            states_negated=states is not None and states.negated,
            protocol=ProtocolIs.parse((protocol,), family) if protocol else None,
            addresses=tuple(addresses),
            ports=tuple(ports),
            status=_parse_status(status.value) if status else None,
            status_negated=status is not None and status.negated,
            expire=interval(expire.value, 0xFFFFFFFF) if expire else None,
            expire_negated=expire is not None and expire.negated,
            direction=_parse_direction(direction.value) if direction else None,
            direction_negated=direction is not None and direction.negated,
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        if self.states is not None:
            hit = not self.states.isdisjoint(state_words(state))
            if hit is self.states_negated:
                return NO
        ct = state.ct
        if ct is None or not is_tracked(state):
            # conntrack_mt(): without an entry only the state is looked at.
            return NO if self.states is None else YES
        return YES if self._only_state else every(self._answers(ct))

    @property
    def _only_state(self) -> bool:
        """Most rules ask for nothing else."""
        return (
            self.direction is None
            and self.protocol is None
            and self.status is None
            and self.expire is None
            and not self.addresses
            and not self.ports
        )

    def _answers(self, ct: CtInfo) -> Iterator[Answer]:
        if self.direction is not None:
            yield decide(ct.direction is self.direction, negated=self.direction_negated)
        for test in self.addresses:
            side = ct.orig if "orig" in test.name else ct.reply
            if side is None:
                yield unknown("the entry's reply tuple is not known")
                continue
            address = side.src if test.name.endswith("src") else side.dst
            same = int(address) & test.mask == int(test.address)
            yield decide(same, negated=test.negated)
        if self.protocol is not None and ct.orig is not None:
            yield decide(ct.orig.protocol == self.protocol.number, negated=self.protocol.negated)
        for port in self.ports:
            side = ct.orig if "orig" in port.name else ct.reply
            number = None if side is None else _tuple_port(side, port.name.endswith("dstport"))
            yield within(
                number,
                (port.low, port.high),
                negated=port.negated,
                what=f"connection's {port.name.removeprefix('--ct')}",
            )
        if self.status is not None:
            yield decide(bool(ct.status & self.status), negated=self.status_negated)
        if self.expire is not None:
            yield unknown("when the connection expires is not known")

    def render(self) -> str:
        text = f"-m {self.module}"
        if self.states is not None:
            listed = ",".join(word for word in _STATES if word in self.states)
            option = "--state" if self.module == "state" else "--ctstate"
            text += f" {negation(self.states_negated)}{option} {listed}"
        if self.protocol is not None:
            text += f" {negation(self.protocol.negated)}--ctproto {self.protocol.number}"
        for test in self.addresses:
            shown = masked_text(test.address, test.mask).removesuffix(
                f"/{test.address.max_prefixlen}"
            )
            text += f" {negation(test.negated)}{test.name} {shown}"
        for port in self.ports:
            shown = interval_text((port.low, port.high))
            text += f" {negation(port.negated)}{port.name} {shown}"
        if self.status is not None:
            listed = ",".join(word for word, bit in _STATUS.items() if self.status & bit) or "NONE"
            text += f" {negation(self.status_negated)}--ctstatus {listed}"
        if self.expire is not None:
            text += f" {negation(self.expire_negated)}--ctexpire {interval_text(self.expire)}"
        if self.direction is not None:
            text += f" {negation(self.direction_negated)}--ctdir {self.direction.value}"
        return text


def _parse_direction(text: str) -> Direction:
    if text.upper() not in Direction.__members__:
        raise ValueError(f"no such direction: {text}")
    return Direction[text.upper()]


def _parse_status(text: str) -> int:
    bits = 0
    for word in text.upper().split(","):
        if word in _STATUS:
            bits |= _STATUS[word]
        elif word != "NONE":
            raise ValueError(f"no such status: {word}")
    return bits


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMatch(ConntrackMatch):
    """``-m state --state``: the older spelling; knows no SNAT and DNAT."""

    module: ClassVar[str] = "state"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--state": 1}

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        option = by_name(options).get("--state")
        if option is None:
            raise ValueError("state without --state")
        return cls(states=states_of(option.value, _STATES[:5]), states_negated=option.negated)
