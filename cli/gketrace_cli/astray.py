"""Ways to a Service that end at somebody who is no endpoint of it.

Pure.  That a packet is delivered does not say that the Service works: a rule that comes before
kube-proxy's, a rule that was left behind, or a program of the node may have taken it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING

from gketrace.packet import IPAddress
from gketrace.trace import FAILURE, SUCCESS, Disposition, NetnsKind, Path
from gketrace_cli.rewrites import rewrites

if TYPE_CHECKING:
    from gketrace.objects import Endpoint, ServicePort
    from gketrace_cli.frontdoors import Question

__all__ = [
    "NO_ENDPOINT",
    "is_astray",
    "is_misled",
    "is_relayed",
    "known_ends",
    "known_takers",
    "led_by",
    "led_to",
    "meant_for",
    "whose",
]

NO_ENDPOINT = "which is no endpoint of the Service"


def known_ends(
    endpoints: Iterable[Endpoint], port: ServicePort
) -> frozenset[tuple[IPAddress, int]]:
    """`Question.ends` of a port: all its endpoints, ready or not."""
    return frozenset((ip_address(e.address), e.port) for e in _of_port(endpoints, port))


def known_takers(
    endpoints: Iterable[Endpoint], port: ServicePort
) -> frozenset[tuple[IPAddress, str]]:
    """`Question.takers` of a port: its endpoints that are pods."""
    return frozenset((ip_address(e.address), e.pod_key) for e in _of_port(endpoints, port) if e.pod)


def _of_port(endpoints: Iterable[Endpoint], port: ServicePort) -> Iterator[Endpoint]:
    """Those that have an address, ready or not."""
    for end in endpoints:
        same = (end.port_name, end.protocol) == (port.name, port.protocol)
        if same and end.address_type != "FQDN":
            yield end


def meant_for(question: Question, path: Path) -> str:
    """The pod that should have got a new connection, which another pod has taken: it has the same
    address, or a rule leads to it.  Empty: none was meant, or it has got it."""
    taker = path.outcome.netns
    if path.outcome.disposition not in SUCCESS or path.pinned_by is not None or is_relayed(path):
        return ""
    if taker.kind is not NetnsKind.POD or not taker.pod:
        return ""
    if question.pod:
        return question.pod if taker.pod != question.pod else ""
    meant = sorted(pod for address, pod in question.takers if address == path.outcome.packet.dst)
    return meant[0] if meant and taker.pod not in meant else ""


def is_astray(question: Question, path: Path) -> bool:
    """Whether a new connection to a Service arrives at no endpoint of it, or at another pod than
    the one that was asked for.

    It is enough that an endpoint's address was the packet's destination on the way: a mesh's
    sidecar redirects it further.  Existing connections may go on to what was an endpoint.  A
    ClusterIP that a node has itself and that no rule translates is that of NodeLocal DNS.
    """
    if path.outcome.disposition not in SUCCESS or path.pinned_by is not None or is_relayed(path):
        return False
    if meant_for(question, path):
        return True
    translated = any(one.of_destination for one in rewrites(path))
    if not translated and question.door.value in ("ClusterIP", "Pod"):
        return False
    return _meets_none(question, path)


def is_misled(question: Question, path: Path) -> bool:
    """Whether a connection to a Service fails, or leaves the cluster, where a rule that knows no
    endpoint of it has led it; or its conntrack entry, which has outlived one: then what drops it on
    the way may be the cause."""
    end = path.outcome.disposition
    if end not in FAILURE and end is not Disposition.TRANSMITTED:
        return False
    if path.pinned_by is not None and end in (Disposition.DROPPED, Disposition.REJECTED):
        return False
    return any(one.of_destination for one in rewrites(path)) and _meets_none(question, path)


def is_relayed(path: Path) -> bool:
    """Whether a rule in the sender's pod hands the packet to a program of that pod: the sidecar of
    a mesh, whose own connection to the destination is another one."""
    taker = path.outcome.netns
    if path.outcome.disposition not in SUCCESS or taker.kind is not NetnsKind.POD:
        return False
    return all(hop.netns == taker for hop in path.hops) and any(
        one.of_destination for one in rewrites(path)
    )


def _meets_none(question: Question, path: Path) -> bool:
    """Whether no endpoint's address was its destination; False: endpoints are not known."""
    ends = question.ends
    if ends is None:
        return False
    translated = [one for one in rewrites(path) if one.of_destination]
    met = [(question.address, question.port), *((n.after.dst, n.after.dport) for n in translated)]
    return not any((dst, port) in ends or (dst, 0) in ends for dst, port in met)


def led_by(path: Path) -> tuple[str, str]:
    """(the rule that gave the packet its last destination, where: ``on node n1``, ``in pod a/b``);
    empty: none did."""
    last = next((one for one in reversed(rewrites(path)) if one.of_destination), None)
    if last is None:
        return "", ""
    place = f"in pod {last.pod}" if last.pod else f"on node {last.node}"
    return (last.rules[-1] if last.rules else last.named_by), place


def whose(question: Question, path: Path) -> str:
    """What is said of who took an astray connection: ``which is no endpoint of the Service``."""
    meant = meant_for(question, path)
    return f"which is not pod {meant}" if meant else NO_ENDPOINT


def led_to(path: Path) -> str:
    """``10.40.1.99:8080``: the last destination that a rule gave it; empty: none did."""
    last = next((one for one in reversed(rewrites(path)) if one.of_destination), None)
    if last is None:
        return ""
    host, port = last.after.dst, last.after.dport
    return (f"[{host}]" if host.version == 6 else str(host)) + (f":{port}" if port else "")
