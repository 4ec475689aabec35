"""``gketrace pod``: where a pod is, and how it is wired to its node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gketrace.errors import (
    GketraceError,
    GoneError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from gketrace_cli.follow import options as following
from gketrace_cli.options import Options

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.podreport import PodReport
    from gketrace_cli.session import Session

__all__ = ["find_pod", "pod"]


def pod(
    options: Options,
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME, pod/NAME or NAMESPACE/NAME.")],
    follow: following.FollowOption = False,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="SOURCE", help="With --follow: only of this pod, node or address."
        ),
    ] = None,
    to: following.ToOption = None,
    since: following.SinceOption = None,
    state: following.StateOption = None,
    failed: following.FailedOption = False,
    duration: following.DurationOption = None,
    events: following.EventsOption = False,
    packets: following.PacketsOption = False,
    output: following.OutputOption = None,
) -> None:
    """Show how a pod is wired: container, PID, namespace, veth, bridge or host route, next hops.

    With --follow: its live connections on all nodes, each with rules, NAT, endpoint and end.

    For example:  gketrace pod web-0 -n shop
    """
    typed = following.Followed(
        follow=follow,
        sources=tuple(sources or ()),
        targets=tuple(to or ()),
        since=since,
        states=tuple(state or ()),
        failed=failed,
        duration=duration,
        events=events,
        packets=packets,
        output=output,
    )
    if follow:
        following.follow_pod(options, typed, name)
    if sources:
        raise UsageError("--from goes with --follow only")
    options = following.plain_output(options, typed)
    from gketrace_cli.names import parse_pod_name
    from gketrace_cli.session import Session

    with Session(options) as session:
        namespace, wanted = parse_pod_name(name, session.namespace)
        session.progress.say(f"reading pod {namespace}/{wanted}")
        if options.all_namespaces and "/" not in name.removeprefix("pod/"):
            found = _find_everywhere(session, wanted)
        else:
            found = find_pod(session, namespace, wanted)
        report = _report(session, found)
        session.progress.clear()
    from gketrace_cli.checking.single import pod_findings
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.findings import draw_findings, finding_documents
    from gketrace_cli.render.layout import Page, write
    from gketrace_cli.render.pod import draw_pod, pod_document
    from gketrace_cli.verdict import judge_pod

    findings = pod_findings(report)
    verdict = judge_pod(report, findings)
    if options.format.machine:
        document = pod_document(report, verdict)
        document["findings"] = finding_documents(findings)
        write(dump(document, options.format))
    else:
        page = Page.of(options)
        draw_pod(page, report, verdict)
        draw_findings(page, findings, heading="Findings")
        write(page.text())
    raise typer.Exit(int(verdict.code))


def find_pod(session: Session, namespace: str, name: str) -> Pod:
    """Raises: `NotFoundError` with the names that come close; `GketraceError`."""
    from gketrace_cli.names import close_names

    try:
        return session.cluster.pod(namespace, name)
    except NotFoundError as error:
        absent = session.check_namespace(namespace)
        if absent is not None:
            raise absent from error
        try:
            listed = [p.name for p in session.cluster.pods(namespace)]
        except GketraceError:  # the hint is a courtesy; the answer is that there is no such pod
            raise error from None
        raise NotFoundError(
            f'pod "{name}" not found in namespace "{namespace}"', hint=close_names(name, listed)
        ) from error


def _find_everywhere(session: Session, name: str) -> Pod:
    from gketrace_cli.names import close_names

    listed = session.cluster.pods()
    found = [p for p in listed if p.name == name]
    if not found:
        hint = close_names(name, [p.name for p in listed])
        raise NotFoundError(f'pod "{name}" not found in any namespace', hint=hint)
    if len(found) > 1:
        spaces = ", ".join(p.namespace for p in found)
        raise UsageError(f'pod "{name}" is in several namespaces', hint=f"-n one of {spaces}")
    return found[0]


def _report(session: Session, pod: Pod) -> PodReport:
    from gketrace_cli.podref import pod_ref, pod_target
    from gketrace_cli.podreport import build_pod_report
    from gketrace_proto.codec import snapshot_from_proto
    from gketrace_proto.v1alpha1 import agent_pb2 as pb

    if not pod.node:
        raise UnavailableError(
            f"pod {pod.key} is not on any node yet ({pod.phase or 'no phase'})",
            hint="there is no network to look at before it is scheduled",
        )
    if pod.phase in ("Succeeded", "Failed"):
        why = f" ({pod.reason})" if pod.reason else ""
        raise GoneError(f"pod {pod.key} has ended: {pod.phase}{why}; its network is gone")
    node = next((n for n in session.nodes if n.name == pod.node), None)
    fleet = session.fleet
    fleet.greet([pod.node])
    fleet.agent(pod.node)
    session.progress.say(f"asking the agent of node {pod.node}")
    inside_request = pb.GetNetnsRequest(target=pod_target(pod))
    host_request = pb.GetNetnsRequest(target=pb.Target(host=True), pods=[pod_ref(pod)])
    replies = fleet.ask(
        {
            "inside": (pod.node, "GetNetns", inside_request),
            "host": (pod.node, "GetNetns", host_request),
        }
    )
    for reply in replies.values():
        if isinstance(reply, GketraceError):
            raise reply
    inside, host = replies["inside"], replies["host"]
    return build_pod_report(
        pod=pod,
        node=node,
        resolved=inside.pod,
        inside=snapshot_from_proto(inside.snapshot),
        host=snapshot_from_proto(host.snapshot),
        rulesets=inside.snapshot.rulesets,
    )
