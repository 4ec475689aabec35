"""``gketrace pod``: where a pod is, and how it is wired to its node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gketrace.errors import (
    GketraceError,
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

__all__ = ["pod"]


def pod(
    options: Options,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="NAME, pod/NAME or NAMESPACE/NAME; or the name of its workload."
        ),
    ],
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
    from gketrace_cli.find_pod import find_pod_named
    from gketrace_cli.session import Session

    with Session(options) as session:
        session.progress.say(f"reading pod {name}")
        report = _report(session, find_pod_named(session, name))
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


def _report(session: Session, pod: Pod) -> PodReport:
    from gketrace_cli.find_pod import refuse_ended
    from gketrace_cli.podref import pod_ref, pod_target
    from gketrace_cli.podreport import build_pod_report
    from gketrace_proto.codec import snapshot_from_proto
    from gketrace_proto.v1alpha1 import agent_pb2 as pb

    if not pod.node:
        raise UnavailableError(
            f"pod {pod.key} is not on any node yet ({pod.phase or 'no phase'})",
            hint="there is no network to look at before it is scheduled",
        )
    refuse_ended(pod)
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
        if isinstance(reply, NotFoundError) and pod.phase == "Pending":
            raise NotFoundError(
                f"pod {pod.key} is Pending on node {pod.node}: it has no network there yet",
                hint=reply.message,
            )
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
