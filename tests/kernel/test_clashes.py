"""Connections that wait for one and the same answer: the kernel changes a port, or drops one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from gketrace.packet import Packet, Protocol, TcpFlags
from gketrace.simulate.query import WalkQuery
from gketrace.simulate.walk import walk
from gketrace.trace import Walk
from tests.kernel.oracle import run
from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.fixtures import Case
from tests.kernel.oracle.run import rig, run_cases
from tests.kernel.oracle.view import DutView

SERVICE, POD = "10.43.240.10", "10.40.0.6"
RULES = f"*nat\n-A PREROUTING -d {SERVICE} -j DNAT --to-destination {POD}\nCOMMIT\n"
LENGTHS = {Protocol.TCP: 40, Protocol.UDP: 28, Protocol.GRE: 28}


def cases(bed: Bed) -> Iterator[Case]:
    """To the service's address and then to its endpoint, from the same port."""
    for protocol, length in LENGTHS.items():
        ports = protocol is not Protocol.GRE
        for port in range(5000, 5003):
            for where in (SERVICE, POD):
                packet = Packet(
                    src=ip_address("203.0.113.10"),
                    dst=ip_address(where),
                    protocol=protocol,
                    sport=port if ports else None,
                    dport=80 if ports else None,
                    tcp_flags=TcpFlags.SYN,
                    tcp_options=() if protocol is Protocol.TCP else None,
                    ttl=64,
                    length=length,
                    src_mac=bed.peer_mac("eth0"),
                )
                yield Case(ingress="eth0", packet=packet, label=f"to {where}/{protocol}")


def test_the_kernel_does_what_the_walk_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BATCH", 1)  # each walk sees the connections before it
    said: Counter[tuple[str, int]] = Counter()

    def asked(view: DutView, query: WalkQuery) -> Walk:
        walked = walk(view, query)
        for source in ("nf_nat_alloc_null_binding", "__nf_conntrack_confirm"):
            steps = (step for branch in walked.branches for step in branch.steps)
            if any(step.citation is not None and step.citation.text == source for step in steps):
                said[source, query.packet.protocol] += 1
        return walked

    with Bed() as bed:
        bed.command(["iptables-nft-restore"], text=RULES)
        with rig(bed, asked, legacy=False) as machine:
            tally = run_cases(machine, "clashes", cases(bed), 60)
    assert (len(tally.disagreements), tally.unknown, tally.lost) == (0, 0, 0), [
        *map(str, tally.disagreements[:2])
    ]
    assert said["nf_nat_alloc_null_binding", Protocol.TCP] >= 3
    assert said["nf_nat_alloc_null_binding", Protocol.UDP] >= 3
    assert said["__nf_conntrack_confirm", Protocol.GRE] >= 3
