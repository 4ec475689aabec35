"""What people type, and who is meant."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from gketrace.errors import NotFoundError, UsageError
from gketrace.objects import Node
from gketrace_cli.names import (
    Kind,
    close_names,
    find_node,
    parse_named,
    parse_pod_name,
    short_names,
)

POOL = "gke-lab-cluster-default-pool-9e4ce61e-"


def node(name: str, ip: str) -> Node:
    return Node(
        name=name,
        uid="",
        internal_ips=(ip,),
        external_ips=(),
        hostname=name,
        pod_cidrs=(),
        ready=True,
        labels={},
        provider_id="",
    )


NODES = [
    node(f"{POOL}2jdh", "10.142.0.8"),
    node(f"{POOL}m69d", "10.142.0.6"),
    node("gke-other-m69d", "10.142.0.9"),
]


@pytest.mark.parametrize(
    ("text", "kind", "namespace", "name", "port", "protocol"),
    [
        ("pod/web-0", Kind.POD, "", "web-0", "", None),
        ("pods/shop/web-0:http", Kind.POD, "shop", "web-0", "http", None),
        ("po/web-0:53/UDP", Kind.POD, "", "web-0", "53", 17),
        ("svc/web", Kind.SERVICE, "", "web", "", None),
        ("service/shop/web:80", Kind.SERVICE, "shop", "web", "80", None),
        ("node/2jdh:31830", Kind.NODE, "", "2jdh", "31830", None),
        ("node/10.142.0.8:31830", Kind.NODE, "", "10.142.0.8", "31830", None),
        ("node/2jdh/icmp", Kind.NODE, "", "2jdh", "", 1),
        ("pod/tcp", Kind.POD, "", "tcp", "", None),
    ],
)
def test_names(
    text: str, kind: Kind, namespace: str, name: str, port: str, protocol: int | None
) -> None:
    named = parse_named(text)
    assert (named.kind, named.namespace, named.name) == (kind, namespace, name)
    assert (named.port, named.protocol) == (port, protocol)


@pytest.mark.parametrize(
    ("text", "address", "port", "protocol"),
    [
        ("10.0.0.1", "10.0.0.1", "", None),
        ("10.0.0.1:53/udp", "10.0.0.1", "53", 17),
        ("10.0.0.1/icmp", "10.0.0.1", "", 1),
        ("fd00::1", "fd00::1", "", None),
        ("[fd00::1]", "fd00::1", "", None),
        ("[fd00::1]:80", "fd00::1", "80", None),
    ],
)
def test_addresses(text: str, address: str, port: str, protocol: int | None) -> None:
    named = parse_named(text)
    assert (named.kind, named.address) == (Kind.ADDRESS, ip_address(address))
    assert (named.port, named.protocol) == (port, protocol)


@pytest.mark.parametrize(
    "text",
    [
        *("web-0", "", "deploy/web", "pod/", "pod/a/b/c", "pod/A_B", "node/ns/x", "[fd00::zz]:1"),
        *("10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:-1", "example.org:80"),
    ],
)
def test_what_makes_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        parse_named(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web-0", ("default", "web-0")),
        ("pod/web-0", ("default", "web-0")),
        ("shop/web-0", ("shop", "web-0")),
        ("pod/shop/web-0", ("shop", "web-0")),
    ],
)
def test_pod_names(text: str, expected: tuple[str, str]) -> None:
    assert parse_pod_name(text, "default") == expected


@pytest.mark.parametrize("text", ["", "a/b/c", "svc/web", "A"])
def test_wrong_pod_names(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pod_name(text, "default")


@pytest.mark.parametrize("text", [f"{POOL}2jdh", "2jdh", "9e4ce61e-2jdh", "10.142.0.8", "dh"])
def test_a_node_by_name_suffix_or_address(text: str) -> None:
    assert find_node(text, NODES).name == f"{POOL}2jdh"


def test_a_suffix_that_fits_two_nodes_is_refused() -> None:
    with pytest.raises(UsageError, match="not unique; it fits"):
        find_node("m69d", NODES)


def test_an_unknown_node_lists_those_there_are() -> None:
    with pytest.raises(NotFoundError, match="no node 'zz' in the cluster; there is gke-"):
        find_node("zz", NODES)


def test_short_names_are_unique_suffixes() -> None:
    assert list(short_names(n.name for n in NODES).values()) == [
        "2jdh",
        "9e4ce61e-m69d",
        "other-m69d",
    ]
    assert short_names(["a", "b"]) == {"a": "a", "b": "b"}


def test_close_names() -> None:
    assert close_names("hello", ["hello-server", "web"]) == "did you mean hello-server?"
    assert close_names("wbe", ["web", "x"]) == "did you mean web?"
    assert close_names("q", ["b", "a"]) == "there is a, b"
    assert close_names("q", list("abcdef")) == "there are 6, none with a name like it"
    assert close_names("q", []) == "there is none"
