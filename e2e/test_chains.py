"""The tutorial's walk through the chains, as the CLI cites it, and what the kernel tracks.

The chains and their order are those of the fixtures' own rules (kube-proxy's output); the rewrites
of a trace are held against the conntrack entries of a real connection on each node it crosses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.answers import chains, document, run_cli, steps
from e2e.conftest import LabFactory
from e2e.netlab import Hold, Lab
from gketrace.errors import ExitCode

SVC = "KUBE-SVC-7D6H5YV7GTUSLGXR"
EXT = "KUBE-EXT-7D6H5YV7GTUSLGXR"
SEP = "KUBE-SEP-GNGNYGTEG254KWMX"
POD = "default/hello-server-579859fb5b-szrwh"
ENDPOINT = f"pod/{POD} 10.40.0.6:8080"
MAIN = ("service", "hello-server", "--via", "nodeport", "--from", "node/m69d", "--node", "2jdh")


def in_order(wanted: list[str], found: list[str]) -> bool:
    """True when `found` holds `wanted` in this order, with anything between."""
    rest = iter(found)
    return all(name in rest for name in wanted)


def only_path(lab: Lab, *arguments: str) -> dict[str, Any]:
    ran = run_cli(lab, *arguments, "-o", "json")
    assert ran.code == ExitCode.OK, ran
    answer = document(ran)
    assert answer["complete"]
    assert answer["missing"] == []
    (path,) = answer["paths"]
    return dict(path)


def nat_steps(path: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(node's suffix, before, after) of each rewrite, as ``src>dst``; ``*``: the kernel picks."""

    def text(packet: dict[str, Any]) -> str:
        sport = packet["sport"] or "*"
        return f"{packet['src']}:{sport}>{packet['dst']}:{packet['dport']}"

    return [
        (s["node"][-4:], text(s["before"]), text(s["after"]))
        for s in steps(path)
        if s["kind"] == "nat" and s["action"] == "rewrite"
    ]


def test_node_port_on_the_endpoints_node(lab: Lab) -> None:
    # A bridge forgets an address that has been quiet for five minutes.
    lab.exec("node/2jdh", ["ping", "-c1", "-W5", "10.40.0.6"])
    path = only_path(lab, *MAIN)
    assert (path["frontDoor"], path["outcome"]) == ("NodePort", "delivered")
    assert (path["endpoint"], path["sourceSeen"]) == (ENDPOINT, "10.40.0.1")
    assert path["probability"] == 1
    assert in_order(
        [
            "PREROUTING",
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            EXT,
            "KUBE-MARK-MASQ",
            EXT,
            SVC,
            SEP,
            "FORWARD",
            "KUBE-FORWARD",
            "POSTROUTING",
            "KUBE-POSTROUTING",
        ],
        chains(path, "2jdh"),
    )
    assert nat_steps(path) == [
        ("2jdh", "10.142.0.6:61234>10.142.0.8:31830", "10.142.0.6:61234>10.40.0.6:8080"),
        ("2jdh", "10.142.0.6:61234>10.40.0.6:8080", "10.40.0.1:*>10.40.0.6:8080"),
    ]
    dnat = [s for s in steps(path) if s["chain"] == SEP and "DNAT" in (s["rule"] or "")]
    assert dnat
    assert "--to-destination 10.40.0.6:8080" in dnat[0]["rule"]
    masquerade = [
        s for s in steps(path) if s["chain"] == "KUBE-POSTROUTING" and "MASQ" in s["rule"]
    ]
    assert masquerade[-1]["after"]["src"] == "10.40.0.1"
    link = json.loads(lab.exec(f"pod/{POD}", ["ip", "-j", "link", "show", "eth0"]).stdout)
    mac = link[0]["address"]
    veth = lab.exec("node/2jdh", ["bridge", "fdb", "get", mac, "br", "cbr0"]).stdout
    bridged = [s for s in steps(path) if s["kind"] == "bridge"]
    assert bridged[0]["interface"] == veth.split()[2]
    hops = [(hop["node"] and hop["node"][-4:], hop["netns"]) for hop in path["hops"]]
    assert hops == [("m69d", "host"), (None, None), ("2jdh", "host"), ("2jdh", f"pod/{POD}")]
    assert steps(path)[-1]["kind"] == "socket"


def test_every_cited_rule_is_the_kernels(lab: Lab) -> None:
    """Position and text of each rule are what iptables-save on that node says."""
    path = only_path(lab, *MAIN)
    cited = [s for s in steps(path) if s["rule"] and s["citation"]["source"] == "rule"]
    assert len(cited) > 12
    rules: dict[tuple[str, str, str], list[str]] = {}
    for node in ("2jdh", "m69d"):
        table = ""
        for line in lab.exec(f"node/{node}", ["iptables-nft-save"]).stdout.splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith("-A "):
                rules.setdefault((node, table, line.split()[1]), []).append(line)
    for step in cited:
        own = rules[step["node"][-4:], step["table"], step["chain"]]
        assert own[step["position"] - 1] == step["rule"], step


def test_node_port_through_a_node_without_the_endpoint(lab: Lab) -> None:
    """Two nodes' hops in one path: the first rewrites and masquerades, the second hands over."""
    path = only_path(
        lab,
        "service",
        "hello-server",
        "--via",
        "nodeport",
        "--from",
        "10.142.0.2",
        "--node",
        "33fg",
    )
    assert (path["endpoint"], path["sourceSeen"]) == (ENDPOINT, "10.142.0.7")
    assert [(hop["node"] and hop["node"][-4:], hop["netns"]) for hop in path["hops"]] == [
        (None, None),
        ("33fg", "host"),
        (None, None),
        ("2jdh", "host"),
        ("2jdh", f"pod/{POD}"),
    ]
    assert in_order(
        ["KUBE-NODEPORTS", EXT, "KUBE-MARK-MASQ", SVC, SEP, "KUBE-POSTROUTING"],
        chains(path, "33fg"),
    )
    assert SEP not in chains(path, "2jdh")
    assert {node for node, _, _ in nat_steps(path)} == {"33fg"}
    back = [hop["node"] and hop["node"][-4:] for hop in path["return"]["hops"]]
    assert [node for node in back if node] == ["2jdh", "2jdh", "33fg"]


def test_the_tutorials_own_chains(labs: LabFactory) -> None:
    """kube-proxy 1.20: no KUBE-EXT; the mark is set in KUBE-NODEPORTS itself."""
    old = labs("bridge", "1.20", "legacy")
    path = only_path(old, *MAIN)
    assert in_order(
        [
            "PREROUTING",
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-MARK-MASQ",
            "KUBE-NODEPORTS",
            SVC,
            SEP,
            "KUBE-FORWARD",
            "KUBE-POSTROUTING",
        ],
        chains(path, "2jdh"),
    )
    assert not any(name.startswith("KUBE-EXT") for name in chains(path))
    assert nat_steps(path)[-1][2] == "10.40.0.1:*>10.40.0.6:8080"
    assert {s["citation"]["backend"] for s in steps(path) if s["chain"]} == {"iptables-legacy"}


@pytest.mark.parametrize("era", ["1.36", "1.20"])
def test_as_text(labs: LabFactory, era: str) -> None:
    lab = labs("bridge", era, None)
    ran = run_cli(lab, *MAIN)
    assert ran.code == ExitCode.OK, ran
    assert ran.err == ""
    lines = ran.out.splitlines()
    sentence = ran.out.split("\n\n")[0].replace("\n", " ")
    assert sentence.startswith("Service default/hello-server works")
    assert sentence.endswith(f"{ENDPOINT}.")
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    wanted = ["KUBE-NODEPORTS", "KUBE-MARK-MASQ", SVC, SEP, "KUBE-POSTROUTING", "10.40.0.1"]
    wanted += [EXT] if era == "1.36" else []
    for name in wanted:
        assert name in ran.out
    numbers = [int(line.split(".")[0]) for line in lines if re.match(r"\d+\. ", line)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert "\033" not in ran.out


# -- what the kernel tracks ----------------------------------------------------------------------


def entries(lab: Lab, node: str, dport: int, source: tuple[str, int]) -> list[tuple[str, str]]:
    """The node's conntrack entries of the connection that `source` opened (or, as another node
    has rewritten it, any to `dport`), as (original, reply), each ``src>dst``."""
    text = lab.exec(f"node/{node}", ["conntrack", "-L", "-p", "tcp"]).stdout
    pattern = re.compile(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)")
    found = []
    for line in text.splitlines():
        original, reply = pattern.findall(line)
        if (original[0], int(original[2]), int(original[3])) == (*source, dport):
            half = [f"{s}:{sp}>{d}:{dp}" for s, d, sp, dp in (original, reply)]
            found.append((half[0], half[1]))
    return found


def traced(path: dict[str, Any], node: str) -> list[tuple[str, str]]:
    """The entries that the path makes or uses in the node's own namespace."""
    found = []
    for flow in path["flows"]:
        if flow["netns"] == "host" and flow["node"].endswith(node):
            halves = (flow["original"], flow["reply"])
            one, other = (
                f"{h['src']}:{h['sport'] or '*'}>{h['dst']}:{h['dport'] or '*'}" for h in halves
            )
            if (one, other) not in found:
                found.append((one, other))
    return found


WAYS = [
    # from, what is held, the command's destination, nodes crossed
    ("client", "10.142.0.7", 31830, ["33fg", "2jdh"]),
    ("client/203.0.113.10", "10.142.0.8", 31830, ["2jdh"]),
    ("node/m69d", "10.142.0.8", 31830, ["m69d", "2jdh"]),
    ("pod/web-1", "10.43.246.223", 80, ["m69d", "2jdh"]),
    ("pod/" + POD, "10.43.246.223", 80, ["2jdh"]),
    ("client/192.0.2.10", "35.231.121.11", 80, ["2jdh"]),
]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0].split('/')[0]}-{way[1]}")
def held(request: pytest.FixtureRequest, lab: Lab) -> Iterator[tuple[Hold, str, str, int, Any]]:
    source, address, port, nodes = request.param
    with lab.hold(source, address, port) as hold:
        yield hold, source, address, port, nodes


def test_conntrack_is_what_the_trace_says(
    lab: Lab, held: tuple[Hold, str, str, int, list[str]]
) -> None:
    """New connection's trace, from the held connection's own port but without its entry, and the
    entries that the kernel made for it: equal, but for the port that the kernel drew."""
    hold, _, address, port, nodes = held
    assert hold.result.source is not None
    assert hold.result.peer_seen is not None
    who = f"{hold.result.source[0]}:{hold.result.source[1]}"
    other = f"{hold.result.source[0]}:{hold.result.source[1] ^ 1}"
    for typed, live in ((other, False), (who, True)):
        extra = ["--node", "2jdh"] if address.startswith("35.") else []
        ran = run_cli(lab, "trace", typed, f"{address}:{port}", "-o", "json", *extra)
        assert ran.code == ExitCode.OK, ran
        (path,) = document(ran)["paths"]
        assert path["endpoint"] == ENDPOINT
        assert path["sourceSeen"] == hold.result.peer_seen[0]
        at = hold.result.source
        for node in nodes:
            real = entries(lab, node, port, at)
            assert len(real) == 1, (node, real)
            said = traced(path, node)
            assert len(said) == 1, (node, said)
            port_text = typed.rpartition(":")[2]
            generic = [
                half.replace(f":{at[1]}>", f":{port_text}>").replace(f":{at[1]}", f":{port_text}")
                for half in real[0]
            ]
            if live:
                assert said == real, f"{node}: {path['flows']}"
            else:
                for one, kernel in zip(said[0], generic, strict=True):
                    assert re.fullmatch(re.escape(one).replace(r"\*", r"\d+"), kernel), (
                        one,
                        kernel,
                    )
            # What this node's rewrites made of it is what the next one sees.
            reply_src, reply_dst = real[0][1].split(">")
            host, _, number = reply_dst.rpartition(":")
            at = (host, int(number))
            port = int(reply_src.rpartition(":")[2])
        port = held[3]


NEW_DROPPED = "FORWARD -d 10.40.0.6 -m conntrack --ctstate NEW -j DROP"
CHANGES = [
    pytest.param(
        f"-t nat -R {SEP} 2 -p tcp -j DNAT --to-destination 10.40.1.10:8080",
        f"-t nat -R {SEP} 2 -p tcp -m comment --comment default/hello-server -m tcp -j DNAT "
        "--to-destination 10.40.0.6:8080",
        "a new one would go to pod/default/web-1 10.40.1.10:8080",
        id="another endpoint",
    ),
    pytest.param(
        f"-I {NEW_DROPPED}", f"-D {NEW_DROPPED}", "a new one would be dropped", id="dropped"
    ),
]


def test_an_existing_connection_is_pinned(lab: Lab) -> None:
    with lab.hold("client", "10.142.0.7", 31830) as hold:
        assert hold.result.source is not None
        source = f"{hold.result.source[0]}:{hold.result.source[1]}"
        said = " ".join(run_cli(lab, "trace", source, "10.142.0.7:31830").out.split())
    assert f"an existing connection, pinned by conntrack to {ENDPOINT}" in said
    assert "; a new one would go there too." in said
    assert "no nat rule is consulted" in said


@pytest.mark.parametrize(("change", "undo", "new"), CHANGES)
def test_an_existing_connection_outlives_its_rules(
    lab: Lab, change: str, undo: str, new: str
) -> None:
    """The rules changed under it: the connection lives on, and the CLI says both."""
    with lab.hold("client", "10.142.0.7", 31830) as hold:
        assert hold.result.source is not None
        source = f"{hold.result.source[0]}:{hold.result.source[1]}"
        assert lab.exec("node/33fg", ["iptables-nft", *change.split()]).returncode == 0
        try:
            ran = run_cli(lab, "trace", source, "10.142.0.7:31830", "-o", "json")
            fresh = lab.connect("client", "10.142.0.7", 31830)
            assert hold.alive()
        finally:
            assert lab.exec("node/33fg", ["iptables-nft", *undo.split()]).returncode == 0
    assert ran.code == ExitCode.OK, ran
    answer = document(ran)
    assert f"an existing connection, pinned by conntrack to {ENDPOINT}; {new}" in answer["verdict"]
    (path,) = answer["paths"]
    assert path["endpoint"] == ENDPOINT
    cited = [s["citation"] for s in steps(path) if s["kind"] == "conntrack"]
    assert f"sport={hold.result.source[1]}" in cited[0]["text"]
    assert (fresh.pod == "default/web-1") if "web-1" in new else (fresh.kind == "timeout")
