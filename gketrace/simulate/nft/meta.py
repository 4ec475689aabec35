"""What surrounds the packet: meta, ct, fib, and what only the running kernel knows.

Source: net/netfilter/nft_meta.c, nft_ct.c, nft_fib.c, net/ipv4/netfilter/nft_fib_ipv4.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from gketrace.conntrack import CtState, CtStatus
from gketrace.packet import Protocol, Tuple5
from gketrace.simulate.matches.base import is_tracked
from gketrace.simulate.nft.datatypes import read_scalar
from gketrace.simulate.nft.scene import Scene
from gketrace.simulate.nft.values import BREAK, NotKnown, Value
from gketrace.simulate.state import CtInfo, Direction
from gketrace.snapshot import Unavailable
from gketrace.trace import Hook

__all__ = ["ct", "ct_type", "fib", "fib_type", "meta", "meta_type"]

Json: TypeAlias = Any

_ETHER, _LOOPBACK = 1, 772
_META_TYPES: Final[Mapping[str, str]] = {
    "mark": "mark",
    "l4proto": "inet_proto",
    "protocol": "ether_type",
    "nfproto": "nf_proto",
    "iif": "iface_index",
    "oif": "iface_index",
    "sdif": "iface_index",
    "iifname": "ifname",
    "oifname": "ifname",
    "sdifname": "ifname",
    "ibrname": "ifname",
    "obrname": "ifname",
    "iifkind": "ifname",
    "oifkind": "ifname",
    "iiftype": "iface_type",
    "oiftype": "iface_type",
    "skuid": "uid",
    "skgid": "gid",
    "pkttype": "pkt_type",
    "length": "integer",
    "iifgroup": "devgroup",
    "oifgroup": "devgroup",
}


def meta_type(body: Json) -> str:
    return _META_TYPES.get(body["key"], "unsupported")


def _iface_type(name: str, scene: Scene) -> Value:
    if not name:
        return BREAK
    link = scene.env.links.get(name)
    if link is None:
        return NotKnown(f"the interface {name} is not known")
    if "LOOPBACK" in link.flags:
        return _LOOPBACK
    return _ETHER if link.mac else NotKnown(f"the hardware type of {name} is not known")


def _iface_kind(name: str, scene: Scene) -> Value:
    if not name:
        return BREAK
    link = scene.env.links.get(name)
    if link is None:
        return NotKnown(f"the interface {name} is not known")
    # Without rtnl_link_ops (lo, hardware) the expression breaks.
    return link.kind or BREAK


def _iface_group(name: str, scene: Scene) -> Value:
    if not name:
        return BREAK
    link = scene.env.links.get(name)
    return NotKnown(f"the interface {name} is not known") if link is None else link.group


def _owner(number: int | None, what: str, scene: Scene) -> Value:
    state = scene.state
    if state.in_iface:
        # nft_meta_get_eval_skugid(): no socket yet, but early demux finds that of a connection.
        if state.hook is Hook.INPUT and state.ct is not None and state.ct.existing:
            return NotKnown("whose socket takes the packet is not known")
        return BREAK
    return NotKnown(f"the {what} of the sending socket is not known") if number is None else number


_META: Final[Mapping[str, Callable[[Scene], Value]]] = {
    "mark": lambda s: s.packet.mark,
    "l4proto": lambda s: s.packet.protocol,
    "protocol": lambda s: 0x0800 if s.packet.family == 4 else 0x86DD,
    "nfproto": lambda s: 2 if s.packet.family == 4 else 10,
    "iif": lambda s: s.state.in_iface,
    "oif": lambda s: s.state.out_iface,
    "iifname": lambda s: s.state.in_iface,
    "oifname": lambda s: s.state.out_iface,
    "iiftype": lambda s: _iface_type(s.state.in_iface, s),
    "oiftype": lambda s: _iface_type(s.state.out_iface, s),
    "iifkind": lambda s: _iface_kind(s.state.in_iface, s),
    "oifkind": lambda s: _iface_kind(s.state.out_iface, s),
    "iifgroup": lambda s: _iface_group(s.state.in_iface, s),
    "oifgroup": lambda s: _iface_group(s.state.out_iface, s),
    "skuid": lambda s: _owner(s.state.uid, "user", s),
    "skgid": lambda s: _owner(s.state.gid, "group", s),
    "length": lambda s: (
        NotKnown("the packet's length is not known") if s.packet.length is None else s.packet.length
    ),
}


def meta(body: Json, scene: Scene) -> Value:
    """``{"meta": {"key": …}}``."""
    key = body["key"]
    read = _META.get(key)
    return NotKnown(f"meta {key} is not known") if read is None else read(scene)


# -- connection tracking ----------------------------------------------------------------------

_CT_TYPES: Final[Mapping[str, str]] = {
    "state": "ct_state",
    "direction": "ct_dir",
    "status": "ct_status",
    "mark": "mark",
    "label": "ct_label",
    "l3proto": "nf_proto",
    "protocol": "inet_proto",
    "ip saddr": "ipv4_addr",
    "ip daddr": "ipv4_addr",
    "ip6 saddr": "ipv6_addr",
    "ip6 daddr": "ipv6_addr",
    "proto-src": "inet_service",
    "proto-dst": "inet_service",
    "zone": "integer",
}
_STATE_BITS: Final[Mapping[CtState, int]] = {
    CtState.INVALID: 1,
    CtState.ESTABLISHED: 2,
    CtState.RELATED: 4,
    CtState.NEW: 8,
    CtState.UNTRACKED: 64,
}
_NAMED_STATUS: Final = CtStatus((1 << 15) - 1)


def ct_type(body: Json, scene: Scene) -> str:
    key = body["key"]
    if key in ("saddr", "daddr"):
        family = body.get("family") or ("ip" if scene.packet.family == 4 else "ip6")
        return "ipv4_addr" if family == "ip" else "ipv6_addr"
    return _CT_TYPES.get(key, "unsupported")


def ct(body: Json, scene: Scene) -> Value:
    """``{"ct": {"key": …, "dir": …}}`` (nft_ct_get_eval)."""
    state, key = scene.state, body["key"]
    info = state.ct
    tracked = info is not None and is_tracked(state)
    if key == "state":
        if info is not None and tracked:
            return _STATE_BITS[info.state]
        untracked = state.notrack or (info is not None and info.state is CtState.UNTRACKED)
        return _STATE_BITS[CtState.UNTRACKED if untracked else CtState.INVALID]
    if info is None or not tracked or info.template:
        # Of a template, only the state is told.
        return BREAK
    if "dir" in body:
        side = info.orig if body["dir"] == "original" else info.reply
        return _tuple_field(key, side)
    return _entry_field(key, info)


def _entry_field(key: str, info: CtInfo) -> Value:
    if key == "direction":
        return 0 if info.direction is Direction.ORIGINAL else 1
    if key == "status":
        return info.status & _NAMED_STATUS
    if key == "mark":
        return info.mark
    if key == "zone":
        return info.zone
    if key == "label":
        return info.labels
    if key == "protocol" and info.orig is not None:
        return info.orig.protocol
    if key == "l3proto" and info.orig is not None:
        return 2 if info.orig.src.version == 4 else 10
    return NotKnown(f"the connection's {key} is not known")


def _tuple_field(key: str, side: Tuple5 | None) -> Value:
    if side is None:
        return NotKnown("the connection's tuple is not known")
    family, _, end = key.rpartition(" ")
    if end in ("saddr", "daddr"):
        if family and side.src.version != (4 if family == "ip" else 6):
            return BREAK
        return int(side.src if end == "saddr" else side.dst)
    if key == "proto-src":
        return NotKnown("the connection's source port") if side.sport is None else side.sport
    if key == "proto-dst":
        if side.protocol in (Protocol.ICMP, Protocol.ICMPV6):
            if side.icmp_type is None:
                return NotKnown("the connection's ICMP type")
            return side.icmp_type << 8 | (side.icmp_code or 0)
        return NotKnown("the connection's destination port") if side.dport is None else side.dport
    if key == "protocol":
        return side.protocol
    if key == "l3proto":
        return 2 if side.src.version == 4 else 10
    return NotKnown(f"the connection's {key} is not known")


# -- routing ----------------------------------------------------------------------------------


def fib_type(body: Json) -> str:
    result = body.get("result")
    return {"type": "fib_addrtype", "oif": "iface_index", "oifname": "ifname"}.get(
        str(result), "boolean"
    )


def fib(body: Json, scene: Scene) -> Value:
    """``fib saddr|daddr [. mark] [. iif|oif] type|oif|oifname``."""
    flags = body["flags"]
    flags = [flags] if isinstance(flags, str) else flags
    if body["result"] == "type":
        return _fib_address_type(flags, scene)
    return _fib_interface(flags, scene)


def _fib_address_type(flags: list[str], scene: Scene) -> Value:
    """nft_fib4_eval_type(), __nft_fib6_eval_type()."""
    state, packet = scene.state, scene.packet
    address = packet.dst if "daddr" in flags else packet.src
    interface = None
    if "iif" in flags:
        interface = state.in_iface or None
    elif "oif" in flags:
        interface = state.out_iface or None
    if packet.family == 6 and address.is_multicast:
        return read_number("multicast")
    found = scene.env.address_type(address, interface)
    if interface is not None and packet.family == 6 and not address.is_link_local:
        # Unlike addrtype, the look-up is not bound to the device: it only decides what is local.
        anywhere = scene.env.address_type(address, None)
        if found != "LOCAL":
            found = "UNICAST" if anywhere == "LOCAL" else anywhere
    if isinstance(found, Unavailable):
        return NotKnown(found.reason)
    return read_number(found.lower())


def read_number(name: str) -> int:
    value = read_scalar(name, "fib_addrtype")
    return value if isinstance(value, int) else 0


def _fib_interface(flags: list[str], scene: Scene) -> Value:
    """nft_fib4_eval(): the interface that the route back to the source leaves by.

    Only whether it is the input interface is known here, from the reverse-path check.
    """
    state = scene.state
    if "saddr" not in flags or "iif" not in flags or not state.in_iface:
        return NotKnown("which interface the route look-up names is not simulated")
    link = scene.env.links.get(state.in_iface)
    if link is None:
        return NotKnown(f"the interface {state.in_iface} is not known")
    if "LOOPBACK" in link.flags and state.hook is not Hook.PREROUTING:
        return NotKnown("the route look-up of a packet over the loopback is not simulated")
    found = scene.env.reverse_path(
        scene.packet,
        state.in_iface,
        loose=False,
        validmark="mark" in flags,
        accept_local=False,
    )
    if isinstance(found, Unavailable):
        return NotKnown(found.reason)
    return state.in_iface if found else ""
