"""What is fuzzed, by name: how inputs are made, and what each is put through."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from gketrace.errors import GketraceError, ParseError
from gketrace.packet import Packet
from gketrace.ruleset.iptables_save import parse_iptables_save
from gketrace.ruleset.nft_json import NftTables, parse_nft_json
from gketrace.ruleset.nft_text import element_text
from gketrace.ruleset.render import render_ruleset
from gketrace.trace import Disposition
from gketrace_agent.kernel.nft_rules.words import NotRendered
from tests.core.simulate.nodes import Node, world_node
from tests.fuzz import files, live, netlink
from tests.fuzz.binary import mutate_bytes
from tests.fuzz.mutate import mutate_json, mutate_lines

__all__ = ["TARGETS", "Target"]

_DATA: Final = Path(__file__).parents[1] / "data"
_WORLD: Final = "kube-proxy-1.36-iptables-legacy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One thing that is fuzzed."""

    seeds: Callable[[], list[bytes]]
    mutate: Callable[[random.Random, list[bytes]], bytes]
    run: Callable[[bytes], None]
    """Raises one of `refusals` for what it refuses; any other exception is a crash."""
    refusals: tuple[type[Exception], ...] = (ParseError,)
    """A `ParseError` must always name its source, line and text."""
    pid: Callable[[], int] = os.getpid
    """Whose memory must not grow."""


def _iptables_seeds() -> list[bytes]:
    paths = [*_DATA.glob("worlds/*/node-*/ip*tables-save.txt"), *_DATA.glob("rules/*.txt")]
    return [text for path in sorted(paths) if (text := path.read_bytes())]


def _nft_seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(_DATA.glob("worlds/*/node-*/nft.json"))]


def _family(text: bytes) -> int:
    return 6 if b"::" in text else 4


def _read_iptables(text: bytes) -> None:
    """Every rule is parsed, rendered, and what was rendered is read again."""
    parsed = parse_iptables_save(text, source="fuzz", family=_family(text))
    rendered = "\n".join(render_ruleset(parsed, counters=True)) + "\n"
    if parsed.tables:
        again = parse_iptables_save(
            rendered.encode("utf-8", "surrogateescape"), source="rendered", family=parsed.family
        )
        assert again.tables == parsed.tables


def _read_nft(text: bytes) -> None:
    _load_all(parse_nft_json(text, source="fuzz", taken_at=0.0))


def _load_all(tables: NftTables) -> None:
    for ruleset in tables.rulesets:
        for name in ruleset.chain_names:
            for rule in ruleset.chain(name) or ():
                assert rule.text or not rule.statements
        for name in ruleset.set_names:
            found = ruleset.set(name)
            for element in found.elements if found is not None else ():
                element_text(element)


_PACKETS: Final = tuple(
    Packet(
        src=ip_address(src),
        dst=ip_address(dst),
        protocol=protocol,
        sport=sport,
        dport=dport,
        tcp_flags=2 if protocol == 6 else 0,
    )
    for src, dst, protocol, sport, dport in (
        ("10.40.1.10", "10.43.246.223", 6, 40000, 80),
        ("10.40.1.10", "10.43.240.17", 17, None, 53),
        ("10.142.0.8", "10.142.0.6", 6, 40000, 31830),
        ("fd00:40:1::10", "fd00:43::21", 6, 40000, 80),
    )
)


def _walk(node: Node) -> None:
    for packet in _PACKETS:
        walked = node.walk(packet, into="eth0")
        leaves = list(walked.leaves())
        assert leaves, "a packet that vanishes"
        chances = [leaf.chance for leaf in leaves]
        known = [chance for chance in chances if chance is not None]
        if len(known) == len(chances):
            assert sum(known) == 1, "chances that do not sum to 1"
        assert all(isinstance(leaf.outcome.disposition, Disposition) for leaf in leaves)


def _walk_iptables(text: bytes) -> None:
    node = world_node(_WORLD, "m69d")
    node.host.rulesets = [
        parse_iptables_save(text, source="fuzz", family=family, backend="iptables-nft")
        for family in (4, 6)
    ]
    _walk(node)


def _walk_nft(text: bytes) -> None:
    node = world_node(_WORLD, "m69d")
    node.host.rulesets = list(parse_nft_json(text, source="fuzz", taken_at=0.0).rulesets)
    _walk(node)


_KERNEL: Final = (GketraceError, ValueError, KeyError, IndexError, struct.error)
"""What the agent takes for an answer that is not understood, where it reads the kernel."""

TARGETS: Final = {
    "iptables-save": Target(seeds=_iptables_seeds, mutate=mutate_lines, run=_read_iptables),
    "nft-json": Target(seeds=_nft_seeds, mutate=mutate_json, run=_read_nft),
    "walk-iptables": Target(seeds=_iptables_seeds, mutate=mutate_lines, run=_walk_iptables),
    "walk-nft": Target(seeds=_nft_seeds, mutate=mutate_json, run=_walk_nft),
    "netlink-route": Target(
        seeds=netlink.route_seeds, mutate=mutate_bytes, run=netlink.read_route, refusals=_KERNEL
    ),
    "netlink-nftables": Target(
        seeds=netlink.nftables_seeds,
        mutate=mutate_bytes,
        run=netlink.read_nftables,
        refusals=_KERNEL,
    ),
    "netlink-rules": Target(
        seeds=netlink.rules_seeds,
        mutate=mutate_bytes,
        run=netlink.read_rules,
        refusals=(*_KERNEL, NotRendered),
    ),
    "netlink-conntrack": Target(
        seeds=netlink.conntrack_seeds,
        mutate=mutate_bytes,
        run=netlink.read_conntrack,
        refusals=(GketraceError, ValueError),
    ),
    "netlink-events": Target(
        seeds=netlink.conntrack_seeds,
        mutate=mutate_bytes,
        run=netlink.read_events,
        refusals=(GketraceError, ValueError),
    ),
    "cri": Target(
        seeds=live.cri_seeds,
        mutate=live.mutate_parts,
        run=live.resolve,
        refusals=(GketraceError,),
    ),
    "proc": Target(
        seeds=files.proc_seeds,
        mutate=mutate_lines,
        run=files.read_proc,
        refusals=(GketraceError, ValueError),
    ),
    "requests": Target(
        seeds=live.request_seeds,
        mutate=live.mutate_request,
        run=live.ask,
        refusals=(live.Refused,),
        pid=live.agent_pid,
    ),
    "kubeconfig": Target(
        seeds=files.config_seeds,
        mutate=files.mutate_config,
        run=files.read_config,
        refusals=(GketraceError,),
    ),
    "objects": Target(
        seeds=files.object_seeds,
        mutate=files.mutate_object,
        run=files.read_object,
        refusals=(GketraceError,),
    ),
    "packets": Target(
        seeds=files.packet_seeds,
        mutate=mutate_bytes,
        run=files.read_packets,
        refusals=(GketraceError,),
    ),
}
