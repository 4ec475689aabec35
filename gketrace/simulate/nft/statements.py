"""One rule's statements, one after the other, for one packet (nft_do_chain's inner loop).

A statement may end the rule with a verdict, break it (the rule has not matched; what it changed
before stays changed), or let the next one run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from gketrace.conntrack import CtState
from gketrace.packet import Protocol
from gketrace.ruleset.nft import NftRule, NftRuleset, NftSet
from gketrace.simulate.evolve import evolve
from gketrace.simulate.nft.changes import Unclear, change_set, mangle
from gketrace.simulate.nft.expressions import evaluate, types_of
from gketrace.simulate.nft.lookup import find_data
from gketrace.simulate.nft.matching import match
from gketrace.simulate.nft.nat import nat_ways
from gketrace.simulate.nft.scene import NftEnvironment, Scene
from gketrace.simulate.nft.values import BREAK, NotKnown, Value
from gketrace.simulate.nft.ways import (
    Json,
    Way,
    along,
    decide,
    either,
    not_modelled,
    queue,
    single,
    stop,
    verdict,
    without_doubles,
)
from gketrace.simulate.state import CERTAIN, PacketState, VerdictKind
from gketrace.simulate.watched import Rebase, note_instead, noted
from gketrace.trace import StepAction

__all__ = ["run_rule"]


def run_rule(
    rule: NftRule, state: PacketState, env: NftEnvironment, ruleset: NftRuleset
) -> list[Way]:
    """All that one rule may do to the packet; the chances sum to 1 where all are known."""
    done: list[Way] = []
    open_ = [Way(state=state)]
    for statement in rule.statements:
        further: list[Way] = []
        for way in open_:
            scene = Scene(way.state, env, ruleset)
            for after in _run(statement, way, scene):
                (done if after.broken or after.effect is not None else further).append(after)
        open_ = further
        if not open_:
            break
    return without_doubles(open_ + done)


def _run(statement: Json, way: Way, scene: Scene) -> list[Way]:
    kind, body = single(statement)
    run = _STATEMENTS.get(kind)
    try:
        if run is None:
            return not_modelled(statement, way, f"the statement {kind or statement!r}")
        before = noted(way.state) if kind in _TESTS and _is_first(way) else None
        if before is None:
            return run(kind, body, way, scene)
        ways = run(kind, body, way, scene)
        if _breaks(ways, way):
            # Most packets are not in most sets: that is all that later packets have in common.
            note_instead(way.state, before, _Breaks(run, kind, body, scene))
        return ways
    except Unclear as why:
        return [stop(way, str(why))]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        # JSON of another shape than this version knows, or a constant of an unknown type.
        return not_modelled(statement, way, str(error) or type(error).__name__)


_TESTS: Final = frozenset(("match", "vmap"))


def _is_first(way: Way) -> bool:
    return way.chance is CERTAIN and not way.drawn and not way.unknown and not way.notes


def _breaks(ways: list[Way], way: Way) -> bool:
    """Whether the rule has not matched, for certain, and nothing else has come of it."""
    only = ways[0] if len(ways) == 1 else None
    return only is not None and only.broken and only.state is way.state and _is_first(only)


class _Breaks:
    """That a test breaks its rule."""

    __slots__ = ("_body", "_kind", "_run", "_scene")

    def __init__(
        self, run: Callable[[str, Json, Way, Scene], list[Way]], kind: str, body: Json, scene: Scene
    ) -> None:
        self._run, self._kind, self._body, self._scene = run, kind, body, scene

    def holds(self, rebase: Rebase) -> bool:
        seen = self._scene
        way = Way(state=rebase.state(seen.state))
        scene = Scene(way.state, seen.env, seen.ruleset)
        try:
            return _breaks(self._run(self._kind, self._body, way, scene), way)
        except (Unclear, ValueError, KeyError, TypeError, AttributeError, IndexError):
            # The rule itself then says what is not understood.
            return False


def _run_verdict(kind: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    return [decide(kind, body, way)]


def _run_match(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    ways: list[Way] = []
    for branch in match(body, scene):
        if isinstance(branch.value, NotKnown):
            ways += either(along(way, branch), branch.value.reason)
        else:
            ways.append(
                along(way, branch, broken=True) if branch.value is BREAK else along(way, branch)
            )
    return ways


def _run_vmap(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    chosen: list[Json] = []

    def read(data: Json, __: NftSet | None) -> Value:
        # Verdicts are no register values: the branch holds the verdict's place in a list.
        if data not in chosen:
            chosen.append(data)
        return chosen.index(data)

    keys = evaluate(body["key"], scene)
    ways: list[Way] = []
    for branch in find_data(body, scene, keys, types_of(body["key"], scene), read):
        if branch.value is BREAK:
            ways.append(along(way, branch, broken=True))
        elif isinstance(branch.value, int):
            kind, target = single(chosen[branch.value])
            ways.append(decide(kind, target, along(way, branch)))
        elif isinstance(branch.value, NotKnown):
            unsure = evolve(along(way, branch), chance=None)
            reason = branch.value.reason
            ways += either(unsure, reason)[1:]
            ways.append(stop(evolve(unsure, unknown=(*unsure.unknown, reason)), reason))
    return ways


def _run_mangle(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    key = body["key"]
    ways: list[Way] = []
    for branch in evaluate(body["value"], scene, types_of(key, scene)):
        onward = along(way, branch)
        if branch.value is BREAK:
            ways.append(evolve(onward, broken=True))
            continue
        try:
            state = mangle(key, branch.value, scene)
        except Unclear as why:
            ways.append(stop(onward, str(why)))
            continue
        if state is None:
            ways.append(evolve(onward, broken=True))
        else:
            ways.append(evolve(onward, state=state))
    return ways


def _run_set(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    """nft_dynset_eval(): the element is there afterwards; a limit of its own may break the rule."""
    element = body["elem"]
    if isinstance(element, dict) and "elem" in element:
        element = element["elem"]["val"]
    name = (body.get("set") or body.get("map") or "").removeprefix("@")
    declared = scene.ruleset.set(name)
    ways: list[Way] = []
    for branch in evaluate(element, scene, declared.types if declared is not None else ()):
        onward = along(way, branch)
        if branch.value is BREAK:
            ways.append(evolve(onward, broken=True))
            continue
        try:
            onward = evolve(onward, state=change_set(body, branch.value, scene))
        except Unclear as why:
            # The packet is what it was; only later look-ups would see the difference.
            onward = evolve(onward, notes=(*onward.notes, str(why)))
        gate = next((k for s in body.get("stmt", ()) for k in s if k in _GATES), "")
        ways += either(onward, f"the {gate} of the element") if gate else [onward]
    return ways


_GATES: Final = frozenset(("limit", "quota", "ct count"))


def _run_nat(kind: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    ways: list[Way] = []
    for found in nat_ways(kind, body, scene):
        onward = along(way, found.branch)
        if found.branch.value is BREAK:
            ways.append(evolve(onward, broken=True))
        elif isinstance(found.branch.value, NotKnown):
            ways.append(stop(onward, found.branch.value.reason))
        elif found.request is None:
            ways.append(onward)
        else:
            ways.append(verdict(onward, VerdictKind.ACCEPT, StepAction.ACCEPT, nat=found.request))
    return ways


_REJECTS: Final[Mapping[tuple[str, str], str]] = {
    ("icmp", "net-unreachable"): "icmp-net-unreachable",
    ("icmp", "host-unreachable"): "icmp-host-unreachable",
    ("icmp", "prot-unreachable"): "icmp-proto-unreachable",
    ("icmp", "port-unreachable"): "icmp-port-unreachable",
    ("icmp", "net-prohibited"): "icmp-net-prohibited",
    ("icmp", "host-prohibited"): "icmp-host-prohibited",
    ("icmp", "admin-prohibited"): "icmp-admin-prohibited",
    ("icmpv6", "no-route"): "icmp6-no-route",
    ("icmpv6", "admin-prohibited"): "icmp6-adm-prohibited",
    ("icmpv6", "addr-unreachable"): "icmp6-addr-unreachable",
    ("icmpv6", "port-unreachable"): "icmp6-port-unreachable",
    ("icmpv6", "policy-fail"): "icmp6-policy-fail",
    ("icmpv6", "reject-route"): "icmp6-reject-route",
}
"""iptables' names, which the rest of the program uses."""
_ICMPX: Final[Mapping[str, tuple[str, str]]] = {
    "no-route": ("net-unreachable", "no-route"),
    "port-unreachable": ("port-unreachable", "port-unreachable"),
    "host-unreachable": ("host-unreachable", "addr-unreachable"),
    "admin-prohibited": ("admin-prohibited", "admin-prohibited"),
}
"""icmp_code_v4[] and icmp_code_v6[] of nft_reject.c."""


def _run_reject(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    body = body or {}
    six = scene.packet.family == 6
    kind, code = body.get("type", "icmpx"), body.get("expr", "port-unreachable")
    if kind == "tcp reset":
        # nft adds the test for TCP by itself.
        if scene.packet.protocol != Protocol.TCP:
            return [evolve(way, broken=True)]
        answer = "tcp-reset"
    else:
        if kind == "icmpx":
            kind, code = ("icmpv6" if six else "icmp"), _ICMPX[code][six]
        if (kind == "icmpv6") is not six:
            return [evolve(way, broken=True)]
        answer = _REJECTS.get((kind, code), f"{kind} {code}")
    return [verdict(way, VerdictKind.REJECT, StepAction.REJECT, reject_with=answer)]


def _run_notrack(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    """nft_notrack_eval(): nothing when an entry or a template is attached."""
    if way.state.ct is not None and way.state.ct.state is not CtState.INVALID:
        return [way]
    return [evolve(way, state=evolve(way.state, notrack=True))]


def _run_passing(kind: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    """Counts or tells; an object map without the key breaks the rule."""
    if isinstance(body, dict) and "map" in body:
        inner = body["map"]
        keys = evaluate(inner["key"], scene)
        types = types_of(inner["key"], scene)
        found = find_data(inner, scene, keys, types, lambda data, _: str(data))
        return [
            passed
            for branch in found
            for passed in (
                either(along(way, branch), branch.value.reason)
                if isinstance(branch.value, NotKnown)
                else [along(way, branch, broken=branch.value is BREAK)]
            )
        ]
    return [way]


def _run_gate(kind: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    """limit, quota, connlimit: state that changes with every packet."""
    return either(way, f"how much the {kind} has left")


def _run_tproxy(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    """nft_tproxy_eval(): breaks where no socket is found."""
    if scene.packet.protocol not in (Protocol.TCP, Protocol.UDP):
        return [evolve(way, broken=True)]
    if {"ip": 4, "ip6": 6}.get(body.get("family", ""), scene.packet.family) != scene.packet.family:
        return [evolve(way, broken=True)]
    return either(way, "whether a transparent socket takes the packet")


def _run_synproxy(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    """nft_synproxy_do_eval(): takes SYN and the ACK after it, breaks for what is not TCP."""
    if scene.packet.protocol != Protocol.TCP:
        return [evolve(way, broken=True)]
    note = "the kernel answers the handshake in the receiver's place"
    taken = verdict(way, VerdictKind.STOLEN, StepAction.UNKNOWN, note=note)
    return [taken]


def _run_flow(_: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    """nft_flow_offload_eval(): breaks until the connection is established."""
    return either(way, "whether the connection can be offloaded")


def _run_queue(kind: str, body: Json, way: Way, scene: Scene) -> list[Way]:
    return [queue(way)]


_STATEMENTS: Final[Mapping[str, Callable[[str, Json, Way, Scene], list[Way]]]] = {
    **dict.fromkeys(("accept", "drop", "continue", "return", "jump", "goto"), _run_verdict),
    "match": _run_match,
    "vmap": _run_vmap,
    "mangle": _run_mangle,
    "set": _run_set,
    "map": _run_set,
    **dict.fromkeys(("dnat", "snat", "masquerade", "redirect"), _run_nat),
    "reject": _run_reject,
    "notrack": _run_notrack,
    **dict.fromkeys(
        ("counter", "log", "last", "dup", "ct helper", "ct timeout", "ct expectation"),
        _run_passing,
    ),
    **dict.fromkeys(("limit", "quota", "ct count"), _run_gate),
    "tproxy": _run_tproxy,
    "synproxy": _run_synproxy,
    "flow": _run_flow,
    "queue": _run_queue,
}
