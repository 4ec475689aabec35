"""`gketrace conntrack`, `gketrace connections` and stale entries, held against the real kernel."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import jsonschema
import pytest

from e2e.answers import COMMAND, run_cli
from e2e.netlab import Lab
from e2e.prometheus import empty_panels, figures, lab_with_metrics, load, prometheus, scraped_text
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import open_pid, run_in_netns
from tests.agent.observe.bed import wait_until
from tests.deploy.test_prometheus import documented
from tests.kernel.conntrack_made import Made, make

DNS = ("10.43.240.17", 53)
SLICES = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"


@pytest.fixture(scope="module")
def own_lab() -> Iterator[Lab]:
    """Not the session's: an endpoint goes away here, and agents serve metrics and may delete."""
    with lab_with_metrics(f"ct{os.getpid()}") as lab:
        yield lab


def lines_of(lab: Lab, node: str, *words: str) -> list[str]:
    done = lab.exec(f"node/{node}", ["conntrack", "-L", *words])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def steady(line: str) -> str:
    """Without the seconds that are left."""
    return re.sub(r"^(\S+\s+\d+) \d+ ", r"\1 ", line)


def document(lab: Lab, *words: str, code: int = 0) -> Any:
    ran = run_cli(lab, *words, "-o", "json")
    assert ran.code == code, ran.err
    return json.loads(ran.out)


def remove_rule(lab: Lab, node: str, endpoint: str) -> None:
    """Takes the endpoint out of its Services' chains, as kube-proxy does; entries stay."""
    saved = lab.exec(f"node/{node}", ["iptables-nft-save", "-t", "nat"]).stdout.splitlines()
    chains = {line.split()[1] for line in saved if line.endswith(f"--to-destination {endpoint}")}
    jumps = [line for line in saved if line.rpartition(" -j ")[2] in chains]
    assert jumps
    for line in jumps:
        argv = ["iptables-nft", "-t", "nat", *shlex.split(line.replace("-A ", "-D ", 1))]
        done = lab.exec(f"node/{node}", argv)
        assert done.returncode == 0, done.stderr


def test_lines_are_those_of_conntrack(own_lab: Lab) -> None:
    with own_lab.hold("node/m69d", "10.142.0.8", 31830) as held:
        assert held.result.source is not None
        port = str(held.result.source[1])
        words = ["-p", "tcp", "--sport", port]
        for node in ("2jdh", "m69d"):
            before = lines_of(own_lab, node, *words)
            ran = run_cli(own_lab, "conntrack", node, *words, "-o", "conntrack")
            after = lines_of(own_lab, node, *words)
            assert ran.code == 0, ran.err
            assert len(before) == 1
            said = ran.out.splitlines()
            assert [steady(line) for line in said] == [steady(line) for line in before]
            left = [int(line.split()[2]) for line in (after[0], said[0], before[0])]
            assert left == sorted(left)


def test_a_node_port_over_two_nodes_is_one_connection(own_lab: Lab) -> None:
    with own_lab.hold("node/m69d", "10.142.0.8", 31830) as held:
        source = held.result.source
        assert source is not None
        found = document(own_lab, "connections", "--service", "hello-server")
        mine = [c for c in found["connections"] if c["client"] == f"10.142.0.6:{source[1]}"]
        assert len(mine) == 1
        assert mine[0]["end"] == "10.40.0.6:8080"
        assert mine[0]["endName"] == "pod/default/hello-server-579859fb5b-szrwh"
        assert [e["node"][-4:] for e in mine[0]["entries"]] == ["m69d", "2jdh"]
        assert (mine[0]["standing"], mine[0]["remarks"]) == ("current", [])
        assert [e["state"] for e in mine[0]["entries"]] == ["ESTABLISHED"] * 2


def test_a_pod_that_tracks_is_part_of_the_connection(own_lab: Lab) -> None:
    pod = "hello-server-579859fb5b-szrwh"
    rule = "INPUT -m conntrack --ctstate NEW -j ACCEPT"
    for verb in ("-A", "-D"):
        done = own_lab.exec(f"pod/{pod}", ["iptables-nft", verb, *rule.split()])
        assert done.returncode == 0, done.stderr
        if verb == "-D":
            break
        with own_lab.hold("node/m69d", "10.142.0.8", 31830) as held:
            assert held.result.source is not None
            client = f"10.142.0.6:{held.result.source[1]}"
            found = document(own_lab, "connections", "--from", "10.142.0.6", "--pods")
            mine = next(c for c in found["connections"] if c["client"] == client)
            assert [e["netns"] for e in mine["entries"]] == ["host", "host", f"pod/default/{pod}"]


def test_filters_and_untracked_pods(own_lab: Lab) -> None:
    result = own_lab.connect("pod/web-2", *DNS, "UDP")
    assert result.kind == "delivered"
    assert result.source is not None
    assert result.pod is not None
    found = document(own_lab, "conntrack", "--service", "dns", "--sport", str(result.source[1]))
    assert {e["netns"] for e in found["entries"]} == {"host"}
    assert {e["original"]["dst"] for e in found["entries"]} >= {DNS[0]}
    of_pod = document(own_lab, "conntrack", "--pod", result.pod.split("/")[1], "-p", "udp")
    assert any(e["original"]["sport"] == result.source[1] for e in of_pod["entries"])
    assert document(own_lab, "conntrack", "-p", "sctp")["entries"] == []
    pods = document(own_lab, "conntrack", "pod/web-2")
    assert [table["tracked"] for table in pods["tables"]] == [False]


def test_events_as_they_come(own_lab: Lab) -> None:
    words = ["conntrack", "2jdh", "-E", "-p", "tcp", "--dport", "31830"]
    words += ["-e", "new", "-o", "jsonl"]
    environment = {**os.environ, "KUBECONFIG": str(own_lab.kubeconfig)}
    with subprocess.Popen(
        [*COMMAND, *words], stdout=PIPE, stderr=PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert "following node" in running.stderr.readline()
        result = own_lab.connect("node/m69d", "10.142.0.8", 31830)
        assert result.source is not None
        event = json.loads(running.stdout.readline())
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=20)
    assert (event["kind"], event["event"], event["polled"]) == ("ConntrackEvent", "NEW", False)
    assert event["original"]["sport"] == result.source[1]
    assert running.returncode == 130
    schema = Path(__file__).parents[1] / "docs/schema/conntrack.json"
    jsonschema.validate(event, json.loads(schema.read_text()))


def test_a_reader_that_stalls_is_told_how_much_it_lost(own_lab: Lab) -> None:
    """Nobody reads the program's output until the kernel has thrown events away."""
    entries = [
        Made(src=f"10.1.{n // 250}.{n % 250}", dst="10.2.0.1", sport=n, dport=9, protocol=132)
        for n in range(5000)
    ]
    words = ["conntrack", "33fg", "-E", "-p", "sctp", "-f", "ipv4", "-o", "conntrack"]
    environment = {**os.environ, "KUBECONFIG": str(own_lab.kubeconfig)}
    node = own_lab.node("33fg")["pid"]
    said: list[str] = []
    told: list[str] = []
    with (
        open_pid(HostPaths(), node) as handle,
        subprocess.Popen(
            [*COMMAND, *words], stdout=PIPE, stderr=PIPE, text=True, env=environment
        ) as running,
    ):
        out, errors = running.stdout, running.stderr
        assert out is not None
        assert errors is not None
        assert "following node" in errors.readline()

        def drops() -> int:
            text = own_lab.exec("node/33fg", ["cat", "/proc/net/netlink"]).stdout
            rows = [line.split() for line in text.splitlines()[1:]]
            return sum(int(row[8]) for row in rows if row[1] == "12" and int(row[3], 16))

        sent = 0
        while not drops():
            for delete in (False, True):
                run_in_netns(handle, lambda gone=delete: make(entries, delete=gone))
                sent += len(entries)
        readers = [
            threading.Thread(target=told.extend, args=(out,)),
            threading.Thread(target=said.extend, args=(errors,)),
        ]
        for reader in readers:
            reader.start()
        lost = re.compile(r"the kernel dropped (\d+) messages of events in (\d+) overruns")

        def count() -> int:
            found = [int(m[1]) for line in said if (m := lost.search(line))]
            events = sum(line.lstrip().startswith(("[NEW]", "[DESTROY]")) for line in told)
            return events + (found[-1] if found else 0)

        try:
            wait_until(lambda: count() == sent, 60)
        finally:
            running.send_signal(signal.SIGINT)
            for reader in readers:
                reader.join(20)
    assert any(lost.search(line) for line in said), said


def test_prometheus_scrapes_three_agents(own_lab: Lab) -> None:
    with own_lab.hold("node/m69d", "10.142.0.8", 31830):
        load(own_lab, 1.0)
        assert run_cli(own_lab, "conntrack", "-C").code == 0
        with prometheus(own_lab) as running:
            wait_until(lambda: not empty_panels(running), 90)
            names = {
                re.sub(r"_(bucket|sum|count)$", "", one["metric"]["__name__"])
                for one in running.query('{job="gketrace-agent"}')
            }
            ours = {n for n in names if n != "up" and not n.startswith("scrape_")}
            assert ours == documented()
            rules = [rule for group in running.ask("rules")["groups"] for rule in group["rules"]]
            assert len(rules) == 11
            assert not [rule for rule in rules if rule.get("lastError")]
            found = figures(running)
        checked = subprocess.run(
            ["promtool", "check", "metrics"],
            input=scraped_text(own_lab, "2jdh"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    print(found)
    assert set(found["series"]) == {"2jdh", "33fg", "m69d"}
    assert all(0 < count < 500 for count in found["series"].values())
    # The best of each, as neighbours on the machine only add to it.
    assert all(seconds < 0.5 for seconds in found["agent_seconds_best"].values())


def test_deletion_of_one_connections_entry(own_lab: Lab) -> None:
    with own_lab.hold("node/m69d", "10.142.0.8", 31830) as held:
        assert held.result.source is not None
        port = str(held.result.source[1])
        words = ["conntrack", "2jdh", "-D", "-p", "tcp", "--sport", port, "-o", "conntrack"]
        before = lines_of(own_lab, "2jdh", "-p", "tcp", "--sport", port)
        dry = run_cli(own_lab, *words, "--dry-run")
        assert (dry.code, len(dry.out.splitlines())) == (0, 1)
        assert lines_of(own_lab, "2jdh", "-p", "tcp", "--sport", port)
        refused = run_cli(own_lab, *words)
        assert refused.code == 2
        assert "no terminal" in refused.err
        done = run_cli(own_lab, *words, "--yes")
        assert done.code == 0, done.err
        assert [steady(line) for line in done.out.splitlines()] == [steady(x) for x in before]
        assert "1 flow entries have been deleted." in done.err
        assert not lines_of(own_lab, "2jdh", "-p", "tcp", "--sport", port)
        # Its client's node has it still: one-sided.
        found = document(own_lab, "connections", "--from", "10.142.0.6")
        mine = [c for c in found["connections"] if c["client"] == f"10.142.0.6:{port}"]
        assert [[n[-4:] for n in one["oneSided"]] for one in mine] == [["2jdh"]]


def test_an_entry_that_is_older_than_its_rule(own_lab: Lab) -> None:
    own_lab.exec("node/m69d", ["sysctl", "-q", "net.netfilter.nf_conntrack_timestamp=1"])
    endpoint = "10.40.0.6:8080"
    with own_lab.hold("node/m69d", "10.142.0.8", 31830) as held:
        assert held.result.source is not None
        client = f"10.142.0.6:{held.result.source[1]}"

        def mine() -> Any:
            found = document(own_lab, "connections", "--service", "hello-server")
            return next(c for c in found["connections"] if c["client"] == client)

        fine = mine()
        assert fine["model"]["agreement"] == "agrees", fine
        assert 0 <= fine["ageSeconds"] < 60
        remove_rule(own_lab, "2jdh", endpoint)
        told = mine()
        assert told["standing"] == "current"
        assert told["model"]["agreement"] in ("destination", "refused"), told
        assert told["model"]["node"].endswith("2jdh")
        assert told["model"]["olderThanRules"] is True
        words = ["service", "hello-server", "--via", "nodeport", "--node", "2jdh"]
        live = json.loads(run_cli(own_lab, *words, "-o", "json").out)["liveConnections"]
        assert [one["agreement"] for one in live["differing"]] == [told["model"]["agreement"]]


def test_an_entry_of_an_endpoint_that_is_gone_is_stale(own_lab: Lab) -> None:
    service = ["service", "dns", "--via", "clusterip", "--from", "pod/web-2", "--port", "dns"]
    # The entry is to be there until the last question, on a slow machine, too.
    own_lab.exec("node/33fg", ["sysctl", "-q", "net.netfilter.nf_conntrack_udp_timeout=600"])
    for _ in range(40):  # the kernel draws lots
        result = own_lab.connect("pod/web-2", *DNS, "UDP")
        if result.pod == "default/web-1":
            break
    assert result.pod == "default/web-1"
    assert result.source is not None
    client = f"10.40.2.10:{result.source[1]}"
    fine = document(own_lab, *service)
    assert fine["liveConnections"]["stale"] == []
    assert fine["liveConnections"]["counts"]["current"] > 0

    listed = own_lab.api("GET", SLICES)["items"]
    name = "kubernetes.io/service-name"
    dns = next(one for one in listed if one["metadata"]["labels"].get(name) == "dns")
    rest = [one for one in dns["endpoints"] if one["addresses"] != ["10.40.1.10"]]
    own_lab.api("PUT", f"{SLICES}/{dns['metadata']['name']}", {**dns, "endpoints": rest})
    own_lab.stop_pod("web-1")
    remove_rule(own_lab, "33fg", "10.40.1.10:5353")

    told = document(own_lab, *service, code=1)
    stale = [
        s for s in told["liveConnections"]["stale"] if f"sport={result.source[1]} " in s["entry"]
    ]
    assert len(stale) == 1
    assert stale[0]["node"].endswith("33fg")
    assert "10.40.1.10:5353 is in no EndpointSlice" in stale[0]["why"]
    assert "stale" in told["verdict"]
    joined = document(own_lab, "connections", "--service", "dns", code=1)
    mine = next(c for c in joined["connections"] if c["client"] == client)
    assert mine["standing"] == "stale"
    assert mine["end"] == "10.40.1.10:5353"
    text = run_cli(own_lab, "connections", "--service", "dns").out
    assert "stale: its endpoint 10.40.1.10:5353" in " ".join(text.split())
