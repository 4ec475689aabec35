"""Entries as conntrack(8) prints them, byte for byte.

Source: libnetfilter_conntrack 1.0.9, src/conntrack/snprintf_default.c and proto.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.packet import PORT_PROTOCOLS, IPAddress, Protocol, Tuple5

__all__ = [
    "PROTOCOL_NAMES",
    "address_text",
    "assured_text",
    "render_entry",
    "render_event",
    "state_text",
]

PROTOCOL_NAMES: Final[Mapping[int, str]] = {
    Protocol.TCP: "tcp",
    Protocol.UDP: "udp",
    Protocol.UDPLITE: "udplite",
    Protocol.ICMP: "icmp",
    Protocol.ICMPV6: "icmpv6",
    Protocol.SCTP: "sctp",
    Protocol.GRE: "gre",
    Protocol.DCCP: "dccp",
}
"""The protocols that conntrack(8) has a name for; any other one is ``unknown``."""
_NANOSECONDS: Final = 1_000_000_000


def render_entry(entry: ConntrackEntry, *, now: float, id_too: bool = False) -> str:
    """One line of ``conntrack -L`` (with `id_too`, of ``-o id``), without its newline.

    `now`: seconds since the epoch, for the age of an entry that has a start.
    """
    orig, reply = entry.orig, entry.reply
    name = PROTOCOL_NAMES.get(orig.protocol, "unknown")
    keys = entry.gre_keys or (0, 0, 0, 0)
    words = [f"{name:<8} {orig.protocol}"]
    if entry.timeout is not None:
        words.append(str(entry.timeout))
    if entry.tcp_state:
        words.append(state_text(entry.tcp_state))
    words.append(_half(orig, keys[:2]))
    if entry.zone_orig:
        words.append(f"zone-orig={entry.zone_orig}")
    words += _counters(entry.orig_packets, entry.orig_bytes)
    if not entry.status & CtStatus.SEEN_REPLY:
        words.append("[UNREPLIED]")
    words.append(_half(reply, keys[2:]))
    if entry.zone_reply:
        words.append(f"zone-reply={entry.zone_reply}")
    words += _counters(entry.reply_packets, entry.reply_bytes)
    words += [text] if (text := assured_text(entry.status)) else []
    if entry.mark is not None:
        words.append(f"mark={entry.mark}")
    if entry.secctx:
        words.append(f"secctx={entry.secctx}")
    if entry.zone:
        words.append(f"zone={entry.zone}")
    if entry.started is not None:
        words.append(f"delta-time={_age(entry.started, entry.stopped, now)}")
    if entry.helper:
        words.append(f"helper={entry.helper}")
    if entry.use is not None:
        words.append(f"use={entry.use}")
    if id_too and entry.id is not None:
        words.append(f"id={entry.id}")
    return " ".join(words)


def render_event(kind: str, entry: ConntrackEntry, *, now: float) -> str:
    """One line of ``conntrack -E``; `kind` is ``NEW``, ``UPDATE`` or ``DESTROY``."""
    return f"{f'[{kind}]':>9} {render_entry(entry, now=now)}"


def state_text(state: str) -> str:
    """A state as conntrack(8) names it; one that is newer than it has no name there."""
    return "NONE" if state.isdigit() else state


def assured_text(status: int) -> str:
    """``[ASSURED]``, or what outranks it; empty: neither."""
    if status & CtStatus.HW_OFFLOAD:
        return "[HW_OFFLOAD]"
    if status & CtStatus.OFFLOAD:
        return "[OFFLOAD]"
    return "[ASSURED]" if status & CtStatus.ASSURED else ""


def address_text(address: IPAddress) -> str:
    """As inet_ntop(3) of the C library writes it: what holds an IPv4 address ends in one."""
    if address.version == 4:
        return str(address)
    words = [int.from_bytes(address.packed[i : i + 2], "big") for i in range(0, 16, 2)]
    mapped = not any(words[:5]) and words[5] == 0xFFFF
    compatible = not any(words[:6]) and words[6] != 0
    if not mapped and not compatible:
        return str(address)
    return f"::{'ffff:' if mapped else ''}{'.'.join(map(str, address.packed[12:]))}"


def _half(half: Tuple5, keys: tuple[int, ...]) -> str:
    text = f"src={address_text(half.src)} dst={address_text(half.dst)}"
    if half.protocol in PORT_PROTOCOLS:
        return f"{text} sport={half.sport or 0} dport={half.dport or 0}"
    if half.protocol == Protocol.GRE:
        return f"{text} srckey={keys[0]:#x} dstkey={keys[1]:#x}"
    if half.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        kind, code = half.icmp_type or 0, half.icmp_code or 0
        return f"{text} type={kind} code={code} id={half.sport or 0}"
    return text


def _counters(packets: int | None, octets: int | None) -> list[str]:
    if packets is None or octets is None:
        return []
    return [f"packets={packets} bytes={octets}"]


def _age(started: int, stopped: int | None, now: float) -> int:
    """Whole seconds, of times that are cut to whole seconds themselves."""
    end = stopped // _NANOSECONDS if stopped else int(now)
    # It is printed as an unsigned number, whatever the clocks say.
    return (end - started // _NANOSECONDS) % (1 << 64)
