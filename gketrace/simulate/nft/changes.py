"""What a rule changes: marks, header fields, elements of sets.

Source: nft_meta_set_eval(), nft_ct_set_eval(), nft_payload_set_eval(), nft_dynset_eval().
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeAlias

from gketrace.packet import Packet, Protocol
from gketrace.simulate.evolve import evolve
from gketrace.simulate.matches.base import is_tracked
from gketrace.simulate.nft.expressions import types_of
from gketrace.simulate.nft.lookup import as_key, change_name, element_key
from gketrace.simulate.nft.payload import payload
from gketrace.simulate.nft.scene import Scene
from gketrace.simulate.nft.values import BREAK, NotKnown, Value
from gketrace.simulate.state import PacketState, SetChange
from gketrace.simulate.tracking import template

__all__ = ["Unclear", "change_set", "mangle", "mangle_types"]

Json: TypeAlias = Any

_HARMLESS_META = frozenset(("priority", "nftrace", "pkttype", "secmark", "broute"))
_HARMLESS_CT = frozenset(("event", "eventmask", "secmark", "timeout", "helper"))


class Unclear(Exception):
    """The packet after a change is not known; ``str()`` says why."""


def mangle_types(key: Json, scene: Scene) -> tuple[str, ...]:
    """What constants are read as that are put into `key`."""
    return types_of(key, scene)


def mangle(key: Json, value: Value, scene: Scene) -> PacketState | None:
    """The state after ``KEY set VALUE``; None: the rule breaks.  Raises `Unclear`."""
    ((kind, body),) = key.items()
    if kind == "meta":
        return _set_meta(body["key"], value, scene)
    if kind == "ct":
        return _set_ct(body["key"], value, scene)
    if kind == "payload":
        return _set_payload(body, value, scene)
    if kind == "tcp option":
        # nft_exthdr_tcp_set_eval() breaks for what is not TCP, not for a missing option.  What
        # an option says does not decide where the packet goes.
        tcp = scene.packet.protocol == Protocol.TCP and not scene.packet.fragment
        return scene.state if tcp else None
    raise Unclear(f"setting {kind} is not modelled")


def _number(value: Value, what: str) -> int:
    if isinstance(value, NotKnown):
        raise Unclear(f"{what} becomes a value that is not known: {value.reason}")
    if not isinstance(value, int):
        raise Unclear(f"{what} becomes {value!r}")
    return value


def _set_meta(key: str, value: Value, scene: Scene) -> PacketState:
    if key in _HARMLESS_META:
        return scene.state
    if key != "mark":
        raise Unclear(f"setting meta {key} is not modelled")
    mark = _number(value, "the mark")
    return evolve(scene.state, packet=evolve(scene.packet, mark=mark))


def _set_ct(key: str, value: Value, scene: Scene) -> PacketState:
    state = scene.state
    if key == "zone":
        if state.ct is not None and is_tracked(state):
            return state
        # nft_ct_set_zone_eval(): over an earlier notrack, too, which is then forgotten.
        zone = _number(value, "the conntrack zone")
        return evolve(state, zone=zone, notrack=False, ct=template(state.packet.family, zone))
    if key in _HARMLESS_CT or state.ct is None or state.ct.template or not is_tracked(state):
        # nft_ct_set_eval() returns quietly where there is no entry, or a template.
        return state
    if key == "mark":
        return evolve(state, ct=evolve(state.ct, mark=_number(value, "the ct mark")))
    if key == "label":
        labels = state.ct.labels | _number(value, "the ct label")
        return evolve(state, ct=evolve(state.ct, labels=labels))
    raise Unclear(f"setting ct {key} is not modelled")


def _set_payload(body: Json, value: Value, scene: Scene) -> PacketState | None:
    if payload(body, scene) is BREAK:
        return None
    header, field = body.get("protocol"), body.get("field")
    if field in ("checksum", "id", "flowlabel"):
        return scene.state
    what = f"{header} {field}"
    changed = _with(scene.packet, str(header), str(field), _number(value, what))
    if changed is None:
        raise Unclear(f"writing {what} into the packet is not modelled")
    return evolve(scene.state, packet=changed)


def _with(packet: Packet, header: str, field: str, value: int) -> Packet | None:
    if field == "dscp":
        return evolve(packet, dscp=value & 0x3F)
    if field == "ecn":
        return evolve(packet, ecn=value & 3)
    if field in ("ttl", "hoplimit"):
        return evolve(packet, ttl=value & 0xFF)
    if header in ("ip", "ip6") and field in ("saddr", "daddr"):
        address = IPv4Address(value) if header == "ip" else IPv6Address(value)
        if field == "saddr":
            return evolve(packet, src=address)
        return evolve(packet, dst=address)
    if field == "sport" and packet.has_ports:
        return evolve(packet, sport=value & 0xFFFF)
    if field == "dport" and packet.has_ports:
        return evolve(packet, dport=value & 0xFFFF)
    if header == "tcp" and field == "flags":
        return evolve(packet, tcp_flags=value & 0xFF)
    return None


def change_set(body: Json, key: Value, scene: Scene) -> PacketState:
    """``add|update|delete @SET { KEY }``.  Raises `Unclear`."""
    name = (body.get("set") or body.get("map") or "").removeprefix("@")
    if scene.ruleset.set(name) is None:
        raise Unclear(f"no set {name} in table {scene.ruleset.table}")
    parts = as_key(key)
    for part in parts:
        if isinstance(part, NotKnown):
            raise Unclear(f"which element of {name} is not known: {part.reason}")
    change = SetChange(
        name=change_name(scene, name), element=element_key(parts), add=body["op"] != "delete"
    )
    state = scene.state
    kept = tuple(c for c in state.sets if (c.name, c.element) != (change.name, change.element))
    return evolve(state, sets=(*kept, change))
