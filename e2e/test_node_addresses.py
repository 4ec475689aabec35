"""IPv6 between nodes whose Node objects list IPv4 only: their agents say what they have."""

from __future__ import annotations

import pytest

from e2e.answers import Case, Desk, compare, run_cli
from e2e.conftest import LabFactory
from e2e.netlab import Probe
from gketrace.errors import ExitCode


@pytest.mark.parametrize(
    ("topology", "era", "backend"), [("bridge", "1.36", "nft"), ("ptp", "1.36", "legacy")]
)
def test_masqueraded_answers_find_their_way_back(
    labs: LabFactory, topology: str, era: str, backend: str
) -> None:
    lab = labs(topology, era, backend)
    whole = run_cli(lab, "service", "web6")
    assert whole.code == ExitCode.OK, whole.out
    cases, probes = [], []
    for node in lab.world.nodes:
        source = f"node/{node.short}"
        cases.append(
            Case(
                service="default/web6",
                source=source,
                door="clusterip",
                address="fd00:43::21",
                port=80,
            )
        )
        probes.append(Probe(source=source, address="fd00:43::21", port=80))
    with Desk(lab) as desk:
        said = desk.ask(cases)
    for case, result in zip(cases, lab.connect_all(probes), strict=True):
        assert said[case].code == ExitCode.OK, case.title
        assert compare(case, said[case], result) is None
        assert result.kind == "delivered"


def test_a_client_that_asks_a_nodes_ipv6_address(labs: LabFactory) -> None:
    lab = labs()
    for node in lab.world.nodes:
        ran = run_cli(lab, "trace", "2001:db8:113::10", f"[{node.ip6}]:30084", "-o", "json")
        assert ran.code == ExitCode.OK, ran.out
        assert f"{node.ip6} is on eth0 of node {node.name}, beside {node.ip}" in ran.out
        assert lab.connect("client", node.ip6, 30084).kind == "delivered"
