"""xtables' targets, from the structs of the kernel's uapi to the options that print them.

As `gketrace_agent.kernel.nft_rules.matches`.

Source: include/uapi/linux/netfilter/xt_*.h, nf_nat.h; iptables extensions/libxt_*.c, libipt_*.c,
libip6t_*.c.
"""

from __future__ import annotations

import struct
from typing import Final

from gketrace_agent.kernel.nft_rules.extension import Render, Renderers
from gketrace_agent.kernel.nft_rules.sets import SetNames
from gketrace_agent.kernel.nft_rules.words import (
    NotRendered,
    address,
    flags_in,
    prefix_length,
    quoted,
    string,
)

__all__ = ["TARGETS", "nflog_text"]

_REJECTS: Final = {
    4: {
        0: "icmp-net-unreachable",
        1: "icmp-host-unreachable",
        2: "icmp-proto-unreachable",
        3: "icmp-port-unreachable",
        5: "icmp-net-prohibited",
        6: "icmp-host-prohibited",
        7: "tcp-reset",
        8: "icmp-admin-prohibited",
    },
    6: {
        0: "icmp6-no-route",
        1: "icmp6-adm-prohibited",
        3: "icmp6-addr-unreachable",
        4: "icmp6-port-unreachable",
        6: "tcp-reset",
        7: "icmp6-policy-fail",
        8: "icmp6-reject-route",
    },
}


def _reject(info: bytes, family: int, sets: SetNames) -> str:
    (kind,) = struct.unpack("=I", info[:4])
    name = _REJECTS[family].get(kind)
    if name is None:
        raise NotRendered(f"REJECT with {kind}")
    return f" -j REJECT --reject-with {name}"


_RANGE2: Final = struct.Struct("=I16s16s2s2s2s")
_RANGE: Final = struct.Struct("=I16s16s2s2s")
_COMPAT: Final = struct.Struct("=II4s4s2s2s")
_MAP_IPS, _PORTS, _RANDOM, _PERSISTENT, _FULLY, _OFFSET = 1, 2, 4, 8, 16, 32
"""NF_NAT_RANGE_*."""


def _nat(name: str, option: str, *, revision: int, bare_ports: bool = False) -> Render:
    """DNAT, SNAT, REDIRECT and MASQUERADE; `bare_ports`: ports without a colon."""

    def render(info: bytes, family: int, sets: SetNames) -> str:
        base = b"\0\0"
        if revision == 2:
            flags, low, high, first, last, base = _RANGE2.unpack_from(info)
        elif family == 6:
            flags, low, high, first, last = _RANGE.unpack_from(info)
        else:
            count, flags, low, high, first, last = _COMPAT.unpack_from(info)
            if count != 1:
                raise NotRendered(f"{name} to {count} ranges")
        flags_in(flags, 0x3F, name)
        text = ""
        if flags & _MAP_IPS:
            text = address(low, family)
            if low != high:
                text += f"-{address(high, family)}"
            if family == 6 and flags & _PORTS:
                text = f"[{text}]"
        if flags & _PORTS:
            ports = f"{int.from_bytes(first, 'big')}"
            if first != last:
                ports += f"-{int.from_bytes(last, 'big')}"
            if flags & _OFFSET:
                ports += f"/{int.from_bytes(base, 'big')}"
            text += ports if bare_ports and not text else f":{ports}"
        said = f" -j {name}" + f" {option} {text}" * bool(text)
        said += " --random" * bool(flags & _RANDOM) + " --random-fully" * bool(flags & _FULLY)
        return said + " --persistent" * bool(flags & _PERSISTENT)

    return render


def _netmap(info: bytes, family: int, sets: SetNames) -> str:
    if family == 6:
        low, high = info[4:20], info[20:36]
    else:
        low, high = info[8:12], info[12:16]
    mask = bytes(255 ^ one ^ other for one, other in zip(low, high, strict=True))
    length = prefix_length(mask)
    said = address(mask, family) if length < 0 else length
    return f" -j NETMAP --to {address(low, family)}/{said}"


def _mark(info: bytes, family: int, sets: SetNames) -> str:
    mark, mask = struct.unpack("=II", info[:8])
    return f" -j MARK --set-xmark 0x{mark:x}/0x{mask:x}"


def _connmark(revision: int) -> Render:
    def render(info: bytes, family: int, sets: SetNames) -> str:
        ctmark, ctmask, nfmask = struct.unpack("=III", info[:12])
        direction, bits, mode = info[12:15] if revision == 2 else (0, 0, info[12])
        if mode > 2 or direction > 1:
            raise NotRendered(f"CONNMARK of mode {mode}")
        if mode == 0:
            text = f" --set-xmark 0x{ctmark:x}/0x{ctmask:x}"
        else:
            way = "save" if mode == 1 else "restore"
            text = f" --{way}-mark --nfmask 0x{nfmask:x} --ctmask 0x{ctmask:x}"
        shift = f" --{('left', 'right')[direction]}-shift-mark {bits}" * bool(bits)
        return f" -j CONNMARK{text}{shift}"

    return render


_CT: Final = struct.Struct("=HHII16s32s")
_CT_EVENTS: Final = (
    "new",
    "related",
    "destroy",
    "reply",
    "assured",
    "protoinfo",
    "helper",
    "mark",
    "natseqinfo",
    "secmark",
)


def _ct(info: bytes, family: int, sets: SetNames) -> str:
    flags, zone, events, expected, helper, timeout = _CT.unpack_from(info)
    flags_in(flags, 0x1F, "CT")
    flags_in(events, (1 << len(_CT_EVENTS)) - 1, "CT events")
    flags_in(expected, 1, "CT expectations")
    if flags & 2:
        return " -j NOTRACK"
    text: str = " -j CT" + " --notrack" * (flags & 1)
    text += f" --helper {string(helper)}" * bool(helper[0])
    text += f" --timeout {string(timeout)}" * bool(timeout[0])
    if events:
        names = (name for bit, name in enumerate(_CT_EVENTS) if events & 1 << bit)
        text += f" --ctevents {','.join(names)}"
    text += " --expevents new" * expected
    if flags & 16 or zone:
        way = {4: "-orig", 8: "-reply"}.get(flags & 12, "")
        text += f" --zone{way} {'mark' if flags & 16 else zone}"
    return text


def _tproxy(info: bytes, family: int, sets: SetNames) -> str:
    mask, value, to, port = struct.unpack("=II16s2s", info[:26])
    return (
        f" -j TPROXY --on-port {int.from_bytes(port, 'big')} --on-ip {address(to, family)}"
        f" --tproxy-mark 0x{value:x}/0x{mask:x}"
    )


def _tcpmss(info: bytes, family: int, sets: SetNames) -> str:
    (size,) = struct.unpack("=H", info[:2])
    return " -j TCPMSS " + ("--clamp-mss-to-pmtu" if size == 0xFFFF else f"--set-mss {size}")


def _audit(info: bytes, family: int, sets: SetNames) -> str:
    if info[0] > 2:
        raise NotRendered(f"AUDIT of type {info[0]}")
    return f" -j AUDIT --type {('accept', 'drop', 'reject')[info[0]]}"


def _checksum(info: bytes, family: int, sets: SetNames) -> str:
    return " -j CHECKSUM" + " --checksum-fill" * flags_in(info[0], 1, "CHECKSUM")


def _classify(info: bytes, family: int, sets: SetNames) -> str:
    (priority,) = struct.unpack("=I", info[:4])
    return f" -j CLASSIFY --set-class {priority >> 16:04x}:{priority & 0xFFFF:04x}"


def _dscp(info: bytes, family: int, sets: SetNames) -> str:
    return f" -j DSCP --set-dscp 0x{info[0]:02x}"


def _tos(info: bytes, family: int, sets: SetNames) -> str:
    return f" -j TOS --set-tos 0x{info[0]:02x}/0x{info[1]:02x}"


def _hops(name: str, option: str) -> Render:
    def render(info: bytes, family: int, sets: SetNames) -> str:
        mode, value = info[:2]
        if mode > 2:
            raise NotRendered(f"{name} of mode {mode}")
        return f" -j {name} --{option}-{('set', 'inc', 'dec')[mode]} {value}"

    return render


_LOG_FLAGS: Final = (
    (1, " --log-tcp-sequence"),
    (2, " --log-tcp-options"),
    (4, " --log-ip-options"),
    (8, " --log-uid"),
    (0x20, " --log-macdecode"),
)


def _log(info: bytes, family: int, sets: SetNames) -> str:
    level, flags, prefix = info[0], info[1], string(info[2:32])
    flags_in(flags, 0x2F, "LOG")
    text: str = " -j LOG" + f" --log-prefix {quoted(prefix)}" * bool(prefix)
    text += f" --log-level {level}" * (level != 4)
    return text + "".join(word for bit, word in _LOG_FLAGS if flags & bit)


def nflog_text(prefix: str, group: int, size: int | None, threshold: int) -> str:
    """NFLOG; `size`: the bytes of a packet that are copied, None for all."""
    text: str = " -j NFLOG" + f" --nflog-prefix {quoted(prefix)}" * bool(prefix)
    text += f" --nflog-group {group}" * bool(group)
    text += "" if size is None else f" --nflog-size {size}"
    return text + f" --nflog-threshold {threshold}" * bool(threshold)


def _nflog(info: bytes, family: int, sets: SetNames) -> str:
    length, group, threshold, flags = struct.unpack("=IHHH", info[:10])
    if length and not flags & 1:
        raise NotRendered("NFLOG with a range")
    flags_in(flags, 1, "NFLOG")
    return nflog_text(string(info[12:76]), group, length if flags else None, threshold)


def _nfqueue(info: bytes, family: int, sets: SetNames) -> str:
    first, count, flags = struct.unpack("=HHH", info[:6])
    flags_in(flags, 3, "NFQUEUE")
    if count > 1:
        text = f" --queue-balance {first}:{first + count - 1}"
    else:
        text = f" --queue-num {first}"
    bypass, fanout = " --queue-bypass" * (flags & 1), " --queue-cpu-fanout" * (flags >> 1)
    return f" -j NFQUEUE{text}{bypass}{fanout}"


_SET: Final = struct.Struct("=HBBHBBHBBII")
_NO_SET: Final = 65535


def _set(info: bytes, family: int, sets: SetNames) -> str:
    unpacked = _SET.unpack_from(info)
    flags, timeout = unpacked[9:]
    flags_in(flags, 0x701, "SET")
    words = []
    for at, option in ((0, "add"), (3, "del"), (6, "map")):
        index, dimension, sides = unpacked[at : at + 3]
        if dimension > 3:
            raise NotRendered(f"SET of dimension {dimension}")
        said = ""
        if index != _NO_SET:
            said = f" --{option}-set {sets.match(index, dimension, sides)}"
        words.append(said)
    more = " --exist" * (flags & 1) + f" --timeout {timeout}" * (timeout != 0xFFFFFFFF)
    marks = " --map-mark" * (flags >> 8 & 1) + " --map-prio" * (flags >> 9 & 1)
    queue = " --map-queue" * (flags >> 10)
    return f" -j SET{words[0]}{more}{words[1]}{words[2]}{marks}{queue}"


def _tcpoptstrip(info: bytes, family: int, sets: SetNames) -> str:
    words = struct.unpack("=8I", info)
    chosen = ",".join(str(n) for n in range(256) if words[n // 32] >> n % 32 & 1)
    return " -j TCPOPTSTRIP" + f" --strip-options {chosen}" * bool(chosen)


def _tee(info: bytes, family: int, sets: SetNames) -> str:
    link = string(info[16:32])
    return f" -j TEE --gateway {address(info, family)}" + f" --oif {link}" * bool(link)


_COMMON: Final[Renderers] = {
    ("REJECT", 0): (8, _reject),
    ("DNAT", 2): (48, _nat("DNAT", "--to-destination", revision=2)),
    ("MARK", 2): (8, _mark),
    ("CONNMARK", 1): (16, _connmark(1)),
    ("CONNMARK", 2): (16, _connmark(2)),
    ("CT", 2): (72, _ct),
    ("TPROXY", 1): (32, _tproxy),
    ("TCPMSS", 0): (8, _tcpmss),
    ("AUDIT", 0): (8, _audit),
    ("CHECKSUM", 0): (8, _checksum),
    ("CLASSIFY", 0): (8, _classify),
    ("DSCP", 0): (8, _dscp),
    ("TOS", 1): (8, _tos),
    ("LOG", 0): (32, _log),
    ("NFLOG", 0): (80, _nflog),
    ("NFQUEUE", 3): (8, _nfqueue),
    ("SET", 3): (24, _set),
    ("TCPOPTSTRIP", 0): (32, _tcpoptstrip),
    ("TEE", 1): (40, _tee),
}
TARGETS: Final[dict[int, Renderers]] = {
    4: {
        **_COMMON,
        ("SNAT", 0): (24, _nat("SNAT", "--to-source", revision=0)),
        ("MASQUERADE", 0): (24, _nat("MASQUERADE", "--to-ports", revision=0, bare_ports=True)),
        ("REDIRECT", 0): (24, _nat("REDIRECT", "--to-ports", revision=0, bare_ports=True)),
        ("NETMAP", 0): (24, _netmap),
        ("TTL", 0): (8, _hops("TTL", "ttl")),
    },
    6: {
        **_COMMON,
        ("SNAT", 1): (40, _nat("SNAT", "--to-source", revision=1)),
        ("MASQUERADE", 0): (40, _nat("MASQUERADE", "--to-ports", revision=0, bare_ports=True)),
        ("REDIRECT", 0): (40, _nat("REDIRECT", "--to-ports", revision=0, bare_ports=True)),
        ("NETMAP", 0): (40, _netmap),
        ("HL", 0): (8, _hops("HL", "hl")),
    },
}
"""By IP version."""
