"""What nft leaves out of its listing is read from the kernel and put back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gketrace.errors import ParseError
from gketrace.ruleset.nft import NftTest
from gketrace.ruleset.nft_json import parse_nft_json, with_tests
from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket
from gketrace_agent.kernel.nfnetlink import NftTable
from gketrace_agent.kernel.nft_tests import nft_tests
from tests.agent.observe.bed import Bed
from tests.agent.observe.conftest import bed as bed  # a fixture


def equal(kind: str, name: str, right: int) -> Any:
    left = (
        {"payload": {"protocol": kind, "field": name}}
        if kind in ("ip", "ip6", "ether")
        else ({kind: {"key": name}})
    )
    return {"match": {"op": "==", "left": left, "right": right}}


RULES: dict[str, list[tuple[Any, int]]] = {
    "ct l3proto ipv6 reject": [(equal("ct", "l3proto", 10), 0)],
    "meta protocol ip ip6 saddr fd00::/16 accept": [
        (equal("meta", "protocol", 0x800), 0),
        (equal("meta", "nfproto", 10), 0),
    ],
    "meta iiftype ether ether type ip6 ip6 nexthdr 6 tcp dport 80 drop": [
        (equal("meta", "iiftype", 1), 0),
        (equal("ether", "type", 0x86DD), 0),
        (equal("ip6", "nexthdr", 6), 0),
    ],
    "ip protocol 17 udp sport 53": [
        (equal("meta", "nfproto", 2), 0),
        (equal("ip", "protocol", 17), 0),
    ],
    "meta mark set 0x1 ct mark set 0x2 add @seen { ip saddr } reject with tcp reset": [
        # nft puts this test first by itself.
        (equal("meta", "l4proto", 6), 0),
        (equal("meta", "nfproto", 2), 2),
    ],
    # Not for equality, not of one value, not of these fields, not the bare field.
    "meta protocol != ip6 accept": [],
    "meta l4proto { 6, 17 } accept": [],
    "meta mark 0x1 ct state new accept": [],
    "meta l4proto & 0x7 == 6 accept": [],
}  # fmt: skip


def test_tests_are_those_that_the_kernel_makes(bed: Bed) -> None:
    netns = bed.netns("tests")
    lines = ["add table inet t", "add set inet t seen { type ipv4_addr; flags dynamic; }"]
    lines += ["add chain inet t c { type filter hook input priority 0; }"]
    netns.run(
        "nft", "-f", "-", stdin="\n".join([*lines, *(f"add rule inet t c {r}" for r in RULES)])
    )
    netfilter = netns.inside(lambda: NetlinkSocket(NETLINK_NETFILTER))
    try:
        found = nft_tests(netfilter, NftTable(family="inet", name="t"))
    finally:
        netfilter.close()
    items = netns.json("nft", "-j", "list", "table", "inet", "t")["nftables"]
    handles = [item["rule"]["handle"] for item in items if "rule" in item]
    got = {
        text: [(test.statement, test.after) for test in found.get(handle, ())]
        for text, handle in zip(RULES, handles, strict=True)
    }
    assert got == RULES


def test_they_stand_behind_what_changes_something_before_them() -> None:
    own = {"family": "ip", "table": "t"}
    rule = {**own, "chain": "c", "handle": 3, "expr": [{"notrack": None}, {"accept": None}]}
    text = json.dumps({"nftables": [{"chain": {**own, "name": "c", "handle": 2}}, {"rule": rule}]})
    first, second, third = (NftTest(statement={"n": n}, after=n) for n in range(3))
    tests = {3: (first, second, third)}
    for tables in (
        parse_nft_json(text.encode(), source="s", taken_at=0.0, tests=tests),
        # As it goes over the wire.
        parse_nft_json(with_tests(text.encode(), "ip", "t", tests), source="s", taken_at=0.0),
    ):
        chain = tables.rulesets[0].chain("c")
        assert chain is not None
        # nft shows one change; a test after a second one is not understood.
        assert [list(s.items()) for s in chain.rules[0].statements] == [
            [("unlisted", {"n": 2})],
            [("n", 0)],
            [("notrack", None)],
            [("n", 1)],
            [("accept", None)],
        ]


@pytest.mark.parametrize("tests", ["3", '{"x": []}', '{"3": [[1]]}', '{"3": 4}'])
def test_tests_of_another_shape_are_refused(tests: str) -> None:
    own = f'{{"family": "ip", "table": "t", "tests": {tests}}}'
    text = f'{{"nftables": [{{"kernel tests": {own}}}]}}'
    with pytest.raises(ParseError, match="no tests"):
        parse_nft_json(text.encode(), source="s", taken_at=0.0)
