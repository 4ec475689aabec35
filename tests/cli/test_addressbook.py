"""Whose an address is."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from gketrace.objects import Node
from gketrace_cli.addressbook import AddressBook

NODE = Node(
    name="a",
    uid="u",
    internal_ips=("10.142.0.8",),
    external_ips=(),
    hostname="a",
    pod_cidrs=("10.40.0.0/24", "fd00:40::/64"),
    ready=True,
    labels={},
    provider_id="",
)
SEEN = [ip_address(text) for text in ("10.40.0.1", "127.0.0.1", "fe80::1", "10.142.0.8")]


@pytest.mark.parametrize(
    ("address", "host", "stranger"),
    [
        ("10.142.0.8", "node/a", None),
        ("10.40.0.1", "node/a", None),  # its bridge's
        ("127.0.0.1", "", "outside"),  # whose, only the place of an entry tells
        ("10.40.0.99", "", "no pod now, in the range of node/a"),
        ("fd00:40::99", "", "no pod now, in the range of node/a"),
        ("224.0.0.22", "", "multicast group"),
        ("ff02::16", "", "multicast group"),
        ("203.0.113.10", "", "outside"),
    ],
)
def test_addresses_that_no_object_has(address: str, host: str, stranger: str | None) -> None:
    book = AddressBook(nodes=[NODE], pods=(), services=(), seen={"a": SEEN})
    found = ip_address(address)
    assert book.host(found) == host
    if stranger is not None:
        assert book.stranger(found) == stranger
