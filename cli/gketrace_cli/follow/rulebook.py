"""Which rules translate a connection, with what odds, and where a packet of it would die now.

Both come from walks (`gketrace trace`), in a thread beside: the rules from one walk for each front
door, sender and node where it comes in, as for a new connection; the place of death from a walk of
the connection's very packet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from fractions import Fraction
from ipaddress import ip_address
from queue import Queue
from typing import TYPE_CHECKING, Final

from gketrace.connections import Connection
from gketrace.errors import GketraceError, UnavailableError
from gketrace.packet import IPAddress, Tuple5
from gketrace.trace import FAILURE, SUCCESS, Citation, Disposition, Path, Source, StepKind
from gketrace_cli.asking import Asker
from gketrace_cli.frontdoors import Door, Question, Sender
from gketrace_cli.verdict import outcome_text

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.session import Session

__all__ = ["Odds", "RuleBook", "Way"]

_AT_MOST: Final = 32
"""Ways that are walked; later senders take a way of the same door and node.  A walk costs a node
tens of milliseconds, and clients outside are many."""
_AGE: Final = 30.0
"""Seconds that an answer holds."""
_TOGETHER: Final = 32
"""Walks that are asked for at the same time."""
_DEATHS: Final = 256
"""Walks of packets that failed, at most."""
_DEATHS_AGE: Final = 10.0
_AGAIN: Final = 5.0
"""Seconds after which an agent that did not answer is asked again."""


@dataclass(frozen=True, slots=True)
class Odds:
    """Endpoint → probability by the rules; None: not known."""

    of: dict[tuple[str, int], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What new connections of one sender through one door meet."""

    paths: tuple[Path, ...]
    door: IPAddress
    error: str = ""
    """Why an agent did not answer."""
    again: bool = False
    """That may pass: it is asked again."""

    def rules(self, node: str, taken: Tuple5, let_out: Tuple5) -> tuple[Citation, ...]:
        """Those that turn `taken` into `let_out` on `node`, in their order; empty: not known."""
        for path in self.paths:
            found = _rules(path, node, taken, let_out)
            if found:
                return found
        return ()

    def leads(self, node: str, let_out: Tuple5) -> Citation | None:
        """The rule that gives a packet the destination that it leaves `node` for; None: not
        known."""
        destination = let_out.dst, let_out.dport
        for path in self.paths:
            for hop in path.hops:
                if hop.netns.node != node or hop.netns.pod:
                    continue
                for step in hop.steps:
                    ends = ((one.dst, one.dport) for one in (step.before, step.after))
                    if [end == destination for end in ends] == [False, True]:
                        return step.citation
        return None

    def odds(self) -> Odds:
        found: dict[tuple[str, int], float | None] = {}
        for path in self.paths:
            packet = path.outcome.packet
            if packet.dst == self.door and path.outcome.disposition not in SUCCESS:
                continue  # not translated: no endpoint was picked
            key = str(packet.dst), packet.dport or 0
            before = found.get(key, 0.0)
            known = path.chance is not None and before is not None
            found[key] = (before or 0.0) + float(path.chance or 0) if known else None
        return Odds(found)


def _rules(path: Path, node: str, taken: Tuple5, let_out: Tuple5) -> tuple[Citation, ...]:
    """Of one path; empty when it translates to something else there."""
    found: list[Citation] = []
    there = False
    destination = (let_out.dst, let_out.dport)
    changes = (taken.dst, taken.dport) != destination
    for hop in path.hops:
        if hop.netns.node != node or hop.netns.pod:
            continue
        for step in hop.steps:
            cited = step.citation
            if cited is None or cited.source not in (Source.RULE, Source.POLICY, Source.SET):
                continue
            if cited.source is Source.POLICY or not _translates(cited, step.kind):
                continue
            found.append(cited)
            if changes and (step.after.dst, step.after.dport) == destination:
                there = True
            if not changes and step.after.src != step.before.src:
                there = True
    return tuple(dict.fromkeys(found)) if there else ()


def _translates(cited: Citation, kind: StepKind) -> bool:
    """The nat table's; in nftables mode all chains of kube-proxy's table, which has them all."""
    return kind is StepKind.NAT or cited.table == "nat" or cited.backend == "nftables"


class RuleBook:
    """Asks in one thread of its own; answers at once with what it knows."""

    def __init__(self, session: Session, pod_of: Callable[[str], Pod | None]) -> None:
        """`pod_of`: the pod that has an address."""
        self._session = session
        self._pod_of = pod_of
        self._asked: Queue[tuple[Hashable, Question, bool] | None] = Queue()
        self._ways: dict[Hashable, tuple[float, Way | None]] = {}
        self._deaths: dict[Hashable, tuple[float, str | None]] = {}
        self._similar: dict[Hashable, Hashable] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="rulebook", daemon=True).start()

    def close(self) -> None:
        self._asked.put(None)

    def use(self, session: Session) -> None:
        """The agents are reached another way now."""
        self._session = session

    def forget(self) -> None:
        """The rules may have changed."""
        with self._lock:
            self._ways.clear()
            self._deaths.clear()
            self._similar.clear()

    def way(self, connection: Connection, *, last: bool = False) -> Way | None:
        """None: not known yet; ask again.  `last`: nobody will, so take what there is."""
        first, entry = connection.first, connection.halves[0].place.node
        similar = (first.dst, first.dport, first.protocol, entry)
        key: Hashable = (*similar, first.src)
        with self._lock:
            known = self._ways.get(key)
            if known is None and len(self._ways) >= _AT_MOST and similar in self._similar:
                # From here on it is that one's: read again for whoever asks when it is old.
                key = self._similar[similar]
                known = self._ways.get(key)
            known_way = known[1] if known is not None else None
            failed = known_way is not None and known_way.again
            usable = known_way if last or not failed else None
            if known is not None and time.monotonic() - known[0] < (_AGAIN if failed else _AGE):
                return usable
            self._ways[key] = time.monotonic(), known_way
            self._similar.setdefault(similar, key)
        self._asked.put((key, self._question(first, entry, existing=False), False))
        return usable

    def death(self, connection: Connection, after: float) -> str | None:
        """What a walk of its packet says, one sentence, ``""`` for nothing; None: not known yet.

        The walk is of a moment later than `after`, seconds since the epoch: what was so before the
        connection began says nothing of it.
        """
        first, last = connection.first, connection.last
        entry = connection.halves[0].place.node
        key: Hashable = (first.src, first.dst, first.dport, first.protocol, entry, last.dst)
        now = time.time()
        with self._lock:
            known = self._deaths.get(key)
            if known is not None and known[0] >= after and now - known[0] < _DEATHS_AGE:
                return known[1]
            if known is None and len(self._deaths) >= _DEATHS:
                return ""
            self._deaths[key] = now, None
        self._asked.put((key, self._question(first, entry, existing=True), True))
        return None

    def _question(self, first: Tuple5, entry: str, *, existing: bool) -> Question:
        pod = self._pod_of(str(first.src))
        node = pod.node if pod is not None else self._node_of(first.src)
        sender = Sender(node=node, pod=pod, address=first.src, port=first.sport)
        return Question(
            door=Door.ADDRESS,
            sender=sender,
            address=ip_address(str(first.dst)),
            port=first.dport,
            protocol=first.protocol,
            entry="" if node else entry,
            use_conntrack=existing,
        )

    def _node_of(self, address: IPAddress) -> str:
        for node in self._session.nodes:
            seen = (str(one.address) for one in self._session.fleet.addresses(node.name))
            if str(address) in (*node.internal_ips, *node.external_ips, *seen):
                return node.name
        return ""

    def _run(self) -> None:
        while (first := self._asked.get()) is not None:
            batch = [first]
            while len(batch) < _TOGETHER and not self._asked.empty():
                more = self._asked.get()
                if more is None:
                    return
                batch.append(more)
            self._walk(batch)

    def _walk(self, batch: list[tuple[Hashable, Question, bool]]) -> None:
        error, again, begun = "", False, time.time()
        found: list[tuple[Path, ...]] = [()] * len(batch)
        try:
            asker = Asker(self._session)
            result = asker.ask([question for _, question, _ in batch])
            found = [answer.paths for answer in result.answers]
            error = asker.unanswered
            again = bool(error)
        except GketraceError as failure:
            error, again = failure.message, isinstance(failure, UnavailableError)
        except (RuntimeError, ValueError) as failure:  # the channel was closed meanwhile
            error, again = str(failure), True
        with self._lock:
            now = time.monotonic()
            for (key, question, dying), paths in zip(batch, found, strict=True):
                if dying:
                    self._deaths[key] = begun, _death(paths, "" if paths else error)
                else:
                    way = Way(paths=paths, door=question.address, error=error, again=again)
                    self._ways[key] = now, way


def _death(paths: tuple[Path, ...], error: str) -> str:
    """The first way that ends badly, or whose answer does."""
    if error:
        return f"the walk of its packet failed: {error}"
    for path in paths:
        for one, what in ((path, "its packet"), (path.reply, "the answer")):
            if one is not None and one.outcome.disposition in FAILURE:
                share = _share(path.chance) if len(paths) > 1 else ""
                where = one.outcome.netns
                place = f", on {where.node}" if where.node else ""  # the network is no node
                place = f", in {where} on {where.node}" if where.pod else place
                return f"{what} {_would(one)}{place}{share}"
    unknown = [p for p in paths if p.outcome.disposition is Disposition.UNKNOWN]
    if unknown:
        return f"where its packet would end now is not known: {outcome_text(unknown[0])}"
    if paths:
        return "by rules, routes and sockets as they are now its packet would arrive"
    return ""


def _would(path: Path) -> str:
    text = outcome_text(path)
    return text if path.outcome.disposition is Disposition.LOOPED else f"would be {text}"


def _share(chance: Fraction | None) -> str:
    return "" if chance is None else f" ({float(chance):.0%} of new connections)"
