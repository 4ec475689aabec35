"""``recent``: lists of addresses seen lately; kube-proxy keeps session affinity in them.

Source: recent_mt() in net/netfilter/xt_recent.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.packet import IPAddress
from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, flags_text, integer, quote
from gketrace.simulate.evolve import evolve
from gketrace.simulate.matches.base import by_name, negation
from gketrace.simulate.state import (
    NO,
    YES,
    Answer,
    Environment,
    PacketState,
    RecentChange,
    RecentOp,
    Ternary,
    unknown,
)
from gketrace.snapshot import Unavailable

if TYPE_CHECKING:
    from typing import Self

__all__ = ["RecentMatch"]

_ACTIONS: Final = ("--set", "--rcheck", "--update", "--remove")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentMatch(Match):
    """``-m recent``."""

    module: ClassVar[str] = "recent"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(_ACTIONS, 0),
        "--seconds": 1,
        "--hitcount": 1,
        "--rttl": 0,
        "--reap": 0,
        "--name": 1,
        "--mask": 1,
        "--rsource": 0,
        "--rdest": 0,
    }

    action: str
    """``--set``, ``--rcheck``, ``--update`` or ``--remove``."""
    name: str = "DEFAULT"
    mask: IPAddress
    destination: bool = False
    """--rdest: the list holds destinations."""
    seconds: int = 0
    """0: no limit."""
    hitcount: int = 0
    """0: one time stamp is enough."""
    rttl: bool = False
    reap: bool = False
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        actions = [found[name] for name in _ACTIONS if name in found]
        if len(actions) != 1:
            raise ValueError("recent needs one of --set, --rcheck, --update, --remove")
        full: IPAddress = IPv4Address(2**32 - 1) if family == 4 else IPv6Address(2**128 - 1)
        return cls(
            action=actions[0].name,
            negated=actions[0].negated,
            name=found["--name"].value if "--name" in found else "DEFAULT",
            mask=ip_address(found["--mask"].value) if "--mask" in found else full,
            destination="--rdest" in found,
            seconds=integer(found["--seconds"].value) if "--seconds" in found else 0,
            hitcount=integer(found["--hitcount"].value) if "--hitcount" in found else 0,
            rttl="--rttl" in found,
            reap="--reap" in found,
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        packet = state.packet
        side = packet.dst if self.destination else packet.src
        address: IPAddress = type(side)(int(side) & int(self.mask))
        if self.action == "--set":
            # Matches whether the address was there or not, and it is there from now on.
            return evolve(
                NO if self.negated else YES, state=self._changed(state, address, RecentOp.SET)
            )
        answer = self._found(state, env, address)
        hit = answer.kind is not Ternary.NO
        if answer.kind is Ternary.UNKNOWN:
            return answer
        result = YES if hit is not self.negated else NO
        if self.action == "--remove" and answer.reason == "present":
            return evolve(result, state=self._changed(state, address, RecentOp.REMOVE))
        if self.action == "--update" and answer.reason == "present" and result is YES:
            return evolve(result, state=self._changed(state, address, RecentOp.SET))
        return result

    def _changed(self, state: PacketState, address: IPAddress, op: RecentOp) -> PacketState:
        change = RecentChange(name=self.name, address=address, op=op)
        return evolve(state, recent=(*state.recent, change))

    def _found(self, state: PacketState, env: Environment, address: IPAddress) -> Answer:
        """YES or NO as the list says, before negation; the reason ``present``: it has an entry."""
        ages: tuple[float, ...] | None = None
        added: list[float] = []
        known_gone = False
        for change in state.recent:
            if change.name == self.name and change.address == address:
                if change.op is RecentOp.REMOVE:
                    known_gone, added = True, []
                else:
                    added.append(0.0)
        listed = env.recent(self.name)
        if known_gone:
            ages = tuple(added) if added else None
        elif isinstance(listed, Unavailable):
            if added and not self.hitcount and not self.rttl:
                ages = tuple(added)
            else:
                return unknown(f"the list {self.name} could not be read: {listed.reason}")
        else:
            entry = next((e for e in listed if e.address == address), None)
            if entry is not None and self.rttl and not added and entry.ttl:
                ttl = state.packet.ttl
                if ttl is None:
                    return unknown("the TTL is not known")
                # recent_mt(): a forwarded packet's TTL has been lowered already.
                ttl += 1 if state.out_iface and state.in_iface else 0
                if ttl and ttl != entry.ttl:
                    entry = None
            if entry is not None or added:
                ages = (*added, *(entry.ages if entry is not None else ()))
        if ages is None:
            return NO
        if self.action == "--remove":
            return Answer(kind=Ternary.YES, reason="present")
        hits = sum(1 for age in ages if not self.seconds or age <= self.seconds)
        enough = hits >= max(self.hitcount, 1)
        return Answer(kind=Ternary.YES if enough else Ternary.NO, reason="present")

    def render(self) -> str:
        return (
            f"-m recent {negation(self.negated)}{self.action}"
            + (f" --seconds {self.seconds}" if self.seconds else "")
            + flags_text(((self.reap, "--reap"),))
            + (f" --hitcount {self.hitcount}" if self.hitcount else "")
            + flags_text(((self.rttl, "--rttl"),))
            + f" --name {quote(self.name)} --mask {self.mask}"
            + (" --rdest" if self.destination else " --rsource")
        )
