"""Paths → one sentence and an exit code.

Exit codes, strongest first: 3 when something was not seen or is not understood, 1 when something
is proved to be broken, 0.  (2, 4 and 5 are raised before there is anything to judge.)  A drop that
the Service's own configuration asks for is an outcome, and broken only when just that way was
asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Final

from gketrace.errors import ExitCode
from gketrace.findings.model import Severity
from gketrace.packet import IPAddress, protocol_name
from gketrace.trace import (
    FAILURE,
    SUCCESS,
    Disposition,
    Missing,
    NetnsKind,
    Path,
    StepAction,
    StepKind,
)
from gketrace_cli.astray import (
    NO_ENDPOINT,
    is_astray,
    is_misled,
    is_relayed,
    led_by,
    led_to,
    meant_for,
    whose,
)
from gketrace_cli.rewrites import by_affinity

if TYPE_CHECKING:
    from gketrace.findings.model import Finding
    from gketrace_cli.frontdoors import Question
    from gketrace_cli.liveness import LiveReading
    from gketrace_cli.podreport import PodReport

__all__ = [
    "Answer",
    "Standing",
    "Verdict",
    "astray_text",
    "judge_pod",
    "judge_service",
    "judge_trace",
    "new_connections",
    "outcome_text",
    "path_standing",
    "relayed_text",
    "target_text",
    "with_live",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The first line of the answer."""

    text: str
    code: ExitCode

    @property
    def style(self) -> str:
        return {ExitCode.OK: "green", ExitCode.BROKEN: "red"}.get(self.code, "yellow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All paths of one question."""

    question: Question
    paths: tuple[Path, ...]


class Standing(Enum):
    """What one path means for the verdict."""

    FINE = "fine"
    """It arrives, and the answer comes back as far as can be seen."""
    CONFIGURED = "as configured"
    """It is dropped because the Service says so."""
    BROKEN = "broken"
    UNKNOWN = "unknown"
    """Not seen, or not understood."""


_COMMENT: Final = re.compile(r'--comment (?:"([^"]*)"|(\S+))|comment "([^"]*)"')
_WORDS: Final = {
    Disposition.DELIVERED: "delivered",
    Disposition.TRANSMITTED: "left the cluster",
    Disposition.REFUSED: "refused",
    Disposition.DROPPED: "dropped",
    Disposition.REJECTED: "rejected",
    Disposition.UNREACHABLE: "unreachable",
    Disposition.NO_NEIGHBOUR: "undeliverable",
    Disposition.LOOPED: "sent in a loop",
    Disposition.UNKNOWN: "UNKNOWN",
}


def target_text(question: Question) -> str:
    """``10.43.246.223:80/tcp``."""
    host = f"[{question.address}]" if question.address.version == 6 else str(question.address)
    port = f":{question.port}" if question.port is not None else ""
    return f"{host}{port}/{protocol_name(question.protocol)}"


def path_standing(answer: Answer, path: Path) -> Standing:
    """How one of the answer's paths counts.

    A failure that hangs on something unknown proves something only when all other ways fail too.
    """
    question = answer.question
    disposition = path.outcome.disposition
    if path.missing or disposition is Disposition.UNKNOWN:
        return Standing.UNKNOWN
    if disposition in FAILURE:
        if path.chance is None and not all(
            other.outcome.disposition in FAILURE for other in answer.paths
        ):
            return Standing.UNKNOWN
        dropped = disposition is Disposition.DROPPED and question.configured_drop
        return Standing.CONFIGURED if dropped else Standing.BROKEN
    if disposition not in SUCCESS:
        return Standing.BROKEN if is_misled(question, path) else Standing.UNKNOWN
    if is_relayed(path):
        return Standing.UNKNOWN
    if is_astray(question, path):
        return Standing.BROKEN
    if path.reply is None:
        return Standing.FINE
    back = path.reply.outcome.disposition
    if back in SUCCESS or (back is Disposition.TRANSMITTED and question.sender.outside):
        return Standing.UNKNOWN if path.reply.missing else Standing.FINE
    return Standing.BROKEN if back in FAILURE else Standing.UNKNOWN


def outcome_text(path: Path) -> str:
    """``delivered to pod/default/web-0 10.40.0.10:8080``, ``dropped: …``."""
    outcome = path.outcome
    word = _WORDS[outcome.disposition]
    if outcome.disposition is Disposition.TRANSMITTED and outcome.detail:
        return outcome.detail
    if outcome.disposition in SUCCESS:
        return f"{word} to {path.endpoint}" if path.endpoint else word
    if outcome.reject_with:
        word += f" with {outcome.reject_with}"
    if outcome.detail:
        return f"{word}: {outcome.detail}"
    cited = outcome.citation
    if cited is not None and cited.chain:
        place = f":{cited.position}" if cited.position else ""
        word += f" by {cited.table} {cited.chain}{place}"
        comment = _COMMENT.search(cited.text)
        if comment:
            word += f" ({next(filter(None, comment.groups()))})"
    return word


def _code(standings: Iterable[tuple[Question, Standing]], missing: Sequence[Missing]) -> ExitCode:
    seen = list(standings)
    if missing or not seen or any(s is Standing.UNKNOWN for _, s in seen):
        return ExitCode.PARTIAL
    if any(s is Standing.BROKEN or (s is Standing.CONFIGURED and q.asked) for q, s in seen):
        return ExitCode.BROKEN
    return ExitCode.OK


def judge_service(name: str, answers: Sequence[Answer], missing: Sequence[Missing]) -> Verdict:
    """For `gketrace service`."""
    judged = [(a.question, p, path_standing(a, p)) for a in answers for p in a.paths]
    code = _code(((q, s) for q, _, s in judged), missing)
    ways = len(answers)
    by_way = {
        standing: sum(1 for a in answers if any(path_standing(a, p) is standing for p in a.paths))
        for standing in Standing
    }
    broken = [(q, p) for q, p, s in judged if s is Standing.BROKEN]
    asked = [(q, p) for q, p, s in judged if s is Standing.CONFIGURED and q.asked]
    unknown = [(q, p) for q, p, s in judged if s is Standing.UNKNOWN]
    if broken:
        question, path = broken[0]
        count = f"{by_way[Standing.BROKEN]} of {ways} ways fail; " if ways > 1 else ""
        text = f"{name} is broken: {count}{_way(question)} is {_failure(question, path)}"
    elif asked:
        question, path = asked[0]
        text = f"{name} does not answer this way, as configured: {question.configured_drop}"
        if fine := by_way[Standing.FINE]:
            there = f"{_way(question)}, as configured: {question.configured_drop}"
            lead = "leads" if fine == 1 else "lead"
            text = f"{name} does not answer at {there}; {fine} of {ways} ways {lead} to "
            text += _ends(judged)
    elif unknown or not judged:
        missing = [] if unknown and unknown[0][1].missing and not _absent(missing) else missing
        fine = sum(1 for a in answers if {path_standing(a, p) for p in a.paths} == {Standing.FINE})
        text = f"Could not tell whether {name} works"
        if fine:
            text = f"Could not see all of {name}: {fine} of {ways} ways lead to {_ends(judged)}"
        if unknown and not _absent(missing):
            question, path = unknown[0]
            text += f"; {_way(question)} is {_uncertain(path)}"
    else:
        fine = by_way[Standing.FINE]
        if not fine:
            text = f"{name} drops all {ways} ways traced, as configured"
        else:
            count = f"all {ways} ways" if fine == ways else f"{fine} of {ways} ways"
            count = "the way" if ways == 1 else count
            text = f"{name} works: {count} traced lead{'s' if ways == 1 else ''} to {_ends(judged)}"
        dropped = by_way[Standing.CONFIGURED]
        if dropped and fine:
            text += f"; {dropped} {'is' if dropped == 1 else 'are'} dropped as configured"
    for answer in answers:
        fresh = new_connections(answer)
        if fresh is None:
            continue
        further = _code(((answer.question, path_standing(fresh, p)) for p in fresh.paths), ())
        if code is ExitCode.OK and further is not ExitCode.OK:
            code = further
            how = "is broken" if further is ExitCode.BROKEN else "could not be seen whole"
            text = f"{name} {how} for new connections"
        text += f"; {_way(answer.question)} is an existing connection, pinned by conntrack"
        text += f"; {_fresh(answer, fresh)}"
    return Verdict(text=_also_missing(text, missing), code=code)


def with_live(verdict: Verdict, live: LiveReading) -> Verdict:
    """The verdict, and what existing connections are pinned to."""
    if not live.stale:
        return verdict
    count = len(live.stale)
    are = "live connection is" if count == 1 else "live connections are"
    text, code = verdict.text.removesuffix("."), verdict.code
    if code is ExitCode.OK and any(one.breaks for one in live.stale):
        code = ExitCode.BROKEN
        text = text.replace(" works: ", " works for new connections only: ", 1)
    return Verdict(text=f"{text}; {count} {are} stale.", code=code)


def _ends(judged: Sequence[tuple[Question, Path, Standing]]) -> str:
    """The one endpoint, or how many."""
    ends = sorted({p.endpoint for _, p, s in judged if s is Standing.FINE and p.endpoint})
    return ends[0] if len(ends) == 1 else f"{len(ends)} endpoints"


def _absent(missing: Sequence[Missing]) -> list[str]:
    """Nodes whose agent does not answer."""
    return sorted({m.node for m in missing if m.what == "agent" and m.node})


def new_connections(answer: Answer) -> Answer | None:
    """What would become of new connections, when it is a packet of one that some node's kernel
    tracks already: its entry decides, and no nat rule is consulted."""
    pinned = next((path for path in answer.paths if path.pinned_by is not None), None)
    return None if pinned is None else replace(answer, paths=pinned.fresh)


def _fresh(answer: Answer, fresh: Answer) -> str:
    """What would become of a new connection, beside the existing one."""
    ends, before = (
        list(dict.fromkeys(p.endpoint for p in a.paths if p.endpoint)) for a in (fresh, answer)
    )
    lost = [p for p in fresh.paths if path_standing(fresh, p) is not Standing.FINE]
    if lost or not ends:
        end = _failure(fresh.question, lost[0]) if lost else "UNKNOWN"
        if len(fresh.paths) > 1:
            return f"of new ones {_percent(lost[0])} would be {end}"
        return f"a new one would be {end}"
    if ends == before:
        return "a new one would go there too"
    return f"a new one would go to {ends[0] if len(ends) == 1 else f'one of {len(ends)} endpoints'}"


def judge_trace(answer: Answer, missing: Sequence[Missing]) -> Verdict:
    """For `gketrace trace`: just this way was asked for."""
    question = answer.question
    fresh = new_connections(answer)
    judged = [(question, p, path_standing(answer, p)) for p in answer.paths]
    code = _code(((q, s) for q, _, s in judged), missing)
    way = f"{question.sender.text} → {target_text(question)}"
    bad = next((p for _, p, s in judged if s in (Standing.BROKEN, Standing.CONFIGURED)), None)
    unsure = next((p for _, p, s in judged if s is Standing.UNKNOWN), None)
    if bad is not None:
        failing = (Standing.BROKEN, Standing.CONFIGURED)
        share = _share(question, bad, [p for _, p, s in judged if s in failing])
        text = f"{way} is {_failure(question, bad)}{share}"
        if code is ExitCode.OK:
            code = ExitCode.BROKEN
    elif unsure is not None:
        text = f"{way}: could not tell"
        if not (unsure.missing and unsure.missing[0].node in _absent(missing)):
            text += f": {_uncertain(unsure)}"
    elif not answer.paths:
        text = f"{way}: could not tell"
    else:
        ends = list(dict.fromkeys(p.endpoint for p in answer.paths if p.endpoint))
        where = ends[0] if len(ends) == 1 else f"{len(ends)} endpoints"
        how = "an existing connection, pinned by conntrack" if fresh is not None else "delivered"
        text = f"{way} is {how} to {where}" if ends else f"{way} is {how}"
    if fresh is None and len(answer.paths) == 1 and (rule := by_affinity(answer.paths[0])):
        text += f"; session affinity keeps it there, by {rule}"
    if fresh is not None:
        if bad is not None or unsure is not None:
            text += "; it is an existing connection, pinned by conntrack"
        text += f"; {_fresh(answer, fresh)}"
    return Verdict(text=_also_missing(text, missing), code=code)


def judge_pod(report: PodReport, findings: Sequence[Finding] = ()) -> Verdict:
    """For `gketrace pod`: what the report calls broken, and findings that are errors."""
    pod = report.pod
    code = ExitCode.OK
    problems = report.problems or tuple(
        f"{_inside(one.text)} ({one.code})" for one in findings if one.severity is Severity.ERROR
    )
    if problems:
        code = ExitCode.BROKEN
    if report.missing:
        code = ExitCode.PARTIAL
    if problems:
        text = f"Pod {pod.key} is broken: {problems[0]}"
    elif report.shared:
        text = f"Pod {pod.key} uses the network of its node {pod.node} itself (hostNetwork)"
    else:
        wires = []
        for at in report.attachments:
            hangs = f"{at.link.name} to {at.host.name}" if at.host else at.link.name
            wires.append(f"{hangs} on bridge {at.bridge.name}" if at.bridge else hangs)
        text = (
            f"Pod {pod.key} ({', '.join(pod.pod_ips)}) is wired: {', '.join(wires) or 'nothing'}, "
            f"on node {pod.node}"
        )
    return Verdict(text=_also_missing(text, report.missing), code=code)


def _inside(sentence: str) -> str:
    """A sentence as a part of another: "Node …" is "node …", "IPv4 …" stays."""
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() else sentence


def _way(question: Question) -> str:
    return f"{question.door.value} {target_text(question)} from {question.sender.text}"


def _failure(question: Question, path: Path) -> str:
    if is_astray(question, path):
        return astray_text(question, path)
    if is_misled(question, path):
        return f"led to {led_to(path)}, {NO_ENDPOINT}{_by(path)}, and {_end(path)}"
    if path.outcome.disposition in SUCCESS and path.reply is not None:
        return _unanswered(path.endpoint, path.reply)
    return _end(path)


def _end(path: Path) -> str:
    return outcome_text(path) + _where(path)


def astray_text(question: Question, path: Path) -> str:
    """``delivered to node/m69d 10.142.0.6:9100, which is no endpoint of the Service, by …``."""
    same = meant_for(question, path) and path.outcome.packet.dst in _asked_addresses(question, path)
    by = _by_route(path) if same else _by(path)
    return f"{outcome_text(path)}, {whose(question, path)}{by}"


def _asked_addresses(question: Question, path: Path) -> set[IPAddress]:
    """Those of the pod that was meant: no rule is at fault when another one has them."""
    meant = meant_for(question, path)
    known = {address for address, pod in question.takers if pod == meant}
    return known | ({question.address} if question.pod else set())


def _by_route(path: Path) -> str:
    """The last route to a pod: `` by the route '10.40.1.10 dev veth1' on node m69d``."""
    for hop in reversed(path.hops):
        for step in reversed(hop.steps):
            sent_on = step.kind is StepKind.ROUTE and step.action is StepAction.FORWARD
            if sent_on and step.citation is not None and hop.netns.kind is NetnsKind.HOST:
                return f", by the route {step.citation.text!r} on node {hop.netns.node}"
    return ""


def relayed_text(path: Path) -> str:
    """``taken by a program of pod default/web-0 at 127.0.0.1:15001, by OUTPUT:1 in pod …``."""
    return (
        f"taken by a program of the sender's own pod at {led_to(path)}{_by(path)}; what that makes "
        "of it is not seen"
    )


def _by(path: Path) -> str:
    rule, place = led_by(path)
    return f", by {rule} {place}" if rule else ""


def _where(path: Path) -> str:
    """The place of a failure: `` on node m69d``.  Empty where the packet was sent there, and where
    the sender refuses an answer."""
    there = path.outcome.netns
    if path.outcome.disposition not in FAILURE or not there.node:
        return ""
    if "the sender expects" in path.outcome.detail:
        return ""
    if path.hops and path.hops[0].netns == there:
        return ""
    comma = "," if path.outcome.detail else ""
    return f"{comma} in pod {there.pod}" if there.pod else f"{comma} on node {there.node}"


def _unanswered(endpoint: str, reply: Path) -> str:
    """``delivered to pod/default/web-0 10.40.0.10:8080, and the answer is dropped: …``."""
    verb = "has" if reply.outcome.disposition is Disposition.TRANSMITTED else "is"
    return f"delivered to {endpoint}, and the answer {verb} {outcome_text(reply)}{_where(reply)}"


def _uncertain(path: Path) -> str:
    if path.missing:
        return f"not seen whole ({path.missing[0]})"
    if is_relayed(path):
        return relayed_text(path)
    if path.outcome.disposition in SUCCESS and path.reply is not None:
        return _unanswered(path.endpoint, path.reply)
    condition = next((b for b in path.because if b.startswith("if ")), "")
    if path.outcome.disposition in FAILURE and condition:
        return f"perhaps {outcome_text(path)}, {condition}"
    cited = path.outcome.citation
    if path.outcome.disposition is Disposition.UNKNOWN and cited is not None and cited.chain:
        return f"{outcome_text(path)}: {cited.text}"
    if path.outcome.disposition is Disposition.TRANSMITTED:
        return outcome_text(path) + ("" if path.chance in (1, None) else f" ({_percent(path)})")
    return outcome_text(path)


def _share(question: Question, path: Path, others: Sequence[Path]) -> str:
    """How many of new connections end like `path`, of all that do not work; empty: all."""
    if path.chance is None:
        return f" ({_percent(path)} of new connections)"
    like = [p for p in others if _failure(question, p) == _failure(question, path)]
    share, whole = (sum(p.chance or 0 for p in some) for some in (like, others))
    if share == 1:
        return ""
    rest = f"; {float(whole - share):.1%} more fail in another way" if whole > share else ""
    return f" ({float(share):.1%} of new connections{rest})"


def _percent(path: Path) -> str:
    return "a share that is not known" if path.chance is None else f"{float(path.chance):.1%}"


def _also_missing(text: str, missing: Sequence[Missing]) -> str:
    if not missing:
        return f"{text}."
    nodes = _absent(missing)
    if nodes:
        return f"{text}; not everything was seen: no agent answers on {', '.join(nodes)}."
    return f"{text}; not everything was seen: {missing[0]}."
