"""The smallest nftables tables, as nft would print them, and how to ask them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from gketrace.conntrack import CtState
from gketrace.packet import Packet, parse_address
from gketrace.ruleset.nft import NftRuleset
from gketrace.ruleset.nft_json import parse_nft_json
from gketrace.simulate.nft.run import traverse
from gketrace.simulate.state import Alternative, CtInfo, PacketState
from gketrace.snapshot import Link
from gketrace.trace import Hook
from tests.core.simulate.environment import FixedEnvironment

__all__ = ["PACKET", "Surroundings", "go", "kinds", "rules_hit", "state_of", "table"]

Json = Any

PACKET = Packet(
    src=parse_address("10.142.0.2"),
    dst=parse_address("10.43.240.7"),
    protocol=6,
    sport=40000,
    dport=80,
)


@dataclass
class Surroundings(FixedEnvironment):
    """With interfaces."""

    links: dict[str, Link] = field(
        default_factory=lambda: {
            "lo": Link(ifindex=1, name="lo", flags=("LOOPBACK", "UP")),
            "eth0": Link(ifindex=2, name="eth0", mac="02:00:00:00:00:01", flags=("UP",)),
            "cbr0": Link(ifindex=3, name="cbr0", kind="bridge", mac="02:00:00:00:00:02"),
        }
    )


def table(
    *rules: Json,
    chains: dict[str, list[Json]] | None = None,
    objects: tuple[Json, ...] = (),
    family: str = "ip",
    hook: str = "prerouting",
    kind: str = "filter",
    policy: str = "accept",
    priority: int = 0,
) -> NftRuleset:
    """A table ``t`` with base chain ``base``; a rule is a list of statements."""
    named = {"family": family, "table": "t"}
    items: list[Json] = [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}}]
    items.append({"table": {"family": family, "name": "t", "handle": 1}})
    for item in objects:
        ((what, body),) = item.items()
        items.append({what: {"family": family, "name": body["name"], "table": "t", **body}})
    base = {"type": kind, "hook": hook, "prio": priority, "policy": policy}
    items.append({"chain": {**named, "name": "base", "handle": 2, **base}})
    bodies = {"base": list(rules), **(chains or {})}
    items += [{"chain": {**named, "name": name, "handle": 3}} for name in chains or ()]
    handle = 10
    for name, body in bodies.items():
        for statements in body:
            handle += 1
            items.append({"rule": {**named, "chain": name, "handle": handle, "expr": statements}})
    text = json.dumps({"nftables": items}).encode()
    return parse_nft_json(text, source="test", taken_at=1000.0).rulesets[0]


def state_of(packet: Packet = PACKET, hook: Hook = Hook.PREROUTING, **changes: Json) -> PacketState:
    ct = CtInfo(state=CtState.NEW, orig=packet.tuple5, reply=packet.tuple5.inverted())
    known: dict[str, Json] = {"ct": ct, "in_iface": "eth0", **changes}
    return PacketState(packet=packet, hook=hook, **known)


def go(
    ruleset: NftRuleset,
    state: PacketState | None = None,
    env: Surroundings | None = None,
) -> tuple[Alternative, ...]:
    state = state or state_of()
    (base,) = ruleset.base_chains(state.hook)
    return traverse(ruleset, base, state, env or Surroundings())


def rules_hit(alternative: Alternative) -> list[str]:
    """``chain:position`` of each rule of an alternative."""
    return [
        f"{step.citation.chain}:{step.citation.position}"
        for step in alternative.steps
        if step.citation is not None and step.citation.position
    ]


def kinds(alternatives: tuple[Alternative, ...]) -> list[str]:
    return [alternative.verdict.kind.value for alternative in alternatives]
