"""Chains of one priority: every order is tried, and both are shown only where it matters."""

from __future__ import annotations

from typing import Any

from gketrace.simulate.order import MAX_ORDERS
from gketrace.trace import Disposition, StepKind
from tests.core.simulate.nft_tables import table
from tests.core.simulate.nodes import Node, one, tcp
from tests.core.simulate.small_nodes import ptp

D = Disposition
DROPS_MARKED = "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m mark --mark 0x1 -j DROP\nCOMMIT\n"
MARKS: Any = [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}]


def seen(node: Node) -> list[tuple[D, str, object]]:
    leaves = node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0").leaves()
    return [(leaf.outcome.disposition, leaf.branches[1].because, leaf.chance) for leaf in leaves]


def forward(*rules: Any, **more: Any) -> Any:
    return table(*rules, hook="forward", **more)


def test_where_the_order_decides_both_ways_are_shown() -> None:
    node = ptp()
    node.host.iptables(DROPS_MARKED).rulesets.append(forward(MARKS))
    told = "if {} runs before {} (they have one priority, and the order is not visible)"
    assert seen(node) == [
        (D.DELIVERED, told.format("iptables-nft filter", "nftables ip t"), None),
        (D.DROPPED, told.format("nftables ip t", "iptables-nft filter"), None),
    ]


def test_where_it_decides_nothing_there_is_one_way() -> None:
    drops: Any = [{"drop": None}]
    for rules in (
        ([{"counter": {"packets": 0, "bytes": 0}}],),
        (MARKS, drops),
        ([{"accept": None}],),
        (),
    ):
        node = ptp()
        node.host.iptables(DROPS_MARKED).rulesets.append(forward(*rules))
        leaf = one(node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0"))
        expected = D.DROPPED if drops in rules else D.DELIVERED
        assert (leaf.outcome.disposition, leaf.chance) == (expected, 1)


def test_two_translations_of_one_priority() -> None:
    node = ptp()
    node.pod("other", "10.40.0.7").listen("0.0.0.0", 8080)
    node.ptp("other", "10.40.0.1")
    node.host.iptables(
        "*nat\n:PREROUTING ACCEPT [0:0]\n"
        "-A PREROUTING -d 10.43.0.1/32 -p tcp -j DNAT --to-destination 10.40.0.6:8080\nCOMMIT\n"
    )
    to = {"dnat": {"addr": "10.40.0.7", "port": 8080}}
    node.host.rulesets.append(table([to], kind="nat", priority=-100))
    leaves = list(node.walk(tcp("10.142.0.9:4000", "10.43.0.1:80"), into="eth0").leaves())
    assert [str(leaf.outcome.packet.dst) for leaf in leaves] == ["10.40.0.6", "10.40.0.7"]
    assert all(leaf.chance is None for leaf in leaves)


def test_of_too_many_orders_none_is_taken() -> None:
    node = ptp()
    node.host.iptables(DROPS_MARKED)
    node.host.rulesets += [forward(MARKS) for _ in range(4)]
    assert MAX_ORDERS < 5 * 4 * 3 * 2
    walked = node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0")
    assert one(walked).outcome.disposition is D.UNKNOWN
    assert [missing.what for missing in walked.missing] == ["hooks"]
    steps = [step for branch in walked.branches for step in branch.steps]
    assert not any(step.kind is StepKind.RULE and step.hook == "FORWARD" for step in steps)
