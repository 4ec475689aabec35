"""The main promise: what the CLI says becomes of a packet is what becomes of real packets.

Every front door of every service of the fixture, from clients outside, nodes and pods: first the
CLI is asked, then the packet is sent, and the two are compared: delivered to whom and with which
source address, refused and how, or lost.  Where the kernel draws lots, the real endpoint must be
one of those named, and those named are all that the Service promises.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.answers import Case, Desk, Said, compare, connect_all, meetings
from e2e.conftest import LabFactory
from e2e.netlab import Lab, Probe, Result
from e2e.netlab.expect import Door, Source, doors, expect, sources
from e2e.netlab.network import CLIENTS

KINDS = [
    ("ptp", "1.36", "legacy"),
    ("bridge", "1.20", "legacy"),
    ("ptp", "1.30", "nft"),
    ("bridge", "1.36", "nftables"),
]
"""Beside bridge, 1.36, nft: there every source tries every door."""


def make_case(source: Source, door: Door) -> Case:
    """How the question is typed: clients outside say which node they reach."""
    outside = source.node is None
    entry = door.entry if outside or door.kind == "nodeport" else None
    return Case(
        service=door.service,
        source=source.ip if outside else source.title,
        door=door.kind,
        address=door.address,
        port=door.port,
        protocol=door.protocol,
        node=entry or "",
    )


PODS = ("hello-server-579859fb5b-szrwh", "web-0", "web-1", "edge-0")
"""Pods that send: each is the endpoint of some service, on its node or on another."""


def all_pairs(lab: Lab) -> list[tuple[Source, Door]]:
    front_doors = doors(lab.world, lab.state["lb_targets"])
    everybody = [s for s in sources(lab.world) if s.pod is None or s.pod.name in PODS]
    return [(source, door) for source in everybody for door in front_doors]


def some_pairs(lab: Lab, turn: int) -> list[tuple[Source, Door]]:
    """Each door from a client, a node and a pod; which ones goes round with the door and `turn`."""
    everybody = sources(lab.world)
    clients = [s for s in everybody if s.node is None]
    nodes = [s for s in everybody if s.node is not None and s.pod is None]
    pods = [s for s in everybody if s.pod is not None]
    pairs = []
    for number, door in enumerate(doors(lab.world, lab.state["lb_targets"]), turn):
        chosen = (
            clients[number % len(clients)],
            nodes[number % len(nodes)],
            pods[number % len(pods)],
        )
        pairs += [(source, door) for source in chosen]
    return pairs


def differences(lab: Lab, pairs: list[tuple[Source, Door]]) -> list[str]:
    """Asks, sends, compares."""
    cases = [make_case(source, door) for source, door in pairs]
    with Desk(lab) as desk:
        said = desk.ask(cases)
    probes = [
        Probe(source=s.title, address=d.address, port=d.port, protocol=d.protocol) for s, d in pairs
    ]

    def judged(number: int, result: Result) -> str | None:
        return compare(cases[number], said[cases[number]], result)

    results = connect_all(lab, probes, judged)
    found = []
    for number, ((source, door), case) in enumerate(zip(pairs, cases, strict=True)):
        wrong = judged(number, results[number])
        wrong = wrong or promise(lab, source, door, case, said[case])
        if wrong:
            found.append(wrong)
    return found


def promise(lab: Lab, source: Source, door: Door, case: Case, said: Said) -> str | None:
    """None when the pods that the CLI names are all that the Service promises, and their
    probabilities add up to 1."""
    chances = [path["probability"] for path in said.paths]
    if None in chances:
        return None  # the network chooses a node, by nothing that can be seen
    if abs(sum(chances) - 1) > 1e-6:
        return f"{case.title}: the probabilities are {chances}"
    expected = expect(lab.world, lab.topology, source, door)
    met = meetings(said, case.protocol)
    named = {m.pod for m in met if m.kind == "delivered"}
    pods = {pod.key for pod in lab.world.pods if not pod.host_network} & set(expected.pods)
    sticky = any(
        service["spec"].get("sessionAffinity") == "ClientIP"
        for service in lab.world.services
        if service["metadata"]["name"] == door.service.split("/")[1]
    )
    named -= {""}
    if named == pods or (sticky and named and named < pods):
        return None
    # An earlier connection may have pinned the client to the endpoint whose answer is lost.
    if sticky and expected.may_time_out and {m.kind for m in met} == {"timeout"}:
        return None
    return f"{case.title}: named {sorted(named)}, the Service has {sorted(pods)}"


def test_every_door_from_everywhere(lab: Lab) -> None:
    pairs = all_pairs(lab)
    assert len(pairs) > 400
    found = differences(lab, pairs)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("topology", "era", "backend", "turn"), [(*kind, turn) for turn, kind in enumerate(KINDS)]
)
def test_every_door_of_other_clusters(
    labs: LabFactory, topology: str, era: str, backend: str, turn: int
) -> None:
    lab = labs(topology, era, backend)
    found = differences(lab, some_pairs(lab, turn))
    assert not found, "\n".join(found)


def test_affinity_is_read_from_the_kernel(lab: Lab) -> None:
    """Once a client has an endpoint, the CLI names that one alone, and it is where packets go."""
    pairs = [
        (source, door)
        for source, door in all_pairs(lab)
        if door.service in ("default/web-affinity", "default/lb-affinity-local")
    ]
    cases = [make_case(source, door) for source, door in pairs]
    probes = [
        Probe(source=s.title, address=d.address, port=d.port, protocol=d.protocol) for s, d in pairs
    ]
    lab.connect_all(probes)
    with Desk(lab) as desk:
        said = desk.ask(cases)
    compared = 0
    for case, result in zip(cases, lab.connect_all(probes), strict=True):
        problem = compare(case, said[case], result)
        assert problem is None, problem
        if result.kind == "delivered":
            assert len(said[case].paths) == 1, case.title
            compared += 1
    assert compared > 20


def test_headless_service(lab: Lab) -> None:
    """A headless Service has no address: its endpoints' own are followed."""
    pods = [pod for pod in lab.world.pods if pod.name in ("web-0", "web-1", "web-2")]
    cases, probes = [], []
    for source in sources(lab.world):
        for pod in pods:
            text = source.ip if source.node is None else source.title
            cases.append(
                Case(
                    service="default/headless",
                    source=text,
                    door="pod",
                    address=pod.ip,
                    port=8080,
                )
            )
            probes.append(Probe(source=source.title, address=pod.ip, port=8080))
    with Desk(lab) as desk:
        said = desk.ask(cases)
    found = [
        problem
        for case, result in zip(cases, lab.connect_all(probes), strict=True)
        if (problem := compare(case, said[case], result))
    ]
    assert not found, "\n".join(found)


@pytest.fixture
def dual_stack(labs: LabFactory) -> Iterator[tuple[Lab, ...]]:
    """Labs whose Node objects list the IPv6 address that the nodes have, as a dual-stack cluster's
    do; the fixture's kubelets were never told."""
    found = (labs("bridge", "1.36", "nft"), labs("ptp", "1.36", "legacy"))
    before = []
    for lab in found:
        for node in lab.world.nodes:
            path = f"/api/v1/nodes/{node.name}"
            stored = lab.api("GET", path)
            before.append((lab, path, stored["status"]["addresses"]))
            addresses = [
                *stored["status"]["addresses"],
                {"type": "InternalIP", "address": node.ip6},
            ]
            lab.api(
                "PUT",
                f"{path}/status",
                {**stored, "status": {**stored["status"], "addresses": addresses}},
            )
    yield found
    for lab, path, addresses in before:
        stored = lab.api("GET", path)
        lab.api(
            "PUT",
            f"{path}/status",
            {**stored, "status": {**stored["status"], "addresses": addresses}},
        )


def test_ipv6(dual_stack: tuple[Lab, ...]) -> None:
    """The dual-stack Service by its IPv6 ClusterIP and by node port on every node."""
    for lab in dual_stack:
        world = lab.world
        pods = [pod for pod in world.pods if pod.ip6]
        inside = [f"node/{node.short}" for node in world.nodes] + [f"pod/{p.key}" for p in pods]
        outside = {CLIENTS[address]: f"client/{address}" for address in CLIENTS}
        cases, probes = [], []
        for node in world.nodes:
            for text in (*inside, *outside):
                cases.append(
                    Case(
                        service="default/web6",
                        source=text,
                        door="nodeport",
                        address=node.ip6,
                        port=30084,
                        node=node.name,
                    )
                )
                source = outside.get(text, text)
                probes.append(Probe(source=source, address=node.ip6, port=30084))
        for text in inside:
            cases.append(
                Case(
                    service="default/web6",
                    source=text,
                    door="clusterip",
                    address="fd00:43::21",
                    port=80,
                )
            )
            probes.append(Probe(source=text, address="fd00:43::21", port=80))
        with Desk(lab) as desk:
            said = desk.ask(cases)
        found = [
            problem
            for case, result in zip(cases, lab.connect_all(probes), strict=True)
            if (problem := compare(case, said[case], result))
        ]
        assert not found, "\n".join(found)
        assert {m.kind for case in cases for m in meetings(said[case], "TCP")} == {"delivered"}
