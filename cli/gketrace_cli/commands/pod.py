"""``gketrace pod``: where a pod is, and how it is wired to its node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gketrace.errors import (
    GketraceError,
    GoneError,
    NotFoundError,
    UnavailableError,
)
from gketrace_cli.options import Options

if TYPE_CHECKING:
    from gketrace_cli.objects import Pod
    from gketrace_cli.podreport import PodReport
    from gketrace_cli.session import Session

__all__ = ["find_pod", "pod"]


def pod(
    options: Options,
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME, pod/NAME or NAMESPACE/NAME.")],
) -> None:
    """Show how a pod is wired: container, PID, namespace, veth, bridge or host route, next hops.

    For example:  gketrace pod web-0 -n shop
    """
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
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.layout import Page, write
    from gketrace_cli.render.pod import draw_pod, pod_document
    from gketrace_cli.verdict import judge_pod

    verdict = judge_pod(report)
    if options.format.machine:
        write(dump(pod_document(report, verdict), options.format))
    else:
        page = Page.of(options)
        draw_pod(page, report, verdict)
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
    from gketrace.errors import UsageError
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
