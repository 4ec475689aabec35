"""Two connections that wait for one and the same answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.packet import Packet
from gketrace.trace import Disposition
from tests.core.simulate.nodes import Table, one, tcp
from tests.core.simulate.small_nodes import DNAT, ptp

D = Disposition
DIRECT = tcp("10.142.0.9:40000", "10.40.0.6:8080")


def entry(packet: Packet) -> ConntrackEntry:
    """A connection to the Service's address that ends at the pod, as `packet` would."""
    service = replace(packet, dst=tcp("0.0.0.0:1", "10.43.0.1:80").dst)
    if packet.has_ports:
        service = replace(service, dport=80)
    status = int(CtStatus.DST_NAT | CtStatus.DST_NAT_DONE | CtStatus.CONFIRMED)
    return ConntrackEntry(orig=service.tuple5, reply=packet.tuple5.inverted(), status=status)


def test_where_nat_is_the_source_port_changes() -> None:
    node = ptp()
    node.host.iptables(DNAT)
    node.host.conntrack = Table(entry(DIRECT))
    leaf = one(node.walk(DIRECT, into="eth0"))
    assert leaf.outcome.disposition is D.DELIVERED
    assert (str(leaf.outcome.packet.src), leaf.outcome.packet.sport) == ("10.142.0.9", None)
    assert any(
        "nf_nat_alloc_null_binding" in str(s.citation) for b in leaf.branches for s in b.steps
    )


@pytest.mark.parametrize(
    ("packet", "rules"),
    [
        # Nothing to change: no ports, or no NAT.
        (replace(DIRECT, protocol=47, sport=None, dport=None), DNAT),
        (DIRECT, "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m state --state NEW\nCOMMIT\n"),
    ],
)
def test_where_nothing_can_change_the_second_is_lost(packet: Packet, rules: str) -> None:
    node = ptp()
    node.host.iptables(rules)
    node.host.conntrack = Table(entry(packet))
    leaf = one(node.walk(packet, into="eth0"))
    assert leaf.outcome.disposition is D.DROPPED
    assert leaf.outcome.citation is not None
    assert leaf.outcome.citation.text == "__nf_conntrack_confirm"
    assert "would belong to another connection" in leaf.outcome.detail
    # Its own second packet finds its own entry.
    node.host.conntrack = Table(replace(entry(packet), orig=packet.tuple5))
    assert one(node.walk(packet, into="eth0")).outcome.disposition is not D.DROPPED
