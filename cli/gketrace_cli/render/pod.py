"""`gketrace pod` as text and as a document."""

from __future__ import annotations

from typing import Any

from gketrace.packet import protocol_name
from gketrace.snapshot import Address, Link, Neighbour, Socket, Unavailable
from gketrace_cli.podreport import Attachment, PodReport, Towards
from gketrace_cli.render.documents import envelope, missing_document
from gketrace_cli.render.layout import Page
from gketrace_cli.verdict import Verdict

__all__ = ["draw_pod", "pod_document"]

_COLUMN = 13


def draw_pod(page: Page, report: PodReport, verdict: Verdict) -> None:
    """One screen."""
    page.line(verdict.text, verdict.style, "bold")
    for problem in report.problems[1:]:
        page.line(f"Also: {problem}.", "red", hang=3)
    _where(page, report)
    if not report.shared:
        _inside(page, report)
        _outside(page, report)
        _next_hops(page, report)
    else:
        _listening(page, report)
    if report.missing:
        page.blank()
        page.line("Not seen", "bold")
        for item in report.missing:
            page.line(str(item), "yellow", indent=3, hang=2)


def _entry(page: Page, label: str, text: str, *styles: str) -> None:
    page.entry(label, text, *styles, indent=2, column=_COLUMN)


def _where(page: Page, report: PodReport) -> None:
    pod, resolved = report.pod, report.resolved
    page.blank()
    page.line("Where", "bold")
    ips = f" ({', '.join(report.node.internal_ips)})" if report.node else ""
    _entry(page, "node", f"{pod.node}{ips}")
    for container in resolved.containers:
        pid = f"PID {container.pid}" if container.pid else "not running"
        command = f" {container.command}" if container.command and page.wide else ""
        identifier = container.id if page.wide else container.id[:12]
        name = report.container_name(container) or "(name not known)"
        _entry(page, "container", f"{name} {identifier}, {pid}{command}")
    if not resolved.containers:
        _entry(page, "container", "none is running")
    if resolved.sandbox_pid:
        _entry(page, "sandbox", f"{resolved.sandbox_id[:12]}, PID {resolved.sandbox_pid}")
    inode = resolved.netns.inode
    shared = ", the node's own (hostNetwork)" if report.shared else ""
    path = f", {resolved.netns_path}" if resolved.netns_path and page.wide else ""
    _entry(page, "namespace", f"net:[{inode}]{shared}{path}")
    how = {"cri": "by the container runtime (CRI)", "cgroup": "by a scan of the cgroups"}
    _entry(page, "found", how.get(resolved.method, resolved.method or "not said"))
    for step in resolved.steps:
        if page.wide or not step.ok:
            _entry(page, "", f"{step.step}: {step.detail}", *(() if step.ok else ("yellow",)))
    if resolved.other_sandboxes:
        _entry(page, "", f"{resolved.other_sandboxes} more sandboxes of this pod are not used")


def _inside(page: Page, report: PodReport) -> None:
    page.blank()
    page.line("In the pod", "bold")
    for at in report.attachments:
        _entry(page, at.link.name, _link_text(at.link))
        for address in at.addresses:
            if address.scope != "link" or page.wide:
                _entry(page, "address", _address_text(address))
    shot = report.inside
    if isinstance(shot.routes, Unavailable):
        _entry(page, "route", f"not readable: {shot.routes.reason}", "yellow")
    else:
        for route in shot.routes:
            if route.table == 254 and (route.family == 4 or page.wide):
                _entry(page, "route", route.text or str(route.dst))
            elif page.wide and route.table != 255:
                _entry(page, "route", f"{route.text} (table {route.table})")
    if isinstance(shot.neighbours, Unavailable):
        _entry(page, "neighbour", f"not readable: {shot.neighbours.reason}", "yellow")
    else:
        names = _names(report.attachments)
        for neighbour in shot.neighbours:
            if neighbour.state != "NOARP" and not neighbour.address.is_multicast:
                on = names.get(neighbour.ifindex, f"index {neighbour.ifindex}")
                _entry(page, "neighbour", f"{neighbour.address} {_neighbour(neighbour)} on {on}")
    _listening(page, report)
    _rules(page, report)


def _names(attachments: tuple[Attachment, ...]) -> dict[int, str]:
    return {at.link.ifindex: at.link.name for at in attachments}


def _listening(page: Page, report: PodReport) -> None:
    if isinstance(report.sockets, Unavailable):
        _entry(page, "listening", f"not visible: {report.sockets.reason}", "yellow")
        return
    if report.shared:
        page.blank()
        page.line("On the node, which the pod shares", "bold")
    sockets = report.sockets
    if report.shared:
        pids = {c.pid for c in report.resolved.containers if c.pid}
        sockets = tuple(s for s in sockets if s.pid in pids)
    if not sockets:
        _entry(page, "listening", "nothing")
    for socket in sockets:
        _entry(page, "listening", _socket(socket))


def _rules(page: Page, report: PodReport) -> None:
    if not report.rulesets:
        _entry(page, "rules", "none")
    counts: dict[str, int] = {}
    for summary in report.rulesets:
        if summary.unavailable:
            why = f"{summary.backend}: not readable: {summary.unavailable}"
            _entry(page, "rules", why, "yellow")
        else:
            counts[summary.backend] = counts.get(summary.backend, 0) + summary.rules
    if counts:
        _entry(page, "rules", ", ".join(f"{count} {name}" for name, count in counts.items()))


def _outside(page: Page, report: PodReport) -> None:
    page.blank()
    page.line("On the node", "bold")
    for at in report.attachments:
        if at.host is None:
            why = "its peer is not in the node's namespace" if at.link.peer else "it has no peer"
            _entry(page, "host end", f"of {at.link.name}: {why}")
            continue
        _entry(page, "host end", f"{at.host.name} (index {at.host.ifindex}), {_link_text(at.host)}")
        if at.bridge is not None:
            port = at.host.port
            state = port.state if port is not None else "state not known"
            hairpin = f", hairpin {'on' if port.hairpin else 'off'}" if port is not None else ""
            _entry(page, "bridge", f"{at.bridge.name}: port {at.host.name} is {state}{hairpin}")
            if not at.learned and at.link.mac:
                _entry(page, "", f"{at.link.mac} is not in its forwarding table (it would flood)")
            for entry, name in at.learned:
                _entry(page, "", f"{entry.mac} is on port {name}, {_age(entry)}")
        for route in at.host_routes:
            table = "" if route.table == 254 else f" (table {route.table})"
            _entry(page, "host route", f"{route.text}{table}")
    for item in report.forwarding:
        state = {"0": "off", "1": "on"}.get(item.value, item.value)
        style = ("red",) if item.value == "0" and item.where == "node" else ()
        inside = " in the pod" if item.where == "pod" else ""
        if page.wide or item.where == "node":
            _entry(page, "forwarding", f"{state}{inside}: {item.name} = {item.value}", *style)


def _next_hops(page: Page, report: PodReport) -> None:
    if not report.towards:
        return
    page.blank()
    page.line("Next hops", "bold")
    for way in report.towards:
        _entry(page, way.what, _towards(way), *(("red",) if way.problem else ()))
        if way.route:
            _entry(page, "", f"by route {way.route}")


def _towards(way: Towards) -> str:
    if way.problem and way.next_hop is None:
        return way.problem
    if way.next_hop is None:
        return f"{way.destination}: could not be worked out"
    via = f"via {way.next_hop}" if way.gateway else "directly"
    mac = f", {_neighbour(way.neighbour)}" if way.neighbour else ", link address not resolved yet"
    owner = f", which is {way.owner} there" if way.owner else ""
    return f"{way.destination} {via} on {way.interface}{mac}{owner}"


def _link_text(link: Link) -> str:
    state = "down"
    if link.up:
        state = "up" if link.carrier else "up without carrier"
    kind = f"{link.kind}, " if link.kind else ""
    return f"{kind}{link.mac or 'no link address'}, MTU {link.mtu}, {state}"


def _address_text(address: Address) -> str:
    peer = f" peer {address.peer}" if address.peer else ""
    return f"{address.address}/{address.prefixlen}{peer}"


def _neighbour(neighbour: Neighbour) -> str:
    return f"{neighbour.mac or 'no link address'} {neighbour.state}".strip()


def _age(entry: Any) -> str:
    if "permanent" in entry.flags or "static" in entry.flags:
        return "set, does not age"
    return "age not known" if entry.updated is None else f"learned {entry.updated:.0f} s ago"


def _socket(socket: Socket) -> str:
    address = "*" if socket.address.is_unspecified else str(socket.address)
    if socket.address.version == 6 and address != "*":
        address = f"[{address}]"
    family = " (IPv6 only)" if socket.family == 6 and socket.v6only else ""
    holder = socket.process or "process not known"
    pid = f", PID {socket.pid}" if socket.pid else ""
    port = socket.port or "*"
    return f"{protocol_name(socket.protocol)} {address}:{port}{family} by {holder}{pid}"


def pod_document(report: PodReport, verdict: Verdict) -> dict[str, Any]:
    """The envelope of kind ``PodReport``."""
    pod, resolved = report.pod, report.resolved
    inside = report.inside
    return envelope(
        "PodReport",
        {
            "verdict": verdict.text,
            "complete": not report.missing,
            "missing": missing_document(report.missing),
            "problems": list(report.problems),
            "pod": {
                "namespace": pod.namespace,
                "name": pod.name,
                "uid": pod.uid,
                "node": pod.node,
                "ips": list(pod.pod_ips),
                "hostNetwork": report.shared,
                "phase": pod.phase or None,
                "ready": pod.ready,
            },
            "resolution": {
                "method": resolved.method or None,
                "netnsInode": resolved.netns.inode or None,
                "netnsPath": resolved.netns_path or None,
                "sandboxId": resolved.sandbox_id or None,
                "sandboxPid": resolved.sandbox_pid or None,
                "runtimeHandler": resolved.runtime_handler or None,
                "otherSandboxes": resolved.other_sandboxes,
                "steps": [{"step": s.step, "ok": s.ok, "detail": s.detail} for s in resolved.steps],
            },
            "containers": [
                {
                    "name": report.container_name(c) or None,
                    "id": c.id,
                    "pid": c.pid or None,
                    "state": c.state or None,
                    "command": c.command or None,
                }
                for c in resolved.containers
            ],
            "interfaces": [_attachment_document(at) for at in report.attachments],
            "routes": _maybe(inside.routes, lambda r: {"table": r.table, "text": r.text}),
            "neighbours": _maybe(inside.neighbours, _neighbour_document),
            "listening": _maybe(report.sockets, _socket_document),
            "rules": [
                {
                    "backend": s.backend,
                    "family": s.family,
                    "rules": None if s.unavailable else s.rules,
                    "unavailable": s.unavailable or None,
                }
                for s in report.rulesets
            ],
            "forwarding": [
                {"where": f.where, "sysctl": f.name, "value": f.value} for f in report.forwarding
            ],
            "nextHops": [_towards_document(way) for way in report.towards],
        },
    )


def _maybe(value: Any, each: Any) -> list[Any] | None:
    return None if isinstance(value, Unavailable) else [each(item) for item in value]


def _link_document(link: Link) -> dict[str, Any]:
    return {
        "name": link.name,
        "index": link.ifindex,
        "kind": link.kind or None,
        "mac": link.mac or None,
        "mtu": link.mtu,
        "up": link.up,
        "carrier": link.carrier,
    }


def _attachment_document(at: Attachment) -> dict[str, Any]:
    port = at.host.port if at.host is not None else None
    return {
        **_link_document(at.link),
        "addresses": [f"{a.address}/{a.prefixlen}" for a in at.addresses],
        "hostEnd": None if at.host is None else _link_document(at.host),
        "bridge": None
        if at.bridge is None
        else {
            **_link_document(at.bridge),
            "portState": port.state if port else None,
            "hairpin": port.hairpin if port else None,
            "learned": [
                {
                    "mac": entry.mac,
                    "port": name,
                    "ageSeconds": entry.updated,
                    "flags": list(entry.flags),
                }
                for entry, name in at.learned
            ],
        },
        "hostRoutes": [{"table": r.table, "text": r.text} for r in at.host_routes],
    }


def _neighbour_document(neighbour: Neighbour) -> dict[str, Any]:
    return {
        "address": str(neighbour.address),
        "mac": neighbour.mac or None,
        "state": neighbour.state or None,
        "index": neighbour.ifindex,
    }


def _socket_document(socket: Socket) -> dict[str, Any]:
    return {
        "protocol": protocol_name(socket.protocol),
        "address": str(socket.address),
        "port": socket.port,
        "pid": socket.pid,
        "process": socket.process or None,
    }


def _towards_document(way: Towards) -> dict[str, Any]:
    return {
        "what": way.what.replace("→", "to"),
        "destination": str(way.destination),
        "interface": way.interface or None,
        "nextHop": str(way.next_hop) if way.next_hop else None,
        "onLink": way.next_hop is not None and not way.gateway,
        "neighbour": _neighbour_document(way.neighbour) if way.neighbour else None,
        "owner": way.owner or None,
        "route": way.route or None,
        "problem": way.problem or None,
    }
