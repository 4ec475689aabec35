"""`--follow` against real connections: what clients and servers logged, and the kernels' tables.

GKETRACE_FOLLOW_SECONDS=30 makes the loops as long.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

import jsonschema
import pytest

from e2e.answers import COMMAND
from e2e.conftest import LabFactory
from e2e.netlab import Lab, Probe

SECONDS = float(os.environ.get("GKETRACE_FOLLOW_SECONDS", "4"))
SCHEMA = json.loads((Path(__file__).parents[1] / "docs/schema/follow.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
LOOP = """
end=$(($(date +%s%N) + $1 * 1000000000 / 1000)); shift
while [ $(date +%s%N) -lt $end ]; do
  for url in "$@"; do
    curl -s -m 3 -w '%{local_ip} %{local_port} %{http_code}\\n' "http://$url/json" || echo failed
  done
done
"""


@dataclass
class Following:
    """One run of the program."""

    process: subprocess.Popen[str]
    documents: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    code: int | None = None

    @property
    def records(self) -> list[dict[str, Any]]:
        found = [one for one in self.documents if one["kind"] == "FollowedConnection"]
        return [one for one in found if one["phase"] in ("closed", "still open")]

    @property
    def summary(self) -> dict[str, Any]:
        assert self.documents, self.said
        assert self.documents[-1]["kind"] == "FollowSummary"
        return self.documents[-1]

    def wait_said(self, text: str, seconds: float = 90.0) -> None:
        end = time.monotonic() + seconds
        while not any(text in line for line in self.said):
            assert time.monotonic() < end, (text, self.said)
            assert self.process.poll() is None, self.said
            time.sleep(0.05)

    def wait_failed(self, clients: list[str], seconds: float = 90.0) -> None:
        """Until each of these clients' connections is known to fail.  Needs ``--events``: a record
        comes when the kernel forgets its entries."""
        end = time.monotonic() + seconds
        while waiting := set(clients) - {
            one["client"] for one in list(self.documents) if one.get("failed") is True
        }:
            assert time.monotonic() < end, (waiting, self.said)
            time.sleep(0.05)

    def end(self) -> None:
        """May be called twice."""
        if self.code is not None:
            return
        self.process.send_signal(signal.SIGINT)
        self.code = self.process.wait(90)  # on a busy machine the last events take their time
        for thread in self.threads:
            thread.join(10)


@contextmanager
def following(lab: Lab, *words: str) -> Iterator[Following]:
    """The program from when all nodes are followed; interrupted at the end."""
    environment = {**os.environ, "KUBECONFIG": str(lab.kubeconfig)}
    with subprocess.Popen(
        [*COMMAND, *words, "--follow", "-o", "jsonl"],
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        env=environment,
    ) as process:
        one = Following(process)

        def read_out() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                one.documents.append(json.loads(line))

        def read_err() -> None:
            assert process.stderr is not None
            one.said.extend(iter(process.stderr.readline, ""))

        one.threads = [threading.Thread(target=read) for read in (read_out, read_err)]
        for thread in one.threads:
            thread.start()
        try:
            one.wait_said("followed from now on")
            yield one
            one.end()
        finally:
            if process.poll() is None:
                process.kill()


@dataclass(frozen=True)
class Logged:
    """One connection as its client and its server saw it."""

    client: str
    door: str
    pod: str
    peer: str
    local: str


def ends(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def curl_loop(lab: Lab, source: str, doors: list[str], seconds: float) -> list[Logged]:
    argv = ["bash", "-c", LOOP, "loop", str(int(seconds * 1000)), *doors]
    done = lab.exec(source, argv, timeout=seconds + 60)
    lines = done.stdout.splitlines()
    assert "failed" not in lines, (source, doors, lines[-3:])
    found: list[Logged] = []
    for number in range(0, len(lines), 2):
        seen = json.loads(lines[number])
        ip, port, status = lines[number + 1].split()
        assert status == "200"
        found.append(
            Logged(
                client=ends(ip.strip("[]"), int(port)),
                door=doors[len(found) % len(doors)],
                pod=seen["pod"],
                peer=ends(*seen["peer"]),
                local=ends(*seen["local"]),
            )
        )
    return found


def tables(lab: Lab) -> dict[str, set[tuple[str, ...]]]:
    """Node → original and reply tuples of its entries, as conntrack(8) prints them."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for node in lab.world.nodes:
        rows = set()
        for family in ("ipv4", "ipv6"):
            done = lab.exec(f"node/{node.short}", ["conntrack", "-L", "-p", "tcp", "-f", family])
            for line in done.stdout.splitlines():
                halves = re.findall(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)", line)
                rows.add(tuple(part for half in halves for part in half))
        found[node.name] = rows
    return found


@contextmanager
def tables_meanwhile(lab: Lab) -> Iterator[dict[str, set[tuple[str, ...]]]]:
    """All entries that there are at some time: one that a RST closes is gone after ten seconds."""
    found = tables(lab)
    over = threading.Event()

    def look() -> None:
        for node, rows in tables(lab).items():
            found[node] |= rows

    def watch() -> None:
        while not over.wait(3.0):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
    look()


def tuples_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """An entry of a record in the form of `tables`."""

    def split(end: str) -> tuple[str, str]:
        host, _, port = end.rpartition(":")
        return str(ipaddress.ip_address(host.strip("[]"))), port

    source, destination = split(entry["source"]), split(entry["destination"])
    answers = split(entry["destinationNat"] or entry["destination"])
    to = split(entry["sourceNat"] or entry["source"])
    return (
        *(source[0], destination[0], source[1], destination[1]),
        *(answers[0], to[0], answers[1], to[1]),
    )


def check_truth(
    one: Following, logged: list[Logged], real: dict[str, set[tuple[str, ...]]]
) -> None:
    """Exactly one record for each logged connection, and it tells the truth.

    `real`: all entries that the nodes had meanwhile.
    """
    by_ends: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in one.records:
        by_ends.setdefault((record["client"], record["door"]), []).append(record)
    again = Counter((log.client, log.door) for log in logged)
    for log in logged:
        found = by_ends.get((log.client, log.door), [])
        assert len(found) == again[log.client, log.door], (log, found, one.said, one.summary)
        record = found[0]
        assert not record["failed"], record
        assert record["endpointName"] == f"pod/{log.pod}", (log, record)
        assert (record["endpoint"], record["sourceSeen"]) == (log.local, log.peer), (log, record)
        assert record["remarks"] == [], json.dumps(record)
        entries = record["entries"]
        assert (entries[0]["source"], entries[0]["destination"]) == (log.client, log.door)
        for entry in entries:
            assert tuples_of(entry) in real[entry["node"]], (log, entry)
        translating = [e for e in entries if e["destinationNat"]]
        assert [e["destinationNat"] for e in translating] == [log.local]
        rules = " ".join(rule["text"] for rule in translating[0]["rules"])
        assert log.local.rpartition(":")[0].strip("[]") in rules, (log, translating)
    assert len(one.records) == len(logged)
    assert one.summary["connections"] == len(logged)
    assert one.summary["failed"] == 0
    assert one.summary["lostEvents"] == {}
    counted: Counter[str] = Counter()
    for end in one.summary["endpoints"]:
        counted[end["name"]] += end["connections"]
    assert counted == Counter(log.pod.split("/")[1] for log in logged)
    for document in (*one.documents[:3], one.summary):
        VALIDATOR.validate(document)


@pytest.mark.parametrize("topology", ["bridge", "ptp"])
def test_each_connection_that_clients_logged_is_one_record(labs: LabFactory, topology: str) -> None:
    lab = labs(topology)
    having, without, other = lab.world.nodes[0], lab.world.nodes[1], lab.world.nodes[2]
    hello = [f"{having.ip}:31830", f"{without.ip}:31830", "35.231.121.11:80"]
    dual = [f"{other.ip}:30084", f"[{having.ip6}]:30084", f"[{without.ip6}]:30084"]
    inside = "10.43.246.223:80"
    with (
        following(lab, "service", "hello-server") as first,
        following(lab, "service", "web6") as second,
        tables_meanwhile(lab) as real,
        ThreadPoolExecutor(5) as pool,
    ):
        loops = {
            "client": hello,
            f"node/{without.short}": [*hello, inside],
            "pod/web-2": [inside, "35.231.121.11:80", f"{without.ip}:31830"],
        }
        of_first = [pool.submit(curl_loop, lab, s, d, SECONDS) for s, d in loops.items()]
        loops6 = {
            "client": dual,
            f"node/{other.short}": [*dual, "10.43.240.21:80", "[fd00:43::21]:80"],
        }
        of_second = [pool.submit(curl_loop, lab, s, d, SECONDS) for s, d in loops6.items()]
        logged = [log for loop in of_first for log in loop.result()]
        logged6 = [log for loop in of_second for log in loop.result()]
    assert len(logged) >= 9
    assert len(logged6) >= 8
    check_truth(first, logged, real)
    check_truth(second, logged6, real)
    assert (first.code, second.code) == (0, 0)
    # By the rules, each of web6's endpoints gets a third, of either family.
    expected: dict[str, float] = {}
    for end in second.summary["endpoints"]:
        expected[end["name"]] = expected.get(end["name"], 0.0) + end["expectedShare"]
    assert list(expected.values()) == pytest.approx([1 / 3] * 3, abs=0.001)


def break_ptp(lab: Lab) -> dict[str, tuple[str, list[str], list[str]]]:
    """What is broken → where, how it is broken, how it is mended; for web's three pods."""
    web = {n: lab.pod(f"web-{n}") for n in range(3)}
    short = {n: lab.node(web[n]["node"])["short"] for n in range(3)}
    route = [f"{web[2]['ip']}/32", "dev", web[2]["veth"]]
    drop = ["FORWARD", "-d", web[1]["ip"], "-p", "tcp", "--dport", "8080", "-j", "DROP"]
    comment = ["-m", "comment", "--comment", "broken on purpose"]
    return {
        "drop": (
            f"node/{short[1]}",
            ["iptables-nft", "-I", *drop, *comment],
            ["iptables-nft", "-D", *drop, *comment],
        ),
        "veth": (
            f"node/{short[2]}",
            ["ip", "link", "set", web[2]["veth"], "down"],
            ["sh", "-c", f"ip link set {web[2]['veth']} up && ip route replace {' '.join(route)}"],
        ),
        "route": (
            f"node/{short[2]}",
            ["ip", "route", "del", *route],
            ["ip", "route", "replace", *route],
        ),
        "forward": (
            f"node/{short[1]}",
            ["sysctl", "-qw", "net.ipv4.ip_forward=0"],
            ["sysctl", "-qw", "net.ipv4.ip_forward=1"],
        ),
        "reset": (
            "pod/web-0",
            ["iptables-nft", "-I", "INPUT", *RESET],
            ["iptables-nft", "-F", "INPUT"],
        ),
    }


# The pod's kernel answers the request with a RST.
RESET = "-p tcp --dport 8080 --tcp-flags PSH PSH -j REJECT --reject-with tcp-reset".split()


@contextmanager
def listener_gone(lab: Lab, pod: str, port: int) -> Iterator[None]:
    """The process that listens there is killed; the pod and its namespace stay."""
    find = f"ss -Hltnp 'sport = :{port}' | sed -n 's/.*pid=\\([0-9]*\\).*/\\1/p'"
    done = lab.exec(f"pod/{pod}", ["sh", "-ec", f"kill -KILL $({find})"])
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        lab.start_pod(pod)


@contextmanager
def broken(lab: Lab, *what: str) -> Iterator[None]:
    ways = break_ptp(lab)
    try:
        for name in what:
            target, argv, _ = ways[name]
            done = lab.exec(target, argv)
            assert done.returncode == 0, (name, done.stderr)
        yield
    finally:
        for name in what:
            target, _, argv = ways[name]
            done = lab.exec(target, argv)
            assert done.returncode == 0, (name, done.stderr)


def fail(lab: Lab, one: Following, count: int) -> list[str]:
    """Opens connections to web-nodeport, all at once; waits until all are known to fail; the
    clients' ends."""
    probe = Probe(source="client", address=lab.world.nodes[0].ip, port=30080)
    results = lab.connect_all([probe] * count, timeout=0.5)
    clients = [ends(*result.source) for result in results if result.source]
    one.wait_failed(clients)
    return clients


def walks(one: Following, clients: list[str]) -> dict[str, set[tuple[str, str]]]:
    """Pod → outcome and what the walk said, of the failures among these clients' connections."""
    found: dict[str, set[tuple[str, str]]] = {}
    for record in one.records:
        if record["client"] in clients and record["failed"]:
            said = record["died"]["walk"] or ""
            pod = (record["endpointName"] or "").removeprefix("pod/default/")
            found.setdefault(pod, set()).add((record["outcome"], said))
    return found


def test_what_is_broken_is_named_where_it_dies(labs: LabFactory) -> None:
    lab = labs("ptp")
    with following(lab, "service", "web-nodeport", "--events") as one:
        # In this order: a pod is started only when those of its node can be reached.
        with listener_gone(lab, "web-0", 8080), broken(lab, "drop", "veth"):
            first = fail(lab, one, 18)
        with broken(lab, "forward", "route", "reset"):
            second = fail(lab, one, 18)
    assert one.code == 1, one.said
    died = walks(one, first)
    assert {outcome for outcome, _ in died["web-0"]} == {"refused"}
    assert {outcome for outcome, _ in died["web-1"]} == {"unanswered"}
    assert all("dropped by filter FORWARD:1" in w and "m69d" in w for _, w in died["web-1"]), died
    assert {outcome for outcome, _ in died["web-2"]} == {"unanswered"}
    assert all("33fg" in w for _, w in died["web-2"]), died
    died = walks(one, second)
    assert {outcome for outcome, _ in died["web-0"]} == {"reset"}
    assert all("forwarding is off" in w and "m69d" in w for _, w in died["web-1"]), died
    assert all("33fg" in w for _, w in died["web-2"]), died
    # SYNs that were dropped behind the first node: the second was read, and has no entry.
    dropped = [r for r in one.records if r["client"] in first and "web-1" in r["endpointName"]]
    assert dropped
    for record in dropped:
        assert record["died"]["lastSeen"].endswith("2jdh")
        assert record["died"]["notSeenOn"].endswith("m69d")
        assert [entry["node"][-4:] for entry in record["entries"]] == ["2jdh"]
    told = {failure["outcome"] for failure in one.summary["failures"]}
    assert told == {"refused", "unanswered", "reset"}


def test_a_connection_that_a_rule_leads_to_another_pod_is_astray(labs: LabFactory) -> None:
    """It is answered and closed, and yet the Service does not work.  Also when the following ends
    before the objects have been read again."""
    lab = labs("ptp")
    entry, other = lab.world.nodes[0], lab.pod("hello-server")
    to = f"{other['ip']}:8080"
    rule = ["PREROUTING", "-p", "tcp", "--dport", "30080", "-j", "DNAT", "--to-destination", to]
    with following(lab, "service", "web-nodeport") as one:
        done = lab.exec(f"node/{entry.short}", ["iptables-nft", "-t", "nat", "-I", *rule])
        assert done.returncode == 0, done.stderr
        try:
            client = lab.connect("client", entry.ip, 30080).source
            one.end()
        finally:
            lab.exec(f"node/{entry.short}", ["iptables-nft", "-t", "nat", "-D", *rule])
    assert client is not None
    (record,) = [record for record in one.records if record["client"] == ends(*client)]
    assert record["endpoint"] == to
    assert (record["outcome"], record["failed"]) == ("astray", True), record
    assert f"led to {to}, which is no endpoint of the Service" in record["because"]
    assert "nat PREROUTING:1 leads it there: " in record["died"]["walk"], record
    assert (one.code, one.summary["outcomes"]["astray"]) == (1, 1), one.said
    assert "1 astray" in one.summary["verdict"]
    VALIDATOR.validate(record)


def test_an_agent_that_dies_and_comes_back_is_a_gap(labs: LabFactory) -> None:
    lab = labs("ptp")
    entry = lab.world.nodes[1]
    with following(lab, "service", "hello-server") as one:
        held = lab.hold("client", entry.ip, 31830)
        lab.stop_agent(entry.short)
        try:
            one.wait_said("is not followed any more")
        finally:
            lab.start_agent(entry.short)
        one.wait_said("is followed again after", 60.0)
        after = lab.connect("client", entry.ip, 31830)
        held.close()
        time.sleep(2.0)
    assert one.code == 3
    assert [gap["where"] for gap in one.summary["gaps"]] == [entry.name]
    assert one.summary["gaps"][0]["end"] is not None
    assert after.source is not None
    assert held.result.source is not None
    clients = Counter(record["client"] for record in one.records)
    assert clients == {ends(*after.source): 1, ends(*held.result.source): 1}


def test_a_reader_that_goes_away_ends_it(labs: LabFactory) -> None:
    lab = labs("ptp")
    environment = {**os.environ, "KUBECONFIG": str(lab.kubeconfig)}
    words = ["service", "hello-server", "--follow", "-o", "jsonl", "--duration", "60s"]
    with subprocess.Popen(
        [*COMMAND, *words], stdout=PIPE, stderr=PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "followed from now on" not in process.stderr.readline():
            assert process.poll() is None
        process.stdout.close()
        end = time.monotonic() + 40
        while process.poll() is None and time.monotonic() < end:
            lab.connect("client", lab.world.nodes[0].ip, 31830)
            time.sleep(0.3)
        process.kill()
        said = process.stderr.read()
    assert process.returncode == 0, said
