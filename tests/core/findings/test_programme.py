"""What kube-proxy programmed, read from the rules of every era, is what the objects ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gketrace.findings.expected import expected
from gketrace.findings.programme import read_programme
from gketrace.kubenames import ServicePort
from gketrace.ruleset import Ruleset
from gketrace.ruleset.iptables_save import parse_iptables_save
from gketrace.ruleset.nft_json import parse_nft_json
from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.trace import NetnsRef
from gketrace_cli.object_json import parse_endpointslice, parse_service

WORLDS = Path(__file__).parents[2] / "data/worlds"
NONE = Unavailable(reason="not read")
DUAL = ("kube-proxy-1.30", "kube-proxy-1.36")


def _host(folder: Path) -> NetnsSnapshot:
    sets: list[Ruleset] = []
    for name, family in (("iptables-save.txt", 4), ("ip6tables-save.txt", 6)):
        path = folder / name
        if path.exists() and path.read_bytes().strip():
            sets.append(
                parse_iptables_save(
                    path.read_bytes(), source=name, family=family, backend="iptables-nft"
                )
            )
    for path in folder.glob("nft*.json"):
        sets += parse_nft_json(path.read_bytes(), source=path.name, taken_at=0.0).rulesets
    return NetnsSnapshot(
        netns=NetnsRef(node=folder.name),
        links=NONE,
        addresses=NONE,
        routes=NONE,
        rules=NONE,
        neighbours=NONE,
        fdb=NONE,
        sysctls=NONE,
        sockets=NONE,
        rulesets=tuple(sets),
        conntrack=NONE,
    )


def _items(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())["items"]


@pytest.mark.parametrize("world", sorted(p.name for p in WORLDS.glob("kube-proxy-*")))
def test_rules_and_objects_agree(world: str) -> None:
    folder = WORLDS / world
    services = [parse_service(item) for item in _items(folder, "services")]
    ends = [e for item in _items(folder, "endpointslices") for e in parse_endpointslice(item)]
    wanted = expected(services, ends)
    families = (4, 6) if world.startswith(DUAL) else (4,)
    seen = 0
    for node in folder.glob("node-*"):
        programme = read_programme(_host(node))
        assert programme.present
        for name, one in wanted.items():
            for family in set(families) & set(one.families):
                there = programme.endpoints(name, family)
                if one.service.internal_traffic_policy == "Local" or one.hinted:
                    assert (there or frozenset()) <= one.addresses(family)
                    continue
                assert (there or frozenset()) == one.addresses(family), name
                seen += 1
                if there:
                    assert programme.cite(name, family) is not None
                    assert programme.cite_endpoint(min(there)) is not None
    assert seen > 40


def test_a_service_that_the_rules_do_not_know() -> None:
    programme = read_programme(_host(WORLDS / "kube-proxy-1.36-iptables-nft" / "node-2jdh"))
    name = ServicePort(namespace="default", service="absent", port="http")
    assert programme.endpoints(name, 4) is None
    assert "KUBE-SVC-" in programme.cite_absence(name, 4).text
