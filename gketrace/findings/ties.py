"""What ties a traced way to the finding that explains how it ended.

A tie is a name for one thin piece of evidence: a rule of a node that led a Service's connections
somewhere.  A finding names those that it holds to be wrong (`Finding.faulty`), a finding of a way
those that the way met (`Finding.trail`).  One name in both is what makes the second a consequence
of the first; without one they stay apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from gketrace.findings.world import Way
from gketrace.kubenames import endpoint_text
from gketrace.trace import Hop, NetnsKind

__all__ = ["entered", "families", "first_chain", "led", "trail"]

_OWN: Final = re.compile(r"^(?:KUBE-(?:SVC|SVL|XLB|FW|EXT)-|(?:service|local|external|firewall)-)")
"""Chains of one Service port, by the names that kube-proxy gives them: the same on every node."""


def led(port: str, node: str, end: str) -> str:
    """`node`'s rules lead connections to the Service port `port` to the address and port `end`."""
    return f"{port} is led on {node} to {end}"


def entered(door: str, chain: str) -> str:
    """Connections to this kind of front door come into this first chain of the Service."""
    return f"{door} enters {chain}"


def trail(way: Way) -> frozenset[str]:
    """All that the way met on its way there, and the way itself: never empty."""
    return frozenset(_met(way))


def families(way: Way) -> frozenset[int]:
    """`Finding.families` of a way's."""
    return frozenset({way.path.outcome.packet.dst.version})


def _met(way: Way) -> Iterator[str]:
    yield f"{way.path.source} → {way.path.target}"
    if not way.service:
        return
    port = f"{way.service}:{way.port}" if way.port else way.service
    for hop in way.path.hops:
        if hop.netns.kind is not NetnsKind.HOST or not hop.netns.node:
            continue
        for step in hop.steps:
            after = step.after
            if step.before.dst != after.dst and after.dport is not None:
                yield led(port, hop.netns.node, endpoint_text(str(after.dst), after.dport))
        chain = first_chain(hop)
        if chain:
            yield entered(way.path.front_door, chain)


def first_chain(hop: Hop) -> str:
    """The first chain of one Service that the packet came to before its destination changed."""
    for step in hop.steps:
        if step.before.dst != step.after.dst:
            return ""
        if step.citation is not None and _OWN.match(step.citation.chain):
            return step.citation.chain
    return ""
