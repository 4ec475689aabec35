"""`--follow --packets`: where the time goes, who sent a RST, and what no conntrack table has."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from e2e.netlab import Lab
from e2e.test_follow import VALIDATOR, following

POD = "hello-server-579859fb5b-szrwh"
NODE_PORT = "-p tcp --dport 31830"
CLIENT = "client/203.0.113.10"
# What is too large for the path is answered with an ICMP error; or it is not: a black hole.
NARROW = "ip route replace 203.0.113.10 via 10.142.0.2 mtu lock 600"
WIDE = "ip route del 203.0.113.10"
QUIET = "OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP"
BROKEN = {
    # target, broken, mended, large reply
    45101: ("node/33fg", "true", "true", False),
    45102: (
        "node/33fg",
        f"iptables-nft -t raw -I PREROUTING {NODE_PORT} -j DROP",
        f"iptables-nft -t raw -D PREROUTING {NODE_PORT} -j DROP",
        False,
    ),
    45103: (
        "node/33fg",
        "iptables-nft -I FORWARD -p tcp --dport 8080 -j REJECT",
        "iptables-nft -D FORWARD -p tcp --dport 8080 -j REJECT",
        False,
    ),
    45104: (
        f"pod/{POD}",
        "iptables-nft -I INPUT -p tcp --dport 8080 -j REJECT --reject-with tcp-reset",
        "iptables-nft -F INPUT",
        False,
    ),
    45105: ("node/33fg", NARROW, WIDE, True),
    45106: (
        "node/33fg",
        f"{NARROW} && iptables-nft -I {QUIET}",
        f"{WIDE} && iptables-nft -D {QUIET}",
        True,
    ),
}
WORK = {45101, 45105}
LASTING = 45106
"""Until the end: what is sent again later would arrive."""
ASK = """
import socket, sys
s = socket.socket()
s.bind(("", int(sys.argv[1])))
s.settimeout(float(sys.argv[3]))
s.connect(("10.142.0.7", 31830))
s.sendall(b"hold\\n" if sys.argv[2] == "large" else b"probe\\n")
s.recv(4096)
if sys.argv[2] == "large":
    s.sendall(b"x" * 3000)
    got = 0
    while got < 3000:
        got += len(s.recv(4096))
"""


def ask(lab: Lab, port: int, *, large: bool, works: bool) -> bool:
    kind, seconds = ("large", "1.0") if large else ("small", "0.6")
    seconds = "20" if works else seconds
    return lab.exec(CLIENT, ["python3", "-c", ASK, str(port), kind, seconds]).returncode == 0


def test_packets_say_where_it_dies_and_where_the_time_goes(lab: Lab) -> None:
    for node in lab.state["nodes"]:  # what other tests left unanswered would fail here, rightly
        lab.exec(f"node/{node}", ["conntrack", "-F"])
    with ExitStack() as lasting, following(lab, "service", "hello-server", "--packets") as one:
        for port, (target, broken, mended, large) in BROKEN.items():
            with ExitStack() as at_once:
                done = lab.exec(target, ["sh", "-ec", broken])
                assert done.returncode == 0, (port, done.stderr)
                stack = lasting if port == LASTING else at_once
                stack.callback(lab.exec, target, ["sh", "-ec", mended])
                works = port in WORK
                assert ask(lab, port, large=large, works=works) == works, port
            if large:  # the pod forgets what it was told of the MTU
                lab.exec(f"pod/{POD}", ["ip", "route", "flush", "cache"])
        end = time.monotonic() + 40.0
        while len(one.records) < len(BROKEN) - 1 and time.monotonic() < end:
            time.sleep(0.1)
        one.end()  # before it is mended: what is sent again would arrive
    assert one.code == 1, one.said
    for document in one.documents:
        VALIDATOR.validate(document)
    by_port: dict[int, dict[str, Any]] = {}
    for record in one.records:
        port = int(record["client"].rpartition(":")[2])
        assert port not in by_port, record
        by_port[port] = record
    assert set(by_port) == set(BROKEN), one.said

    good = by_port[45101]
    assert good["outcome"] == "closed"
    there = good["packets"]["there"]["stations"]
    assert {s["node"][-4:] for s in there} == {"33fg", "2jdh"}
    assert len(there) >= 4, there
    assert there[-1]["tuple"]["dst"] == "10.40.0.6"
    assert all(s["sinceNs"] is not None for s in there[1:])
    # What packets take from hop to hop is within what the handshake takes, clocks allowing.
    spent = sum(s["sinceNs"] for s in there[1:])
    doubt = sum(s["sinceBoundNs"] or 0 for s in there[1:])
    assert 0 < spent <= good["packets"]["answeredNs"] + doubt
    assert {"33fg", "2jdh"} == {e["node"][-4:] for e in good["entries"]}

    dropped = by_port[45102]
    assert dropped["outcome"] == "unanswered"
    assert dropped["entries"] == []
    assert dropped["died"]["lastSeen"].endswith("33fg eth0")
    assert "no node has an entry of it" in dropped["because"]
    rejected = by_port[45103]
    assert rejected["outcome"] == "unreachable"
    assert rejected["entries"] == []
    assert "port unreachable from 10.142.0.7" in rejected["because"]
    refused = by_port[45104]
    assert refused["outcome"] == "refused"
    assert refused["because"] == f"RST by pod default/{POD}"
    told = by_port[45105]
    assert told["outcome"] == "closed"
    (error,) = told["packets"]["errors"]
    assert "ICMP fragmentation needed (MTU 600) from 10.142.0.7" in error["text"]
    stalled = by_port[45106]
    assert stalled["outcome"] == "stalled", stalled
    assert stalled["failed"]
    assert stalled["packets"]["back"]["retransmissions"] > 0
    assert "33fg eth0" in stalled["because"]
    assert "as where the MTU is too small" in stalled["because"], stalled["because"]

    hops = one.summary["hopLatency"]
    assert len(hops) >= 4
    assert all(h["nanoseconds"]["p50"] <= h["nanoseconds"]["p99"] for h in hops)
    assert one.summary["lostPackets"] == {}
    assert one.summary["droppedPackets"] == 0
    assert one.summary["failed"] == 4


def test_a_pods_packets_are_seen_at_its_own_interface(lab: Lab) -> None:
    def mine() -> list[dict[str, Any]]:
        """Without a connection of the test before, whose server still sends again."""
        return [r for r in one.records if r["client"].endswith((":45111", ":45112"))]

    with following(lab, "pod", POD, "--packets", "--from", "203.0.113.10") as one:
        assert ask(lab, 45111, large=False, works=True)
        target, broken, mended, _ = BROKEN[45104]
        try:
            assert lab.exec(target, ["sh", "-ec", broken]).returncode == 0
            assert not ask(lab, 45112, large=False, works=False)
        finally:
            lab.exec(target, ["sh", "-ec", mended])
        end = time.monotonic() + 40.0
        while len(mine()) < 2 and time.monotonic() < end:
            time.sleep(0.1)
    assert one.code == 1, one.said
    assert [record["outcome"] for record in mine()] == ["closed", "refused"], one.records
    good, refused = mine()
    for record in mine():
        VALIDATOR.validate(record)
        assert record["endpointName"] == f"pod/default/{POD}"
        assert record["packets"]["complete"]
        places = {(s["node"][-4:], s["pod"]) for s in record["packets"]["there"]["stations"]}
        assert places == {("2jdh", f"default/{POD}")}, record
    # What the node's table and the pod's own say of it, and what its packets do, is one record.
    assert {entry["netns"] for entry in good["entries"]} <= {"host", f"pod/default/{POD}"}
    assert good["packets"]["answeredNs"] > 0
    assert refused["because"] == f"RST by pod default/{POD}"
