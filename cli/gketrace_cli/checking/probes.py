"""Which ways to trace in a check of the whole cluster.

All of them would be services × nodes × doors.  What differs from Service to Service is what
kube-proxy programmed, which is compared without a walk; what a walk is for is the way between
nodes and pods, and each front door's kind.  So: every pair of nodes once, every Service port once,
the doors from outside once for each Service, and one pod of each node to the outside.  What room is
left is for the same doors at the other nodes, as a rule of one node may take what is for a Service.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from itertools import zip_longest
from typing import Final

from gketrace.errors import GketraceError
from gketrace.objects import Endpoint, Node, Pod, Service
from gketrace.packet import Protocol, protocol_number
from gketrace_cli.frontdoors import Door, Question, Selection, Sender, questions

__all__ = ["AT_MOST", "OUTSIDE_PORT", "probes"]

AT_MOST: Final = 180
"""Ways that are traced."""
OUTSIDE_PORT: Final = 443
_PUBLIC: Final = {4: ip_address("8.8.8.8"), 6: ip_address("2001:4860:4860::8888")}
"""Public addresses, as ip-masq rules leave all reserved ranges alone.  Nothing is sent there."""


def probes(
    nodes: Sequence[Node],
    pods: Sequence[Pod],
    services: Sequence[Service],
    endpoints: Sequence[Endpoint],
    *,
    at_most: int = AT_MOST,
) -> tuple[tuple[tuple[Question, str], ...], int]:
    """(question, Service that it asks), and how many were left out."""
    mesh = [(question, "") for question in _mesh(nodes, pods, endpoints)]
    mesh += [(question, "") for question in _outside(nodes, pods)]
    doors, others = _doors(nodes, services, endpoints)
    # By turns, so that a cut leaves some of each kind.
    found = [one for pair in zip_longest(mesh, doors) for one in pair if one is not None]
    found += others
    asked = tuple((replace(one, use_conntrack=False), service) for one, service in found[:at_most])
    return asked, max(0, len(found) - at_most)


def _mesh(
    nodes: Sequence[Node], pods: Sequence[Pod], endpoints: Sequence[Endpoint]
) -> list[Question]:
    """From a pod of each node to a listening pod of each node, also its own."""
    listening: dict[str, list[Endpoint]] = {}
    for end in endpoints:
        if end.ready and end.pod and end.port and end.protocol == "TCP":
            listening.setdefault(end.node, []).append(end)
    own = {(f"{p.namespace}/{p.name}"): p for p in pods if not p.host_network and p.pod_ips}
    found: list[Question] = []
    for source in nodes:
        sender = next((p for p in own.values() if p.node == source.name), None)
        for target in nodes:
            ends = [
                e
                for e in listening.get(target.name, ())
                if e.address_type == "IPv4"
                and e.pod_key in own
                and (sender is None or e.pod_key != sender.key)
            ]
            if not ends:
                continue
            # Another pod each time, so that all nodes together meet many.
            end = ends[len(found) % len(ends)]
            found.append(
                Question(
                    door=Door.POD,
                    sender=Sender(
                        node=source.name,
                        pod=sender,
                        address=ip_address(sender.pod_ips[0]) if sender is not None else None,
                    ),
                    address=ip_address(end.address),
                    port=end.port,
                    protocol=protocol_number("tcp"),
                    pod=end.pod_key,
                )
            )
    return found


def _outside(nodes: Sequence[Node], pods: Sequence[Pod]) -> list[Question]:
    """From a pod of each node to an address that nobody in the cluster has."""
    found = []
    for node in nodes:
        sender = next(
            (p for p in pods if p.node == node.name and not p.host_network and p.pod_ips), None
        )
        if sender is None:
            continue
        source = ip_address(sender.pod_ips[0])
        found.append(
            Question(
                door=Door.ADDRESS,
                sender=Sender(node=node.name, pod=sender, address=source),
                address=_PUBLIC[source.version],
                port=OUTSIDE_PORT,
                protocol=Protocol.TCP,
            )
        )
    return found


def _doors(
    nodes: Sequence[Node], services: Sequence[Service], endpoints: Sequence[Endpoint]
) -> tuple[list[tuple[Question, str]], list[tuple[Question, str]]]:
    """Each port of each Service from one node, and each of its doors from outside once; and the
    same at the other nodes, one of each Service in turn."""
    by_service: dict[tuple[str, str], list[Endpoint]] = {}
    for end in endpoints:
        by_service.setdefault((end.namespace, end.service), []).append(end)
    found: list[tuple[Question, str]] = []
    others: list[list[tuple[Question, str]]] = []
    for turn, service in enumerate(services):
        mine = by_service.get((service.namespace, service.name), [])
        # Another node first each time.
        turned = [*nodes[turn % len(nodes) :], *nodes[: turn % len(nodes)]] if nodes else []
        try:
            asked, _ = questions(service, mine, turned, Selection())
        except GketraceError:
            continue  # no way in (headless without endpoints, ExternalName): nothing to trace
        first: dict[tuple[Door, str, int, int], Question] = {}
        for question in asked:
            key = (question.door, question.port_name, question.protocol, question.address.version)
            known = first.get(key)
            if known is None or (known.configured_drop and not question.configured_drop):
                first[key] = question
        found += [(question, service.key) for question in first.values()]
        chosen = {id(question) for question in first.values()}
        others.append([(q, service.key) for q in asked if id(q) not in chosen])
    turns = [one for turn in zip_longest(*others) for one in turn if one is not None]
    return found, turns
