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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from e2e.netlab import Lab
from gketrace.capture.packets import CapturedPacket
from gketrace_cli.capture.reader import CaptureReader
from gketrace_cli.capture.stitching import collect_packets

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
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out


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
    lab: Lab, capture: Callable[..., Running]
) -> None:
    running = capture(
        "service/hello-server", "--from", "203.0.113.10", "--connections", "-o", "json", taps=6
    )
    for node, port in (("33fg", 45001), ("2jdh", 45002)):
        assert "Hello" in curl(lab, node, port).stdout
    code, out = running.stop()
    document = json.loads(out)
    assert code == 0, running.told
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
    # What the server saw, by its own log.
    peers = {tuple(line["peer"]) for line in lab.peers(POD)}
    seen = {(found["server"]["src"], found["server"]["sport"]) for found in (over, at)}
    assert seen <= peers


def test_a_file_is_commented_and_stitched_again(
    lab: Lab, capture: Callable[..., Running], tmp_path: Path
) -> None:
    path = tmp_path / "hello.pcapng"
    running = capture("service/hello-server", "--from", "203.0.113.10", "-w", str(path), taps=6)
    assert curl(lab, "33fg", 45003).returncode == 0
    code, out = running.stop()
    assert code == 0, running.told
    assert "203.0.113.10:45003 → 10.142.0.7:31830" in out
    lines = subprocess.run(
        ["tcpdump", "-nr", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert lines.count("203.0.113.10.45003 > 10.142.0.7.31830: Flags [S]") == 1
    packets = read(path)
    assert any("DNAT to 10.40.0.6:8080" in packet.comment for packet in packets)
    assert any("MASQUERADE" in packet.comment for packet in packets)
    again = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "gketrace"), "capture"),
            *("-r", str(path), "--connections"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert again.returncode == 0, again.stderr
    assert "DNAT to 10.40.0.6:8080 by KUBE-SEP-" in again.stdout
    skewed(packets)


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


def rule(lab: Lab, action: str, *words: str) -> None:
    done = lab.exec("node/2jdh", ["iptables-nft", action, "FORWARD", *words])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("target", "state"),
    [(("DROP",), "unanswered"), (("REJECT", "--reject-with", "tcp-reset"), "refused")],
)
def test_where_it_dies_and_who_resets_it(
    lab: Lab, capture: Callable[..., Running], target: tuple[str, ...], state: str
) -> None:
    """The rule comes after the plan was made, which so knows where packets should have gone."""
    port = 45010 + len(target)
    words = ("-s", "10.142.0.7", "-p", "tcp", "--dport", "8080", "-j", *target)
    running = capture(
        "service/hello-server", "--from", "203.0.113.10", "--connections", "-o", "json", taps=6
    )
    rule(lab, "-I", *words)
    try:
        assert curl(lab, "33fg", port, seconds=1.5).returncode != 0
    finally:
        rule(lab, "-D", *words)
    code, out = running.stop(after=1.3)
    assert code == 1, running.told
    found = of_port(json.loads(out), port)
    assert (found["state"], found["failed"]) == (state, True)
    assert places(found["there"])[-1] == "2jdh eth0 in"
    (death,) = (death for death in found["deaths"] if not death["back"])
    assert death["lastSeen"].endswith("2jdh eth0")
    assert "cbr0" in death["text"]
    if state == "refused":
        assert [e["by"][-4:] for e in found["endings"] if e["kind"] == "RST"] == ["2jdh"]


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
