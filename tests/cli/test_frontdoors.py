"""A Service's doors, over the real world's Services."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from gketrace.errors import NotFoundError, UnsupportedError
from gketrace.objects import Node
from gketrace_cli.frontdoors import (
    NODES_AT_MOST,
    Door,
    Question,
    Selection,
    Sender,
    questions,
)
from gketrace_cli.object_json import parse_endpointslice, parse_node, parse_service

WORLD = Path(__file__).parents[1] / "data/worlds/kube-proxy-1.36-iptables-nft"
PREFIX = "gke-lab-cluster-default-pool-9e4ce61e-"


def items(stem: str) -> list[dict[str, Any]]:
    text = (WORLD / f"{stem}.json").read_text().replace(PREFIX, "")
    found: list[dict[str, Any]] = json.loads(text)["items"]
    return found


SERVICES = {s.name: s for s in map(parse_service, items("services"))}
ENDPOINTS = [e for obj in items("endpointslices") for e in parse_endpointslice(obj)]
NODES = [parse_node(obj) for obj in items("nodes")]
OUTSIDE = Sender(address=ip_address("192.0.2.10"))


def ask(
    name: str, nodes: Iterable[Node] = NODES, **chosen: Any
) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    mine = [e for e in ENDPOINTS if e.service == name]
    return questions(SERVICES[name], mine, list(nodes), Selection(**chosen))


def brief(name: str, **chosen: Any) -> list[str]:
    return [
        f"{q.door.value} {q.address}:{q.port} {q.sender.text} {q.entry or '-'}"
        for q in ask(name, **chosen)[0]
    ]


def test_all_doors_of_a_load_balancer() -> None:
    asked, skipped = ask("hello-server")
    assert skipped == ()
    doors = [q.door for q in asked]
    assert [doors.count(d) for d in (Door.CLUSTER_IP, Door.NODE_PORT, Door.LOAD_BALANCER)] == [
        3,
        3,
        3,
    ]
    ports = [q for q in asked if q.door is Door.NODE_PORT]
    assert {(q.via, q.has_endpoint) for q in ports} == {
        ("2jdh", True),
        ("m69d", False),
        ("33fg", False),
    }
    assert all(q.sender.assumed for q in asked)


def test_what_is_chosen_narrows() -> None:
    node = Sender(node="m69d")
    assert brief("hello-server", door=Door.NODE_PORT, node="2jdh", senders=(node,)) == [
        "NodePort 10.142.0.8:31830 node/m69d -"
    ]
    assert brief("hello-server", door=Door.LOAD_BALANCER, node="33fg") == [
        "LoadBalancer 35.231.121.11:80 client 203.0.113.10 33fg"
    ]
    assert [q.port_name for q in ask("web", port="metrics")[0]] == ["metrics"] * 3
    assert [q.port for q in ask("web", port="9090")[0]] == [9090] * 3


def test_a_local_load_balancer_goes_to_nodes_with_an_endpoint() -> None:
    assert brief("web-lb-local", door=Door.LOAD_BALANCER) == [
        "LoadBalancer 35.231.121.12:80 client 203.0.113.10 m69d"
    ]


def test_drops_that_the_service_asks_for() -> None:
    def reasons(name: str, **chosen: Any) -> set[tuple[str, bool]]:
        return {(q.configured_drop, q.asked) for q in ask(name, **chosen)[0]}

    local = "externalTrafficPolicy is Local and node 33fg has no endpoint"
    by_port = Door.NODE_PORT
    assert (local, False) in reasons("web-lb-local", door=by_port)
    assert reasons("web-lb-local", door=by_port, node="33fg") == {(local, True)}
    ranges = reasons("web-lb-sources", door=Door.LOAD_BALANCER, senders=(OUTSIDE,))
    assert ranges == {("192.0.2.10 is outside loadBalancerSourceRanges", True)}
    assert reasons("web-lb-sources", door=by_port, senders=(OUTSIDE,)) == {("", False)}
    internal = "internalTrafficPolicy is Local and node 2jdh has no endpoint"
    assert (internal, False) in reasons("web-internal-local")
    assert reasons("nobody") == {("", False)}


def test_a_headless_service_is_its_endpoints() -> None:
    asked, _ = ask("headless", senders=(OUTSIDE,))
    assert {(q.door, str(q.address), q.entry) for q in asked} == {
        (Door.POD, "10.40.0.10", "2jdh"),
        (Door.POD, "10.40.1.10", "m69d"),
        (Door.POD, "10.40.2.10", "33fg"),
    }


def test_a_cluster_ip_is_not_for_clients_outside_unless_asked_for() -> None:
    asked, skipped = ask("hello-server", senders=(OUTSIDE,))
    assert Door.CLUSTER_IP not in {q.door for q in asked}
    assert "is not traced from client 192.0.2.10" in skipped[0]
    assert brief("hello-server", door=Door.CLUSTER_IP, senders=(OUTSIDE,)) == [
        "ClusterIP 10.43.246.223:80 client 192.0.2.10 -"
    ]
    assert [q.door for q in ask("web", senders=(OUTSIDE,), port="http")[0]] == [Door.CLUSTER_IP]


def test_both_families_and_the_external_ip() -> None:
    assert {q.address.version for q in ask("web6", door=Door.CLUSTER_IP)[0]} == {4, 6}
    external, _ = ask("web-external-ip", door=Door.EXTERNAL_IP)
    assert {(str(q.address), q.entry) for q in external} == {
        ("192.0.2.50", "2jdh"),
        ("192.0.2.50", "m69d"),
        ("192.0.2.50", "33fg"),
    }
    assert all(q.notes for q in external)


def test_a_large_cluster_is_sampled_with_both_kinds_of_nodes() -> None:
    many = [*NODES, *(replace(NODES[0], name=f"n{i}") for i in range(100))]
    asked, _ = ask("hello-server", many, door=Door.NODE_PORT)
    assert len(asked) == NODES_AT_MOST
    assert {q.has_endpoint for q in asked} == {True, False}


def test_endpoints_on_their_way_out_are_said() -> None:
    """kube-proxy falls back on them: the Service answers, and not for long."""
    web = [e for e in ENDPOINTS if e.service == "web" and e.port_name == "http"]
    leaving = [replace(e, ready=False, serving=True, terminating=True) for e in web]
    selection = Selection(port="http")
    _, skipped = questions(SERVICES["web"], leaving, NODES, selection)
    pods = ", ".join(sorted(e.pod for e in web))
    assert skipped == (
        "No endpoint of port 80 (http) is ready: kube-proxy uses what is terminating and still "
        f"serves: {pods}.",
    )
    assert questions(SERVICES["web"], [*leaving[1:], web[0]], NODES, selection)[1] == ()


def test_nothing_to_follow() -> None:
    with pytest.raises(NotFoundError, match="has no NodePort; its doors: ClusterIP"):
        ask("web", door=Door.NODE_PORT)
    with pytest.raises(NotFoundError, match=r"has no port 'x'; it has 80 .http./tcp, 9090"):
        ask("web", port="x")
    dns = replace(SERVICES["web"], type="ExternalName", external_name="example.org")
    with pytest.raises(UnsupportedError, match=r"DNS name for example\.org") as raised:
        questions(dns, [], NODES, Selection())
    assert raised.value.hint == "gketrace trace SOURCE to an address of example.org"
