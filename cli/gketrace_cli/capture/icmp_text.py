"""ICMP and ICMPv6 as tcpdump (4.99) writes them: print-icmp.c, print-icmp6.c."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gketrace.capture.layers import Icmp, Ip4, Ip6, Sctp, Tcp, Udp
from gketrace.packet import protocol_name

__all__ = ["icmp6_text", "icmp_text"]

_UNREACHABLE: Final = {
    0: "net {dst} unreachable",
    1: "host {dst} unreachable",
    5: "{dst} unreachable - source route failed",
    6: "net {dst} unreachable - unknown",
    7: "host {dst} unreachable - unknown",
    8: "{dst} unreachable - source host isolated",
    9: "net {dst} unreachable - admin prohibited",
    10: "host {dst} unreachable - admin prohibited",
    11: "net {dst} unreachable - tos prohibited",
    12: "host {dst} unreachable - tos prohibited",
    13: "host {dst} unreachable - admin prohibited filter",
    14: "host {dst} unreachable - host precedence violation",
    15: "host {dst} unreachable - precedence cutoff",
}
_REDIRECTS: Final = ("net", "host", "tos host", "tos net")
_UNREACHABLE6: Final = {
    0: "unreachable route {dst}",
    1: " unreachable prohibited {dst}",
    2: "beyond scope {dst}, source address {src}",
    3: "unreachable address {dst}",
}
_ICMP6: Final = {
    130: "multicast listener query",
    131: "multicast listener report",
    132: "multicast listener done",
    133: "router solicitation",
    134: "router advertisement",
    137: "redirect",
    143: "multicast listener report v2",
}
_ERRORS6: Final = {
    1: "destination unreachable",
    2: "packet too big",
    3: "time exceeded",
    4: "parameter problem",
}


def icmp_text(icmp: Icmp, size: int, at: Callable[[bytes], str]) -> str:
    """`size`: of the message; `at` writes an address."""
    quoted = icmp.quoted.network if icmp.quoted is not None else None
    destination = at(quoted.destination) if isinstance(quoted, Ip4) else ""
    kind, code = icmp.type, icmp.code
    if kind in (0, 8):
        word = "request" if kind == 8 else "reply"
        body = f"echo {word}, id {icmp.id}, seq {icmp.sequence}"
    elif kind in (3, 5) and not destination:
        return " [|icmp]"
    elif kind == 3:
        body = _unreachable(icmp, destination)
    elif kind == 5:
        gateway = at(icmp.rest.to_bytes(4, "big"))
        what = _REDIRECTS[code] if code < 4 else f"#{code}"
        body = f"redirect {destination} to {what} {gateway}"
    elif kind == 11:
        body = "ip reassembly time exceeded" if code == 1 else "time exceeded in-transit"
    elif kind == 12:
        body = f"parameter problem - octet {icmp.rest >> 24}"
    else:
        body = f"type-#{kind}"
    return f"ICMP {body}, length {size}"


def _unreachable(icmp: Icmp, destination: str) -> str:
    code = icmp.code
    if code in _UNREACHABLE:
        return _UNREACHABLE[code].format(dst=destination)
    if code == 4:
        mtu = f" (mtu {icmp.sequence})" if icmp.sequence else ""
        return f"{destination} unreachable - need to frag{mtu}"
    if code in (2, 3):
        return f"{destination} {_refused(icmp, code)} unreachable"
    return f"{destination} unreachable - #{code}"


def _refused(icmp: Icmp, code: int) -> str:
    """What an unreachable port or protocol was."""
    quoted = icmp.quoted
    ip = quoted.network if quoted is not None else None
    layer = quoted.transport if quoted is not None else None
    protocol = ip.protocol if isinstance(ip, Ip4 | Ip6) else 0
    if code == 3 and isinstance(layer, Tcp | Udp):
        return f"{protocol_name(protocol)} port {layer.dport}"
    if code == 3 and isinstance(layer, Sctp):
        return f"protocol {protocol} port {layer.dport}"
    return f"protocol {protocol}"


def icmp6_text(icmp: Icmp, payload: bytes, size: int, at: Callable[[bytes], str]) -> str:
    """`payload`: what was captured behind the first eight bytes."""
    quoted = icmp.quoted.network if icmp.quoted is not None else None
    kind, code = icmp.type, icmp.code
    destination = source = ""
    if isinstance(quoted, Ip6):
        destination, source = at(quoted.destination), at(quoted.source)
    if kind in (128, 129):
        word = "request" if kind == 128 else "reply"
        body = f"echo {word}, id {icmp.id}, seq {icmp.sequence}"
    elif kind in _ERRORS6 and not destination:
        return f"ICMP6, {_ERRORS6[kind]} [|icmp6]"
    elif kind == 1 and code in _UNREACHABLE6:
        what = _UNREACHABLE6[code].format(dst=destination, src=source)
        body = f"destination unreachable, {what}"
    elif kind == 1 and code == 4:
        port = _refused(icmp, 3)
        body = f"destination unreachable, unreachable port, {destination} {port}"
    elif kind == 1:
        body = f"destination unreachable, unknown unreach code ({code})"
    elif kind == 2:
        body = f"packet too big, mtu {icmp.rest}"
    elif kind == 3:
        transit = f"in-transit for {destination}" if code == 0 else "in-transit (reassembly)"
        body = f"time exceeded {transit}"
    elif kind == 4:
        what = ("errorneous", "next header", "option")[code] if code < 3 else f"code-#{code}"
        body = f"parameter problem, {what} - octet {icmp.rest}"
    elif kind in (135, 136) and len(payload) >= 16:
        words = ("solicitation, who has", "advertisement, tgt is")[kind - 135]
        body = f"neighbor {words} {at(payload[:16])}"
    elif kind in (135, 136):
        return f"ICMP6, neighbor {('solicitation', 'advertisement')[kind - 135]} [|icmp6]"
    else:
        body = _ICMP6.get(kind, f"type-#{kind}")
    return f"ICMP6, {body}, length {size}"
