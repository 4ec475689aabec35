from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from gketrace_agent.observe.recent import jiffies_now, observe_recent, parse_recent
from tests.agent.observe.bed import Bed, wait_until


@pytest.mark.parametrize("backend", ["iptables-legacy", "iptables-nft"])
def test_ages_are_those_of_the_packets(bed: Bed, backend: str) -> None:
    netns = bed.netns("recent")
    rule = "-A INPUT -p udp -m recent --name KUBE-SEP-X --set".split()
    netns.run(backend, *rule)
    sent: list[tuple[float, float]] = []  # not earlier, not later

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            before = time.monotonic()
            sock.sendto(b"x", ("127.0.0.1", 9))
            sent.append((before, time.monotonic()))

    netns.inside(send)
    wait_until(lambda: time.monotonic() > sent[0][1] + 0.3)
    netns.inside(send)
    asked = time.monotonic()
    found = netns.read(observe_recent)
    answered = time.monotonic()
    (entry,) = found["KUBE-SEP-X"]
    assert str(entry.address) == "127.0.0.1"
    assert entry.ttl == 64
    assert entry.text.startswith("src=127.0.0.1 ttl: 64 last_seen:")
    for age, (first, last) in zip(entry.ages, reversed(sent), strict=True):
        assert asked - last - 0.5 <= age <= answered - first + 0.5  # an idle CPU's jiffies lag
    between = entry.ages[1] - entry.ages[0]
    assert sent[1][0] - sent[0][1] - 0.02 <= between <= sent[1][1] - sent[0][0] + 0.02


def test_without_a_rule_there_are_no_lists(bed: Bed) -> None:
    assert bed.netns("recent").read(observe_recent) == {}


def test_jiffies_are_those_of_the_kernel() -> None:
    """Read on both sides of ours; an idle CPU lets its own run behind a little."""
    before = jiffies_shown()
    now, per_second = jiffies_now()
    after = jiffies_shown()
    assert before - per_second / 2 <= now <= after + per_second / 2


def jiffies_shown() -> int:
    lines = Path("/proc/timer_list").read_text().splitlines()
    return max(int(line.split()[1]) for line in lines if line.startswith("jiffies:"))


def test_a_list_of_several_packets() -> None:
    (entry,) = parse_recent(
        "src=fd00::1 ttl: 63 last_seen: 900 oldest_pkt: 3 700, 800, 900\n", 1000.0, 100
    )
    assert entry.ages == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="xt_recent"):
        parse_recent("nonsense\n", 1.0, 100)
