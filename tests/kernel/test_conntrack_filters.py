"""Every filter flag against conntrack(8)'s own, over one table of many kinds of entries."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from gketrace_agent.messages import conntrack_filters
from gketrace_agent.observe.conntrack_filter import ConntrackFilters
from gketrace_agent.observe.conntrack_lines import render_batch
from gketrace_agent.observe.conntrack_table import open_conntrack
from gketrace_cli.app import app
from gketrace_cli.conntrack_filter import typed_filter
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from tests.agent.observe.bed import PATHS, Bed, Netns
from tests.kernel.conntrack_made import Made, make

TICKS = re.compile(r"^(\S+ +\d+ )\d+ ")


@pytest.fixture(scope="module")
def table() -> Iterator[Netns]:
    bed = Bed()
    try:
        netns = bed.netns("flags")
        netns.inside(lambda: make(entries()))
        # NAT, which the kernel sets up by itself from these.
        for number, words in enumerate(
            (
                "-p tcp --state ESTABLISHED --dst-nat 10.8.0.1:8080 --src-nat 10.142.0.6",
                "-p tcp --state ESTABLISHED --dst-nat 10.8.0.1",
                "-p tcp --state TIME_WAIT --dst-nat 10.8.0.2:8080",
                "-p udp --src-nat 10.142.0.6:4000",
                "-p udp --src-nat 10.142.0.7",
                "-p udp --dst-nat 10.8.1.1:53 --src-nat 10.142.0.7:4000",
                f"-p udp --src-nat 10.9.0.{7}:5000",  # the port alone
            ),
            start=1,
        ):
            netns.run(
                *f"conntrack -I {words} -s 10.9.0.{number} -d 10.43.0.{number} --sport {number}"
                " --dport 80 -t 900 -u SEEN_REPLY".split()
            )
        netns.run(
            *"conntrack -I -p tcp --state ESTABLISHED -s fd00::1 -d fd00::2 --sport 9"
            " --dport 80 -t 900 -u SEEN_REPLY --dst-nat [fd00::8]:8080".split()
        )
        yield netns
    finally:
        bed.close()


def entries() -> Iterator[Made]:
    for number in range(1, 25):
        yield Made(
            src=f"10.1.{number % 3}.{number}",
            dst=f"10.2.0.{number % 5}",
            protocol=(6, 17, 132)[number % 3],
            sport=1000 + number % 7,
            dport=(53, 80)[number % 2],
            state=1 + number % 7,
            mark=number % 4,
            zone=number % 2,
            timeout=900,
            status=(0, 2, 6)[number % 3],
        )
        yield Made(
            src=f"fd00::{number}",
            dst="fd00::2",
            protocol=(6, 17)[number % 2],
            sport=1000 + number,
            dport=80,
            state=3,
            timeout=900,
            mark=number % 3,
        )
    yield Made(src="10.1.0.1", dst="10.2.0.2", protocol=1, sport=77, dport=8, timeout=900)


def ours(netns: Netns, words: list[str]) -> list[str]:
    """What our command line makes of the words, and the agent of that."""
    wanted: ConntrackFilters = conntrack_filters(pb.ListConntrackRequest(any=[parse(words)]))
    with open_conntrack(netns.handle, PATHS) as opened:
        batches = opened.read(wanted).batches()
        text = b"".join(render_batch(batch, now=0) for batch in batches).decode()
    return sorted(TICKS.sub(r"\1", line) for line in text.splitlines())


@functools.cache
def commands() -> Any:
    return get_command(app)


def parsed(*words: str) -> dict[str, Any]:
    """The parameters of the command."""
    group = commands()
    parent = group.make_context("gketrace", [], resilient_parsing=True)
    given: dict[str, Any] = (
        group.commands["conntrack"].make_context("conntrack", list(words), parent).params
    )
    return given


def parse(words: list[str]) -> pb.ConntrackFilter:
    """The flags as the command parses them, up to the filter that it sends."""
    given = parsed(*words)
    return typed_filter(
        family=given["family"],
        protocol=given["proto"],
        addresses={
            "orig_src": given["src"],
            "orig_dst": given["dst"],
            "reply_src": given["reply_src"],
            "reply_dst": given["reply_dst"],
        },
        ports={
            "orig_sport": given["sport"],
            "orig_dport": given["dport"],
            "reply_sport": given["reply_sport"],
            "reply_dport": given["reply_dport"],
        },
        mark=given["mark"],
        zone=given["zone"],
        state=given["state"],
        src_nat=given["src_nat"],
        dst_nat=given["dst_nat"],
    )


FLAGS = [
    "-s 10.1.1.4",
    "--src 10.1.1.4",
    "--orig-src 10.1.1.0/24",
    "-d 10.2.0.3",
    "--orig-dst 10.2.0.0/31",
    "-r 10.8.0.1",
    "--reply-src 10.2.0.2",
    "-q 10.142.0.6",
    "--reply-dst 10.1.2.2",
    "-p tcp",
    "-p 17",
    "-p icmp",
    "-p tcp --sport 1003",
    "-p tcp --orig-port-src 1003",
    "-p udp --dport 53",
    "-p sctp --orig-port-dst 80",
    "-p tcp --reply-port-src 8080",
    "-p udp --reply-port-dst 4000",
    "-p tcp --state ESTABLISHED",
    "-p tcp --state TIME_WAIT",
    "-p sctp --state SHUTDOWN_SENT",
    "-m 3",
    "--mark 0x2/0x2",
    "-w 1",
    "--zone 0",
    "--src-nat",
    "--src-nat 10.142.0.6",
    "--src-nat 10.142.0.7:4000",
    "--src-nat 10.9.0.7",
    "-g",
    "--dst-nat",
    "--dst-nat 10.8.0.1",
    "--dst-nat 10.8.0.1:8080",
    "--src-nat --dst-nat",
    "--src-nat 10.142.0.6 --dst-nat 10.8.0.1:8080 -p tcp",
    "-s 10.9.0.1 -d 10.43.0.1 -p tcp --sport 1 --dport 80 --state ESTABLISHED",
    "-f ipv6 -s fd00::5",
    "-f ipv6 -d fd00::2 -p udp --sport 1007",
    "-f ipv6 --dst-nat fd00::8",
    "-f ipv6 --dst-nat [fd00::8]:8080",
    "-f ipv6 -m 1",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_a_flag_selects_what_conntrack_selects(table: Netns, flags: str) -> None:
    words = flags.split()
    family = words if "-f" in words else ["-f", "ipv4", *words]
    listed = table.run("conntrack", "-L", *family, check=False)
    theirs = sorted(TICKS.sub(r"\1", line) for line in listed.splitlines())
    assert theirs or flags == "--src-nat 10.9.0.7", "the flag selects nothing, and proves nothing"
    assert ours(table, family) == theirs


def test_the_word_after_a_nat_flag_is_its_own_only_when_it_is_an_address() -> None:
    def taken(*words: str) -> tuple[str | None, str | None, str | None]:
        found = parsed(*words)
        return found["where"], found["src_nat"], found["dst_nat"]

    assert taken("--src-nat", "2jdh") == ("2jdh", "", None)
    assert taken("--src-nat", "10.0.0.1", "2jdh") == ("2jdh", "10.0.0.1", None)
    assert taken("--src-nat", "--dst-nat", "fd00::1") == (None, "", "fd00::1")
    assert taken("-g", "--", "10.0.0.1") == ("10.0.0.1", None, "")
