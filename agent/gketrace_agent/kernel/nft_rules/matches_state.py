"""xtables' matches of what is known of a packet besides its headers: its connection, mark, routes,
sets, sockets and rates.

As `gketrace_agent.kernel.nft_rules.matches`.
"""

from __future__ import annotations

import struct
from typing import Final

from gketrace_agent.kernel.nft_rules.extension import Render, Renderers
from gketrace_agent.kernel.nft_rules.sets import SetNames
from gketrace_agent.kernel.nft_rules.words import (
    NotRendered,
    address,
    bit_names,
    flags_in,
    inverted,
    mark_and_mask,
    masked,
    named,
    prefix_length,
    quoted,
    rate,
    string,
)

__all__ = ["STATE_MATCHES"]

_TWO_U32: Final = struct.Struct("=II")
_U32: Final = struct.Struct("=I")


def _comment(info: bytes, family: int, sets: SetNames) -> str:
    return f" -m comment --comment {quoted(string(info[:255]))}"


_ADDRESS_TYPES: Final = (
    "UNSPEC",
    "UNICAST",
    "LOCAL",
    "BROADCAST",
    "ANYCAST",
    "MULTICAST",
    "BLACKHOLE",
    "UNREACHABLE",
    "PROHIBIT",
    "THROW",
    "NAT",
    "XRESOLVE",
)


def _addrtype(info: bytes, family: int, sets: SetNames) -> str:
    source, destination, flags = struct.unpack("=HHI", info[:8])
    limits = flags_in(flags, 0xF, "addrtype") >> 2
    text: str = " -m addrtype"
    if source:
        text += f"{inverted(flags & 1)} --src-type {bit_names(source, _ADDRESS_TYPES, 'addrtype')}"
    if destination:
        text += (
            f"{inverted(flags & 2)} --dst-type {bit_names(destination, _ADDRESS_TYPES, 'addrtype')}"
        )
    return text + " --limit-iface-in" * (limits & 1) + " --limit-iface-out" * (limits >> 1)


_CT: Final = struct.Struct("=16s16s16s16s16s16s16s16sIIHHHHHHHHHHHHH")
_CT_STATES: Final = (
    (1, "INVALID"),
    (8, "NEW"),
    (4, "RELATED"),
    (2, "ESTABLISHED"),
    (256, "UNTRACKED"),
    (64, "SNAT"),
    (128, "DNAT"),
)
"""In the order in which iptables prints them; xt_conntrack.h XT_CONNTRACK_STATE_*."""
_CT_STATUSES: Final = ((1, "EXPECTED"), (2, "SEEN_REPLY"), (4, "ASSURED"), (8, "CONFIRMED"))
_CT_ADDRESSES: Final = ((4, "origsrc"), (8, "origdst"), (16, "replsrc"), (32, "repldst"))
_CT_PORTS: Final = (
    (256, "origsrcport"),
    (512, "origdstport"),
    (1024, "replsrcport"),
    (2048, "repldstport"),
)


def _conntrack(info: bytes, family: int, sets: SetNames) -> str:
    unpacked = _CT.unpack_from(info)
    addresses, (least, most, protocol) = unpacked[:8], unpacked[8:11]
    ports, (on, off, state, status), highs = unpacked[11:15], unpacked[15:19], unpacked[19:]
    flags_in(on, 0x3FFF, "conntrack")
    alias = on & 0x2000
    text: str = " -m state" if alias else " -m conntrack"
    if on & 1:
        said = named(state, _CT_STATES, "conntrack state")
        # Without any state iptables prints the option and nothing behind it.
        text += f"{inverted(off & 1)} --{'' if alias else 'ct'}state{' ' * bool(said)}{said}"
    if on & 2:
        text += f"{inverted(off & 2)} --ctproto {protocol}"
    for number, (bit, name) in enumerate(_CT_ADDRESSES):
        if on & bit:
            value, mask = addresses[2 * number : 2 * number + 2]
            text += f"{inverted(off & bit)} --ct{name} {masked(value, mask, family)}"
    for (bit, name), low, high in zip(_CT_PORTS, ports, highs, strict=True):
        if on & bit:
            text += f"{inverted(off & bit)} --ct{name} {low}"
            text += f":{high}" * (high not in (0, low))
    if on & 64:
        said = named(status, _CT_STATUSES, "conntrack status") or "NONE"
        text += f"{inverted(off & 64)} --ctstatus {said}"
    if on & 128:
        text += f"{inverted(off & 128)} --ctexpire {least}" + f":{most}" * (most != least)
    if on & 4096:
        text += f" --ctdir {'REPLY' if off & 4096 else 'ORIGINAL'}"
    return text


def _mark(name: str) -> Render:
    def render(info: bytes, family: int, sets: SetNames) -> str:
        mark, mask, off = struct.unpack("=IIB", info[:9])
        return f" -m {name}{inverted(off)} --mark {mark_and_mask(mark, mask)}"

    return render


def _statistic(info: bytes, family: int, sets: SetNames) -> str:
    mode, flags = struct.unpack("=HH", info[:4])
    off = inverted(flags_in(flags, 1, "statistic"))
    if mode == 0:
        (value,) = _U32.unpack_from(info, 4)
        return f" -m statistic --mode random{off} --probability {value / 0x80000000:.11f}"
    if mode == 1:
        every, packet = _TWO_U32.unpack_from(info, 4)
        every = (every + 1) & 0xFFFFFFFF
        return f" -m statistic --mode nth{off} --every {every} --packet {packet}"
    raise NotRendered(f"statistic of mode {mode}")


_RECENT: Final = struct.Struct("=IIBB200sB1x16s")
_RECENT_WAYS: Final = ((2, " --set"), (1, " --rcheck"), (4, " --update"), (8, " --remove"))


def _recent(info: bytes, family: int, sets: SetNames) -> str:
    seconds, hits, ways, off, name, side, mask = _RECENT.unpack_from(info)
    flags_in(ways, 0x3F, "recent")
    if seconds >> 31 or hits >> 31 or side > 1:
        raise NotRendered(f"recent of {seconds} s, {hits} hits, side {side}")
    text: str = f" -m recent{inverted(off)}" + "".join(
        word for bit, word in _RECENT_WAYS if ways & bit
    )
    text += f" --seconds {seconds}" * bool(seconds) + " --reap" * (ways >> 5 & 1)
    text += f" --hitcount {hits}" * bool(hits) + " --rttl" * (ways >> 4 & 1)
    text += f" --name {string(name)} --mask {address(mask, family)}"
    return text + (" --rdest" if side else " --rsource")


def _owner(info: bytes, family: int, sets: SetNames) -> str:
    u0, u1, g0, g1, on, off = struct.unpack("=IIIIBB", info[:18])
    flags_in(on, 0xF, "owner")
    parts = (
        (4, "socket-exists"),
        (1, f"uid-owner {u0}" + f"-{u1}" * (u0 != u1)),
        (2, f"gid-owner {g0}" + f"-{g1}" * (g0 != g1)),
        (8, "suppl-groups"),
    )
    return " -m owner" + "".join(f"{inverted(off & bit)} --{w}" for bit, w in parts if on & bit)


def _limit(info: bytes, family: int, sets: SetNames) -> str:
    average, burst = _TWO_U32.unpack_from(info)
    text: str = f" -m limit --limit {rate(average, 10000)[0]}"
    return text if burst == 5 else f"{text} --limit-burst {burst}"


_HASHLIMIT: Final = struct.Struct("=255sxQQIIIIIIBB")
_HASHLIMIT_MODES: Final = ((4, "srcip"), (8, "srcport"), (1, "dstip"), (2, "dstport"))


def _hashlimit(info: bytes, family: int, sets: SetNames) -> str:
    name, average, burst, mode, size, most, gc, expire, interval, source, destination = (
        _HASHLIMIT.unpack_from(info)
    )
    # Rates in bytes (32) have a rounding of their own.
    flags_in(mode, 0x5F, "hashlimit")
    said, unit = rate(average, 1000000)
    full = 32 if family == 4 else 128
    text: str = f" -m hashlimit --hashlimit-{'above' if mode & 16 else 'upto'} {said}"
    text += f" --hashlimit-burst {burst}"
    if mode & 0xF:
        modes = ",".join(word for bit, word in _HASHLIMIT_MODES if mode & bit)
        text += f" --hashlimit-mode {modes}"
    text += f" --hashlimit-name {string(name)}"
    text += f" --hashlimit-htable-size {size}" * bool(size)
    text += f" --hashlimit-htable-max {most}" * bool(most)
    text += f" --hashlimit-htable-gcinterval {gc}" * (gc != 1000)
    text += f" --hashlimit-htable-expire {expire}" * (expire != unit // 1000000 * 1000)
    text += f" --hashlimit-srcmask {source}" * (source != full)
    text += f" --hashlimit-dstmask {destination}" * (destination != full)
    if mode & 0x40:
        text += " --hashlimit-rate-match"
        text += f" --hashlimit-rate-interval {interval}" * (interval != 1)
    return text


def _nfacct(info: bytes, family: int, sets: SetNames) -> str:
    # Two blanks: iptables prints one of its own before the quoting's.
    return f" -m nfacct --nfacct-name  {quoted(string(info[:32]))}"


def _rpfilter(info: bytes, family: int, sets: SetNames) -> str:
    flags = flags_in(info[0], 0xF, "rpfilter")
    words = (" --loose", " --validmark", " --accept-local", " --invert")
    return " -m rpfilter" + "".join(word for bit, word in enumerate(words) if flags & 1 << bit)


_SET: Final = struct.Struct("=HBB4xQB7xQB7xI")
_SET_COMPARES: Final = ("", " --{}-eq {}", " ! --{}-eq {}", " --{}-lt {}", " --{}-gt {}")


def _set(info: bytes, family: int, sets: SetNames) -> str:
    index, dimension, flags, packets, op1, octets, op2, more = _SET.unpack_from(info)
    # Bit 0 negates; the others say src for the dimensions 1 to 3; the 4th is for return-nomatch.
    flags_in(more, 0x98, "set")
    if max(op1, op2) > 4 or dimension > 3:
        raise NotRendered("set with counters or dimensions of another kind")
    text: str = f" -m set{inverted(flags & 1)} --match-set {sets.match(index, dimension, flags)}"
    text += " --return-nomatch" * (more >> 7) + " ! --update-counters" * (more >> 3 & 1)
    text += " ! --update-subcounters" * (more >> 4 & 1)
    text += _SET_COMPARES[op1].format("packets", packets)
    return text + _SET_COMPARES[op2].format("bytes", octets)


def _socket(info: bytes, family: int, sets: SetNames) -> str:
    flags = flags_in(info[0], 7, "socket")
    words = (" --transparent", " --nowildcard", " --restore-skmark")
    return " -m socket" + "".join(word for bit, word in enumerate(words) if flags & 1 << bit)


def _connlimit(info: bytes, family: int, sets: SetNames) -> str:
    limit, flags = _TWO_U32.unpack_from(info, 16)
    flags_in(flags, 3, "connlimit")
    length = prefix_length(info[: 4 if family == 4 else 16])
    if length < 0:
        raise NotRendered("connlimit with a mask of another kind")
    side = "daddr" if flags & 2 else "saddr"
    how = "upto" if flags & 1 else "above"
    return f" -m connlimit --connlimit-{how} {limit} --connlimit-mask {length} --connlimit-{side}"


def _connbytes(info: bytes, family: int, sets: SetNames) -> str:
    low, high, what, direction = struct.unpack("=QQBB", info[:18])
    if what > 2 or direction > 2:
        raise NotRendered(f"connbytes of {what} and direction {direction}")
    off = low > high
    low, high = sorted((low, high))
    to = f":{high}" * (0 < high < 0xFFFFFFFFFFFFFFFF)
    return (
        f" -m connbytes{inverted(off)} --connbytes {low}{to}"
        f" --connbytes-mode {('packets', 'bytes', 'avgpkt')[what]}"
        f" --connbytes-dir {('original', 'reply', 'both')[direction]}"
    )


def _helper(info: bytes, family: int, sets: SetNames) -> str:
    (off,) = _U32.unpack_from(info)
    return f" -m helper{inverted(off)} --helper {quoted(string(info[4:34]))}"


def _quota(info: bytes, family: int, sets: SetNames) -> str:
    flags, quota = struct.unpack("=I4xQ", info[:16])
    return f" -m quota{inverted(flags_in(flags, 1, 'quota'))} --quota {quota}"


STATE_MATCHES: Final[Renderers] = {
    ("comment", 0): (256, _comment),
    ("addrtype", 1): (8, _addrtype),
    ("conntrack", 3): (168, _conntrack),
    ("mark", 1): (16, _mark("mark")),
    ("connmark", 1): (16, _mark("connmark")),
    ("statistic", 0): (24, _statistic),
    ("recent", 1): (232, _recent),
    ("owner", 1): (24, _owner),
    ("limit", 0): (40, _limit),
    ("hashlimit", 3): (312, _hashlimit),
    ("nfacct", 0): (40, _nfacct),
    ("nfacct", 1): (40, _nfacct),
    ("rpfilter", 0): (8, _rpfilter),
    ("set", 4): (48, _set),
    ("socket", 3): (8, _socket),
    ("connlimit", 1): (32, _connlimit),
    ("connbytes", 0): (24, _connbytes),
    ("helper", 0): (40, _helper),
    ("quota", 0): (24, _quota),
}
"""Alike for both IP versions but for the length of addresses."""
