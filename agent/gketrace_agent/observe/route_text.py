"""A route as ``ip route show table all`` prints it (iproute2, ip/iproute.c print_route())."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from gketrace.snapshot import IPNetwork, NextHop, Route, RouteType
from gketrace_agent.kernel.netlink import text as netlink_text
from gketrace_agent.kernel.netlink import u32
from gketrace_agent.observe.names import protocol_text, scope_name, table_text

__all__ = ["RouteDetails", "prefix_text", "route_text"]

_RT_TABLE_MAIN: Final = 254
_RTPROT_BOOT: Final = 3
_RT_SCOPE_UNIVERSE: Final = 0
_LOCK: Final = 1
_CC_ALGO: Final = 16
_METRICS: Final = {
    2: "mtu",
    3: "window",
    4: "rtt",
    5: "rttvar",
    6: "ssthresh",
    7: "cwnd",
    8: "advmss",
    9: "reordering",
    10: "hoplimit",
    11: "initcwnd",
    12: "features",
    13: "rto_min",
    14: "initrwnd",
    15: "quickack",
    16: "congctl",
    17: "fastopen_no_cookie",
}
"""RTAX_* → the word that ip uses."""
_PREFERENCES: Final = {0: "medium", 1: "high", 3: "low"}
_ENCAPSULATIONS: Final = {
    1: "mpls",
    2: "ip",
    3: "ila",
    4: "ip6",
    5: "seg6",
    6: "bpf",
    7: "seg6local",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDetails:
    """What ip prints of a route and `Route` does not hold."""

    has_dst: bool
    scope: int
    flags: tuple[str, ...]
    single: bool
    """The next hop is in the route itself, not in a list."""
    metric: int | None
    metrics: Mapping[int, bytes]
    nhid: int | None
    mark: int | None
    realm: int | None
    pref: int | None
    encap: int | None
    expires: int | None
    error: int


def prefix_text(network: IPNetwork) -> str:
    """``10.0.0.0/8``, and a host's address without its length, as ip prints both."""
    full = network.prefixlen == network.max_prefixlen
    return str(network.network_address) if full else str(network)


def route_text(route: Route, details: RouteDetails, link_name: Callable[[int], str]) -> str:
    """One line, without the blank that ip leaves at its end; several next hops are joined by
    blanks where ip starts new lines."""
    words: list[str] = []
    if route.type is not RouteType.UNICAST:
        words.append(route.type.value)
    if details.has_dst:
        words.append(prefix_text(route.dst))
    else:
        words.append("default" if not route.dst.prefixlen else f"0/{route.dst.prefixlen}")
    if route.src is not None:
        words += ["from", prefix_text(route.src)]
    if details.nhid is not None:
        words += ["nhid", str(details.nhid)]
    if details.encap is not None:
        words += ["encap", _ENCAPSULATIONS.get(details.encap, str(details.encap))]
    if route.tos:
        words += ["tos", f"{route.tos:#04x}"]
    if details.single:
        for hop in route.next_hops:
            words += _hop(route, hop, link_name)
    if route.table != _RT_TABLE_MAIN:
        words += ["table", table_text(route.table)]
    if route.protocol != _RTPROT_BOOT:
        words += ["proto", protocol_text(route.protocol)]
    if details.scope != _RT_SCOPE_UNIVERSE:
        words += ["scope", scope_name(details.scope)]
    if route.prefsrc is not None:
        words += ["src", str(route.prefsrc)]
    if details.metric is not None:
        words += ["metric", str(details.metric)]
    words += details.flags
    if details.mark:
        words += ["mark", f"{details.mark:#x}" if details.mark >= 16 else str(details.mark)]
    if details.realm is not None:
        source, destination = details.realm >> 16, details.realm & 0xFFFF
        words += ["realms", f"{source}/{destination}" if source else str(destination)]
    if details.expires is not None:
        words += ["expires", f"{details.expires}sec"]
    if details.error:
        words += ["error", str(details.error)]
    words += _metrics(details.metrics)
    if details.pref is not None:
        words += ["pref", _PREFERENCES.get(details.pref, str(details.pref))]
    if not details.single:
        for hop in route.next_hops:
            words += ["nexthop", *_hop(route, hop, link_name)]
            words += ["weight", str(hop.weight), *hop.flags]
    return " ".join(words)


def _hop(route: Route, hop: NextHop, link_name: Callable[[int], str]) -> list[str]:
    words: list[str] = []
    if hop.gateway is not None:
        words.append("via")
        if hop.gateway.version != route.family:
            words.append("inet6" if hop.gateway.version == 6 else "inet")
        words.append(str(hop.gateway))
    if hop.oif is not None:
        words += ["dev", link_name(hop.oif)]
    return words


def _metrics(metrics: Mapping[int, bytes]) -> list[str]:
    """iproute2 print_rta_metrics()."""
    words: list[str] = []
    locked = u32(metrics.get(_LOCK, b""))
    for number in sorted(metrics):
        if number == _LOCK:
            continue
        words.append(_METRICS.get(number, f"metric {number}"))
        if locked & (1 << number):
            words.append("lock")
        words.append(_metric(number, metrics[number]))
    return words


def _metric(number: int, raw: bytes) -> str:
    if number == _CC_ALGO:
        return netlink_text(raw)
    (value,) = struct.unpack_from("=I", raw)
    if number == 12:
        return _features(value)
    if number in (4, 5, 13):
        # The kernel keeps rtt in units of 1/8 ms and rttvar in 1/4 ms.
        value = value // 8 if number == 4 else value // 4 if number == 5 else value
        return f"{value / 1000:g}s" if value >= 1000 else f"{value}ms"
    return str(value)


def _features(value: int) -> str:
    words = []
    if value & 1:
        words.append("ecn")
        value &= ~1
    if value & 8:
        words.append("tcp_usec_ts")
        value &= ~8
    if value:
        words.append(f"{value:#x}")
    return " ".join(words)
