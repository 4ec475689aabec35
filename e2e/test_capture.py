"""`gketrace capture` along a Service's paths, while real clients connect."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate

from e2e.netlab import Lab, Probe
from gketrace.capture.packets import CapturedPacket
from gketrace.errors import ExitCode, GketraceError
from gketrace_cli.capture.reader import CaptureReader
from gketrace_cli.capture.restitch import restitch
from gketrace_cli.capture.stitching import collect_packets
from gketrace_cli.commands.capture import CaptureOutput
from gketrace_cli.options import Options

SCHEMA = json.loads((Path(__file__).parents[1] / "docs/schema/capture.json").read_text())
CLIENT = "client/203.0.113.10"
NODES = {"33fg": "10.142.0.7", "2jdh": "10.142.0.8"}
POD = "hello-server-579859fb5b-szrwh"


@dataclass
class Running:
    """A capture that has begun."""

    process: subprocess.Popen[str]
    told: list[str] = field(default_factory=list)

    def stop(self, after: float = 0.3) -> tuple[int, str]:
        """Exit code and standard output, after Ctrl-C.

        `after`: seconds that it goes on for: the last packets are on their way to the rings, and
        one that got no answer counts as unanswered after a second.
        """
        time.sleep(after)
        self.process.send_signal(signal.SIGINT)
        # Not communicate(): that and the thread that reads what is told would wait for each other.
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        return self.process.wait(), out


@pytest.fixture
def capture(lab: Lab) -> Iterator[Callable[..., Running]]:
    """Starts `gketrace capture WORDS`; it listens at `taps` places when this returns."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, taps: int) -> Running:
        argv = [str(Path(sys.executable).parent / "gketrace"), "capture", *words]
        process = subprocess.Popen(
            [*argv, "--duration", "40"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "KUBECONFIG": str(lab.kubeconfig), "NO_COLOR": "1"},
        )
        started.append(process)
        running = Running(process)
        listening = threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                running.told.append(line.rstrip())
                if sum("listening on" in one for one in running.told) == taps:
                    listening.set()
            listening.set()

        threading.Thread(target=read, daemon=True).start()
        assert listening.wait(30), running.told
        assert process.poll() is None, running.told
        return running

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def curl(lab: Lab, node: str, port: int, *, seconds: float = 5) -> subprocess.CompletedProcess[str]:
    return lab.exec(
        CLIENT,
        [
            *("curl", "-sS", "-m", str(seconds), "--local-port", str(port)),
            f"http://{NODES[node]}:31830/",
        ],
    )


def of_port(document: dict[str, Any], port: int) -> dict[str, Any]:
    (found,) = (c for c in document["connections"] if c["client"]["sport"] == port)
    return dict(found)


def places(flow: dict[str, Any]) -> list[str]:
    return [
        f"{station['node'][-4:]}{' pod' if station['pod'] else ''} "
        f"{'veth' if station['interface'].startswith('veth') else station['interface']} "
        f"{station['direction']}"
        for station in flow["stations"]
    ]


def test_each_hop_of_a_connection_with_its_rewrites(
    lab: Lab, capture: Callable[..., Running], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hello.pcapng"
    running = capture(
        *("service/hello-server", "--from", "203.0.113.10", "-w", str(path), "-o", "json"), taps=6
    )
    for node, port in (("33fg", 45001), ("2jdh", 45002)):
        assert "Hello" in curl(lab, node, port).stdout
    part = tmp_path / "hello.pcapng.part"
    wait_until(lambda: ports(part) == {45001, 45002})  # what would be left after a kill
    code, out = running.stop()
    document = json.loads(out)
    assert code == 0, running.told
    validate(document, SCHEMA)
    over, at = of_port(document, 45001), of_port(document, 45002)
    inside = ["2jdh cbr0 out", "2jdh veth out", "2jdh pod eth0 in"]
    assert places(over["there"]) == ["33fg eth0 in", "33fg eth0 out", "2jdh eth0 in", *inside]
    assert places(at["there"]) == ["2jdh eth0 in", *inside]
    assert places(over["back"])[0] == "2jdh pod eth0 out"
    assert places(over["back"])[-2:] == ["33fg eth0 in", "33fg eth0 out"]
    for found in (over, at):
        assert (found["state"], found["client"]["src"]) == ("closed", "203.0.113.10")
        assert (found["server"]["dst"], found["server"]["dport"]) == ("10.40.0.6", 8080)
        assert POD in found["server"]["dstName"]
        rewrites = [r for s in found["there"]["stations"] for r in s["rewrites"]]
        assert [r["kind"] for r in rewrites] == ["DNAT", "SNAT"]
        assert "--to-destination 10.40.0.6:8080" in rewrites[0]["rule"]
        assert found["there"]["packets"] == found["there"]["stations"][-1]["packets"]
        (entry,) = found["conntrack"]
        assert (entry["orig"]["src"], entry["orig"]["sport"]) == (
            "203.0.113.10",
            found["client"]["sport"],
        )
        assert entry["reply"]["dport"] == found["server"]["sport"]
    assert [found["conntrack"][0]["node"][-4:] for found in (over, at)] == ["33fg", "2jdh"]
    # What the server saw, by its own log.
    peers = {tuple(line["peer"]) for line in lab.peers(POD)}
    seen = {(found["server"]["src"], found["server"]["sport"]) for found in (over, at)}
    assert seen <= peers
    assert document["files"] == [str(path)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hello.pcapng"]
    commented_and_stitched_again(path, capsys)


def commented_and_stitched_again(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = subprocess.run(
        ["tcpdump", "-nr", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert lines.count("203.0.113.10.45001 > 10.142.0.7.31830: Flags [S]") == 1
    packets = read(path)
    assert any("DNAT to 10.40.0.6:8080" in packet.comment for packet in packets)
    assert any("MASQUERADE" in packet.comment for packet in packets)
    again = {}
    for form in (CaptureOutput.TEXT, CaptureOutput.JSON, CaptureOutput.JSONL):
        assert restitch(str(path), "", form, Options(), numeric=False) is ExitCode.OK
        again[form] = capsys.readouterr().out
    assert "203.0.113.10:45001 → 10.142.0.7:31830" in again[CaptureOutput.TEXT]
    assert "DNAT to 10.40.0.6:8080 by KUBE-SEP-" in again[CaptureOutput.TEXT]
    for text in (again[CaptureOutput.JSON], *again[CaptureOutput.JSONL].splitlines()):
        validate(json.loads(text), SCHEMA)
    skewed(packets)


def ports(path: Path) -> set[int]:
    """Clients' ports that a file has by now."""
    with suppress(GketraceError):  # it is being written: its last block may be half there
        return {p for p in (45001, 45002) if any(p.to_bytes(2) in one.data for one in read(path))}
    return set()


def wait_until(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def read(path: Path) -> list[CapturedPacket]:
    reader = CaptureReader(str(path))
    try:
        return list(reader)
    finally:
        reader.close()


def skewed(packets: list[CapturedPacket]) -> None:
    """With one node's clock set wrong, the order and the offset are found again."""
    order = [(packet.tap, packet.data) for packet in packets]
    ahead = 3_000_000_000
    wrong = [
        replace(packet, time_ns=packet.time_ns + ahead)
        if packet.tap.node.endswith("2jdh")
        else packet
        for packet in packets
    ]
    reference = next(p.tap.node for p in packets if p.tap.node.endswith("33fg"))
    found = collect_packets(wrong, reference=reference)
    offset = next(o for node, o in found.clocks.offsets.items() if node.endswith("2jdh"))
    assert offset.bound_ns is not None
    assert abs(offset.ahead_ns - ahead) <= offset.bound_ns < 10_000_000
    mended = [(packet.tap, packet.data) for packet in found.packets]
    certain = [
        number for number, packet in enumerate(found.packets) if "not certain" not in packet.comment
    ]
    assert sorted(map(str, mended)) == sorted(map(str, order))
    for connection in found.stitched.connections:
        for flow in (connection.there, connection.back):
            for unit in flow.units:
                times = [passage.time for passage in unit.passages]
                assert times == sorted(times)
    assert certain


@dataclass(frozen=True)
class Fault:
    """Something broken on purpose, after the plan was made."""

    target: str
    broken: str
    mended: str
    state: str
    last: str
    """Where the packets that die are seen last."""
    next: str
    """Part of where they should have been seen next; empty: there is no tap behind."""
    back: bool = False
    reset_by: str = ""
    error: str = ""
    large: bool = False
    """The client asks for a large reply."""
    works: bool = False
    lasting: bool = False
    """It is mended when the capture is over."""


VETH, WAY = "$veth", "10.40.0.0/24 dev cbr0"
_NARROW = "ip route replace 203.0.113.10 via 10.142.0.2 mtu lock 600"
_WIDE = "ip route del 203.0.113.10"
_QUIET = "OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP"
LARGE = """
import socket, sys
s = socket.socket()
s.bind(("", int(sys.argv[1])))
s.settimeout(float(sys.argv[2]))
s.connect(("10.142.0.7", 31830))
s.sendall(b"hold\\n")
s.recv(4096)
s.sendall(b"x" * 3000)
got = 0
while got < 3000:
    got += len(s.recv(4096))
"""
_TO_POD = "-s 10.142.0.7 -p tcp --dport 8080"
FAULTS = {
    "no route": Fault(
        # The default route leads back to the router, and round again, until the TTL is used up.
        target="node/2jdh",
        broken=f"ip route del {WAY}",
        mended=f"ip route replace {WAY} proto kernel scope link src 10.40.0.1",
        state="unreachable",
        last="2jdh eth0 out",
        next="cbr0",
        error="ICMP TTL exceeded from 10.142.0.8",
    ),
    "dropped": Fault(
        target="node/2jdh",
        broken=f"iptables-nft -I FORWARD {_TO_POD} -j DROP",
        mended=f"iptables-nft -D FORWARD {_TO_POD} -j DROP",
        state="unanswered",
        last="2jdh eth0 in",
        next="cbr0",
    ),
    "rejected": Fault(
        target="node/2jdh",
        broken=f"iptables-nft -I FORWARD {_TO_POD} -j REJECT --reject-with tcp-reset",
        mended=f"iptables-nft -D FORWARD {_TO_POD} -j REJECT --reject-with tcp-reset",
        state="refused",
        last="2jdh eth0 in",
        next="cbr0",
        reset_by="node gke-lab-cluster-default-pool-9e4ce61e-2jdh",
    ),
    "no listener": Fault(
        # The pod's kernel answers, as it does for a port that nothing listens on.
        target=f"pod/{POD}",
        broken="iptables-nft -I INPUT -p tcp --dport 8080 -j REJECT --reject-with tcp-reset",
        mended="iptables-nft -F INPUT",
        state="refused",
        last="",
        next="",
        reset_by=f"pod default/{POD}",
    ),
    "reset by the server": Fault(
        target=f"pod/{POD}",
        broken="iptables-nft -I INPUT -p tcp --dport 8080 --tcp-flags PSH PSH "
        "-j REJECT --reject-with tcp-reset",
        mended="iptables-nft -F INPUT",
        state="reset",
        last="",
        next="",
        reset_by=f"pod default/{POD}",
    ),
    "no forwarding": Fault(
        target="node/2jdh",
        broken="sysctl -qw net.ipv4.ip_forward=0",
        mended="sysctl -qw net.ipv4.ip_forward=1",
        state="unanswered",
        last="2jdh eth0 in",
        next="cbr0",
    ),
    "no veth": Fault(
        target="node/2jdh",
        broken=f"ip link set {VETH} down",
        mended=f"ip link set {VETH} up",
        state="unanswered",
        last="2jdh cbr0 out",
        next=VETH,
    ),
    "small MTU": Fault(
        # The pod is told, and sends smaller packets.
        target="node/33fg",
        broken=_NARROW,
        mended=_WIDE,
        state="closed",
        last="33fg eth0 in",
        next="eth0",
        back=True,
        error="ICMP fragmentation needed (MTU 600) from 10.142.0.7",
        large=True,
        works=True,
    ),
    "small MTU, silent": Fault(
        # Until the end: what is sent again later would arrive, and be reset.
        target="node/33fg",
        broken=f"{_NARROW} && iptables-nft -I {_QUIET}",
        mended=f"{_WIDE} && iptables-nft -D {_QUIET}",
        state="stalled",
        last="33fg eth0 in",
        next="eth0",
        back=True,
        large=True,
        lasting=True,
    ),
}


def ask(lab: Lab, fault: Fault, port: int) -> bool:
    """Whether the client got its answer."""
    if fault.large:
        argv = ["python3", "-c", LARGE, str(port), "20" if fault.works else "1"]
        return lab.exec(CLIENT, argv).returncode == 0
    return curl(lab, "33fg", port, seconds=0.6).returncode == 0


def test_where_it_dies_and_who_resets_it(lab: Lab, capture: Callable[..., Running]) -> None:
    """Each fault comes after the plan was made, which so knows where packets should have gone."""
    running = capture(
        "service/hello-server", "--from", "203.0.113.10", "--connections", "-o", "json", taps=6
    )
    veth = lab.pod("hello")["veth"]
    with ExitStack() as lasting:
        for number, (name, fault) in enumerate(FAULTS.items()):
            run(lab, fault.target, fault.broken.replace(VETH, veth))
            with ExitStack() as at_once:
                mending = lasting if fault.lasting else at_once
                mending.callback(run, lab, fault.target, fault.mended.replace(VETH, veth))
                assert ask(lab, fault, 45020 + number) == fault.works, name
            if fault.large:  # the pod forgets what it was told of the MTU
                run(lab, f"pod/{POD}", "ip route flush cache")
        code, out = running.stop(after=1.3)
    assert code == 1, running.told
    validate(json.loads(out), SCHEMA)
    for number, (name, fault) in enumerate(FAULTS.items()):
        found = of_port(json.loads(out), 45020 + number)
        named = found["state"], found["deaths"], found["errors"], found["endings"]
        assert found["state"] == fault.state, (name, named)
        assert found["failed"] == (not fault.works), name
        if fault.last:
            death = next(d for d in found["deaths"] if d["back"] == fault.back)
            node, interface, direction = fault.last.split()
            assert death["certain"], name
            assert death["lastSeen"].endswith(f"{node} {interface}"), (name, named)
            first, _, then = death["text"].partition(", not ")
            assert f"last seen {direction} at " in first, (name, named)
            assert fault.next.replace(VETH, veth) in then, (name, named)
        resets = [ending["by"] for ending in found["endings"] if ending["kind"] == "RST"]
        assert resets[:1] == [fault.reset_by][: bool(fault.reset_by)], (name, named)
        texts = [error["text"] for error in found["errors"]]
        assert all(fault.error in text for text in texts), (name, named)
        assert bool(texts) == bool(fault.error), (name, named)
        rounds = found["there"]["rounds"]
        assert (rounds > 1) == (name == "no route"), (name, rounds)


def run(lab: Lab, target: str, command: str) -> None:
    done = lab.exec(target, ["sh", "-ec", command])
    assert done.returncode == 0, (command, done.stderr)


WEB6 = (("10.43.240.21", 80), ("fd00:43::21", 80))


def test_both_families_and_several_endpoints(lab: Lab, capture: Callable[..., Running]) -> None:
    """Each connection has the endpoint that answered it, and the source that this one saw."""
    running = capture(
        *("service/web6", "--from", "pod/web-0", "--connections", "-o", "json"), taps=12
    )
    probes = [Probe(source="pod/web-0", address=ip, port=port) for ip, port in WEB6 * 8]
    results = lab.connect_all(probes)
    code, out = running.stop()
    assert code == 0, running.told
    document = json.loads(out)
    validate(document, SCHEMA)
    assert len(document["connections"]) == len(probes)
    assert len({result.pod for result in results}) > 1
    for result in results:
        assert result.source is not None
        found = next(
            one
            for one in document["connections"]
            if (one["client"]["src"], one["client"]["sport"]) == result.source
        )
        assert (found["state"], found["contested"]) == ("closed", False)
        server = found["server"]
        assert (server["src"], server["sport"]) == result.peer_seen
        assert (server["dst"], server["dport"]) == result.local
        assert server["dstName"] == f"pod/{result.pod}"
        translated = {(e["reply"]["src"], e["reply"]["sport"]) for e in found["conntrack"]}
        assert translated == {result.local}
        rewrites = [r["kind"] for s in found["there"]["stations"] for r in s["rewrites"]]
        assert rewrites == ["DNAT"] or result.pod == "default/web-0"


def test_the_plan_as_tcpdump_commands(lab: Lab) -> None:
    argv = [
        *(str(Path(sys.executable).parent / "gketrace"), "capture", "--dry-run"),
        *("--trace", "pod/web-1", "svc/hello-server:80"),
    ]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        env={**os.environ, "KUBECONFIG": str(lab.kubeconfig), "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    commands = [line.strip() for line in done.stdout.splitlines() if "tcpdump -n" in line]
    assert len(commands) == 8
    assert sum(command.startswith("nsenter -t ") for command in commands) == 2
    assert "tcp and host 10.40.1.10 and host 10.43.246.223 and port 80" in commands[0]
    assert "tcp and host 10.40.1.10 and host 10.40.0.6 and port 8080" in commands[-1]


def test_a_filter_that_no_node_takes_is_one_line(lab: Lab) -> None:
    """The user's own filter, not the long one that the plan makes of it."""
    done = subprocess.run(
        [
            Path(sys.executable).parent / "gketrace",
            "capture",
            "service/hello-server",
            "port foo bar",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "KUBECONFIG": str(lab.kubeconfig), "NO_COLOR": "1"},
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert lines[-1] == "error: filter 'port foo bar': unknown port 'foo', on all 3 nodes"
    assert "foo" not in "".join(lines[:-1])
