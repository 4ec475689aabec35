"""A followed connection as it is shown: with names, rules, odds and what is doubtful about it."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from gketrace.connections import Doubt
from gketrace.conntrack_records import STATE_NAMES
from gketrace.errors import UsageError
from gketrace.follow.joiner import Followed
from gketrace.follow.outcome import Outcome
from gketrace.packet import Tuple5
from gketrace.trace import Citation
from gketrace_cli.addressbook import AddressBook
from gketrace_cli.follow.packets import SeenPackets
from gketrace_cli.follow.rulebook import Way

__all__ = ["Chosen", "Named", "View", "make_view", "parse_state"]

_DOUBTS: Final = {
    Doubt.STATE: "its nodes disagree: one has it open, another closed",
    Doubt.REPLIES: "its nodes disagree: one has seen answers, another none",
    Doubt.REVERSED: "an answer made one of its entries: an earlier entry was lost there",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What ``--from`` or ``--to`` names: any of these."""

    text: str
    networks: tuple[IPv4Network | IPv6Network, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One connection at one moment."""

    followed: Followed
    client: str
    """``pod/NS/NAME`` …; empty: nobody's in the cluster."""
    door: str
    endpoint: str
    endpoint_node: str
    rules: tuple[tuple[Citation, ...], ...]
    """For each of the connection's halves; empty where it translates nothing, or is not known."""
    way: Way | None
    death: str
    """Where a packet of it would die now, by a walk; empty: nobody asked."""
    remarks: tuple[str, ...]
    packets: SeenPackets | None = None
    """None: nobody asked, or none were captured."""

    @property
    def failed(self) -> bool:
        return self.followed.judgement.failed

    @property
    def duration(self) -> float | None:
        """Seconds; None: not over, or it began before it was followed."""
        one = self.followed
        if one.began is None or one.ended is None:
            return None
        return max(one.ended - one.began, 0.0)


def make_view(
    followed: Followed,
    book: AddressBook,
    node_of: dict[str, str],
    way: Way | None,
    death: str | None,
    packets: SeenPackets | None = None,
) -> View:
    """`node_of`: address → node."""
    connection = followed.connection
    first, last = connection.first, connection.last
    rules: list[tuple[Citation, ...]] = []
    for half in connection.halves:
        entry = half.entry
        taken, let_out = entry.orig, entry.reply.inverted()
        if half.reversed or taken == let_out or way is None:
            rules.append(())
        else:
            rules.append(way.rules(half.place.node, taken, let_out))
    doubts = connection.doubts
    remarks = [
        text
        for doubt, text in _DOUBTS.items()
        if doubt in doubts
        and not (doubt is Doubt.REPLIES and followed.judgement.outcome is Outcome.NO_RETURN)
    ]
    said = followed.judgement.next_node
    remarks += [
        f"{one.node} was read and has no entry of it"
        for one in connection.unseen
        if one.node != said
    ]
    translated = [half.entry.dst_nat or half.entry.src_nat for half in connection.halves]
    if way is None and any(translated):
        remarks.append("the rules that translate it were not read in time")
    elif (
        way is not None
        and way.error
        and any(wanted and not cited for wanted, cited in zip(translated, rules, strict=True))
    ):
        remarks.append(f"the rules that translate it were not read: {way.error}")
    if connection.contested:
        remarks.append("other entries could belong to it just as well")
    if not all(sight.complete for sight in followed.sights):
        remarks.append("events were lost while it was open")
    return View(
        followed=followed,
        client=book.host(first.src),
        door=book.door(first.dst, first.dport, first.protocol),
        endpoint=book.host(last.dst),
        endpoint_node=node_of.get(str(last.dst), ""),
        rules=tuple(rules),
        way=way,
        death=death or "",
        remarks=tuple(remarks),
        packets=packets,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which connections are shown and counted."""

    sources: tuple[Named, ...] = ()
    targets: tuple[Named, ...] = ()
    states: frozenset[str] = frozenset()
    """Conntrack's states, upper case, or outcomes as `Outcome` has them."""
    failed: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Those of the command line that leave some out."""
        given = {
            "--from": self.sources,
            "--to": self.targets,
            "--state": self.states,
            "--failed": self.failed,
        }
        return tuple(name for name, value in given.items() if value)

    def takes_alone(self, first: Tuple5) -> bool:
        """One that failed before any node had an entry of it: no endpoint was picked."""
        chosen = not self.sources or any(first.src in n for s in self.sources for n in s.networks)
        return chosen and not self.targets

    def takes(self, followed: Followed) -> bool:
        connection = followed.connection
        source, target = connection.first.src, connection.last.dst
        if self.sources and not any(source in n for s in self.sources for n in s.networks):
            return False
        if self.targets and not any(target in n for t in self.targets for n in t.networks):
            return False
        if self.failed and not followed.judgement.failed:
            return False
        if not self.states:
            return True
        now = {half.entry.tcp_state for half in connection.halves}
        return bool(self.states & {*now, followed.judgement.outcome.value})


def parse_state(text: str) -> str:
    """``established``, ``time_wait``, ``reset``, ``unanswered`` → as `Chosen.states` has it.

    Raises `UsageError`.
    """
    outcomes = [one.value for one in Outcome]
    if text.lower() in outcomes and not text.isupper():  # SCTP has a CLOSED of its own
        return text.lower()
    if text.upper() in STATE_NAMES[1:]:
        return text.upper()
    if text.lower() in outcomes:
        return text.lower()
    raise UsageError(
        f"no such state: {text!r}",
        hint=f"one of {', '.join(outcomes)}, or conntrack's: {', '.join(STATE_NAMES[1:10])} …",
    )
