"""A Service's connections that are led to what is no endpoint of it.  Pure.

That such a connection is answered and closed does not say that the Service works: a rule that comes
before kube-proxy's, one that was left behind, or a program of the node has taken it.  Evidence is
what the objects said at the time: an endpoint that came between two readings is not known yet at
the first, so it is the reading after the connection's beginning that decides.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from gketrace.connections import Connection
from gketrace.follow.joiner import Followed
from gketrace.follow.outcome import Outcome
from gketrace_cli.astray import NO_ENDPOINT
from gketrace_cli.follow.scope import Scope
from gketrace_cli.follow.tally import end_text
from gketrace_cli.follow.view import View

__all__ = ["Judged", "Misled", "find_misled", "judge_misled", "led_by"]

_SKEW: Final = 0.3
"""Seconds by which a node's clock and this one's may differ."""
_PROGRAMMING: Final = 30.0
"""Seconds in which nodes may have the rules of an endpoint that was removed: kube-proxy's
--iptables-sync-period, after which it has written all of them anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misled:
    """Where a connection was led."""

    end: str
    """ADDRESS:PORT."""
    removed: float | None
    """When a reading found it to be an endpoint no more; None: no reading found it to be one."""
    untranslated: bool
    """The node itself has the front door's address, and a program there took the connection."""


class Judged(NamedTuple):
    """A connection, with what its end says of it."""

    followed: Followed
    remark: str = ""
    decided: bool = True
    """False: the objects must be read again first."""


def find_misled(scope: Scope, connection: Connection, owner: dict[str, str]) -> Misled | None:
    """None: it was led to an endpoint, or to nobody.  `owner`: address → node."""
    last = connection.last
    if scope.service is None or scope.has_end(last):
        return None
    met = [connection.first, *(half.entry.reply.inverted() for half in connection.halves)]
    if any(scope.has_end(one) for one in met):
        return None
    ends = [removed for one in met if (removed := scope.removed_at(one)) is not None]
    if ends:
        return Misled(end=end_text(last), removed=max(ends), untranslated=False)
    if (connection.first.dst, connection.first.dport) == (last.dst, last.dport):
        place = connection.halves[-1].place
        mine = not place.pod and owner.get(str(last.dst)) == place.node
        if not mine or str(last.dst) in scope.service.cluster_ips:  # NodeLocal DNS has one
            return None
        return Misled(end=end_text(last), removed=None, untranslated=True)
    return Misled(end=end_text(last), removed=None, untranslated=False)


def judge_misled(followed: Followed, misled: Misled, *, since: float, read: float) -> Judged:
    """`since`, `read`: when the first and the last reading of the objects began, seconds since the
    epoch."""
    judgement = followed.judgement
    if misled.removed is None and not misled.untranslated:
        # Entries to it are not read: that a node behind has none is not known.
        connection = replace(followed.connection, unseen=())
        judgement = replace(judgement, next_node="")
        followed = replace(followed, connection=connection, judgement=judgement)
    if misled.untranslated and not any(sight.replied for sight in followed.sights):
        return Judged(followed)
    began = followed.began
    if misled.removed is not None and (began is None or began <= misled.removed):
        return Judged(followed)  # it was one then
    text = f"{misled.end} is no endpoint of the Service"
    if began is None or began < since:
        return Judged(followed, f"{text}; whether it was one when this began is not known")
    if misled.removed is not None:
        gone = f"{misled.end} was removed from the Service's endpoints by {_clock(misled.removed)}"
        if judgement.failed or began < misled.removed + _PROGRAMMING:
            return Judged(followed, f"{gone}, before this began")
        because = f"{gone}, {began - misled.removed:.0f} s before this began"
    elif read < began + _SKEW:
        remark = f"{text} by {_clock(read)}, before this began; no later reading is known"
        return Judged(followed, remark, decided=False)
    elif judgement.failed:
        return Judged(followed, text)
    elif misled.untranslated:
        because = f"a program of the node took it: no rule translated it, and {text}"
    else:
        because = f"it was led to {misled.end}, {NO_ENDPOINT} (read at {_clock(read)})"
    judged = replace(judgement, outcome=Outcome.ASTRAY, failed=True, because=because)
    return Judged(replace(followed, judgement=judged))


def led_by(view: View) -> str:
    """The rule that gave it its last destination, as the walk of a new connection meets it; empty:
    not known."""
    for half in reversed(view.followed.connection.halves):
        taken, let_out = half.entry.orig, half.entry.reply.inverted()
        if (taken.dst, taken.dport) != (let_out.dst, let_out.dport):
            rule = view.way.leads(half.place.node, let_out) if view.way is not None else None
            if rule is None:
                return ""
            where = f":{rule.position}" if rule.position else ""
            chain = f"{rule.table} {rule.chain}{where}"
            return f"on {half.place.node} {chain} leads it there: {rule.text}"
    return ""


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
