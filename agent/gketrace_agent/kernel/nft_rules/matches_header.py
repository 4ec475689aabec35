"""xtables' matches of a packet's headers and of the links it comes and goes by.

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
    string,
)

__all__ = ["HEADER_MATCHES", "ports_text", "tcp_flags"]

_TWO_U32: Final = struct.Struct("=II")
_U32: Final = struct.Struct("=I")


_MULTIPORT: Final = struct.Struct("=BB15H15sB")


def _multiport(info: bytes, family: int, sets: SetNames) -> str:
    unpacked = _MULTIPORT.unpack(info)
    (which, count), ports, (ranges, off) = unpacked[:2], unpacked[2:17], unpacked[17:]
    if which > 2 or not 0 < count <= 15 or ranges[count - 1]:
        raise NotRendered(f"multiport of {count} ports and mode {which}")
    text = str(ports[0])
    for number in range(1, count):
        text += f"{':' if ranges[number - 1] else ','}{ports[number]}"
    return f" -m multiport{inverted(off)} --{('sports', 'dports', 'ports')[which]} {text}"


def ports_text(low: int, high: int) -> str:
    """``80`` or ``80:90``."""
    return f"{low}" if low == high else f"{low}:{high}"


def _ports(low: int, high: int, off: int, option: str) -> str:
    if (low, high) == (0, 0xFFFF):
        return ""
    return f"{inverted(off)} {option} {ports_text(low, high)}"


_TCP_FLAGS: Final = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")


def tcp_flags(mask: int, value: int) -> str:
    """``SYN,ACK SYN``; ``NONE`` for no flag."""
    return " ".join(bit_names(flags, _TCP_FLAGS, "tcp flags") or "NONE" for flags in (mask, value))


def _tcp(info: bytes, family: int, sets: SetNames) -> str:
    s0, s1, d0, d1, option, mask, value, off = struct.unpack("=HHHHBBBB", info[:12])
    flags_in(off, 0xF, "tcp")
    text: str = " -m tcp" + _ports(s0, s1, off & 1, "--sport") + _ports(d0, d1, off & 2, "--dport")
    if option or off & 8:
        text += f"{inverted(off & 8)} --tcp-option {option}"
    if mask or off & 4:
        text += f"{inverted(off & 4)} --tcp-flags {tcp_flags(mask, value)}"
    return text


def _udp(info: bytes, family: int, sets: SetNames) -> str:
    s0, s1, d0, d1, off = struct.unpack("=HHHHB", info[:9])
    flags_in(off, 3, "udp")
    return " -m udp" + _ports(s0, s1, off & 1, "--sport") + _ports(d0, d1, off & 2, "--dport")


_SCTP: Final = struct.Struct("=HHHH256sI12siII")
_SCTP_CHUNKS: Final = {
    0: "DATA",
    1: "INIT",
    2: "INIT_ACK",
    3: "SACK",
    4: "HEARTBEAT",
    5: "HEARTBEAT_ACK",
    6: "ABORT",
    7: "SHUTDOWN",
    8: "SHUTDOWN_ACK",
    9: "ERROR",
    10: "COOKIE_ECHO",
    11: "COOKIE_ACK",
    12: "ECN_ECNE",
    13: "ECN_CWR",
    14: "SHUTDOWN_COMPLETE",
}


def _sctp(info: bytes, family: int, sets: SetNames) -> str:
    d0, d1, s0, s1, chunks, kind, _, flagged, on, off = _SCTP.unpack_from(info)
    flags_in(on | off, 7, "sctp")
    text: str = " -m sctp"
    if on & 1:
        text += f"{inverted(off & 1)} --sport {ports_text(s0, s1)}"
    if on & 2:
        text += f"{inverted(off & 2)} --dport {ports_text(d0, d1)}"
    if on & 4:
        # The map is one of u32 words, 32 chunks each; iptables' struct has room to spare.
        words = struct.unpack("=64I", chunks)
        chosen = [n for n in range(256) if words[n // 32] >> n % 32 & 1]
        if flagged or kind not in (1, 2, 4) or not chosen or set(chosen) - set(_SCTP_CHUNKS):
            raise NotRendered("sctp chunks")
        how = {1: "any", 2: "all", 4: "only"}[kind]
        text += f"{inverted(off & 4)} --chunk-types {how} "
        text += ",".join(_SCTP_CHUNKS[number] for number in chosen)
    return text


_PHYSDEV: Final = struct.Struct("=16s16s16s16sBB")


def _physdev(info: bytes, family: int, sets: SetNames) -> str:
    here, _, there, _, off, on = _PHYSDEV.unpack_from(info)
    flags_in(on, 0x1F, "physdev")
    parts = (
        (8, "is-in"),
        (1, f"in {string(here)}"),
        (16, "is-out"),
        (2, f"out {string(there)}"),
        (4, "is-bridged"),
    )
    said = (f"{inverted(off & bit)} --physdev-{word}" for bit, word in parts if on & bit)
    return " -m physdev" + "".join(said)


def _iprange(info: bytes, family: int, sets: SetNames) -> str:
    s0, s1, d0, d1, flags = struct.unpack("=16s16s16s16sB", info[:65])
    flags_in(flags, 0x33, "iprange")
    text: str = " -m iprange"
    for bit, option, low, high in ((1, "src", s0, s1), (2, "dst", d0, d1)):
        if flags & bit:
            text += f"{inverted(flags & bit << 4)} --{option}-range "
            text += f"{address(low, family)}-{address(high, family)}"
    return text


def _mac(info: bytes, family: int, sets: SetNames) -> str:
    (off,) = _U32.unpack_from(info, 8)
    return f" -m mac{inverted(off)} --mac-source {info[:6].hex(':')}"


def _tos(info: bytes, family: int, sets: SetNames) -> str:
    return f" -m tos{inverted(info[2])} --tos 0x{info[1]:02x}/0x{info[0]:02x}"


def _dscp(info: bytes, family: int, sets: SetNames) -> str:
    return f" -m dscp{inverted(info[1])} --dscp 0x{info[0]:02x}"


def _ecn(info: bytes, family: int, sets: SetNames) -> str:
    on, off, value = info[:3]
    flags_in(on, 0x31, "ecn")
    parts = ((0x10, "tcp-ece"), (0x20, "tcp-cwr"), (1, f"ip-ect {value}"))
    return " -m ecn" + "".join(f"{inverted(off & bit)} --ecn-{w}" for bit, w in parts if on & bit)


def _length(info: bytes, family: int, sets: SetNames) -> str:
    low, high, off = struct.unpack("=HHB", info[:5])
    return f" -m length{inverted(off)} --length {ports_text(low, high)}"


def _hops(name: str) -> Render:
    def render(info: bytes, family: int, sets: SetNames) -> str:
        mode, value = info[:2]
        if mode > 3:
            raise NotRendered(f"{name} of mode {mode}")
        how = ("--{}-eq", "! --{}-eq", "--{}-lt", "--{}-gt")[mode].format(name)
        return f" -m {name} {how} {value}"

    return render


def _icmp(name: str, option: str) -> Render:
    def render(info: bytes, family: int, sets: SetNames) -> str:
        kind, low, high, off = info[:4]
        text: str = f" -m {name}{inverted(flags_in(off, 1, name))} {option} "
        if name == "icmp" and kind == 0xFF:
            return text + "any"
        return text + f"{kind}" + f"/{low}" * ((low, high) != (0, 0xFF))

    return render


def _pkttype(info: bytes, family: int, sets: SetNames) -> str:
    kind, off = _TWO_U32.unpack_from(info)
    if kind > 3:
        raise NotRendered(f"pkttype {kind}")
    name = ("unicast", "broadcast", "multicast", "otherhost")[kind]
    return f" -m pkttype{inverted(off)} --pkt-type {name}"


def _tcpmss(info: bytes, family: int, sets: SetNames) -> str:
    low, high, off = struct.unpack("=HHB", info[:5])
    return f" -m tcpmss{inverted(off)} --mss {ports_text(low, high)}"


def _spi(name: str) -> Render:
    def render(info: bytes, family: int, sets: SetNames) -> str:
        low, high, off = struct.unpack("=IIB", info[:9])
        flags_in(off, 1, name)
        if (low, high) == (0, 0xFFFFFFFF):
            return f" -m {name}"
        return f" -m {name}{inverted(off)} --{name}spi {ports_text(low, high)}"

    return render


_STRING: Final = struct.Struct("=HH16s128sBB")


def _string(info: bytes, family: int, sets: SetNames) -> str:
    start, end, algorithm, pattern, length, flags = _STRING.unpack_from(info)
    fold = flags_in(flags, 3, "string") >> 1
    if not 0 < length <= len(pattern):
        raise NotRendered(f"string of {length} bytes")
    wanted: bytes = pattern[:length]
    if wanted.endswith(b"\\") or any(not 0x20 <= byte < 0x7F for byte in wanted):
        said = f'--hex-string "|{wanted.hex()}|"'
    else:
        escaped = wanted.decode("latin-1").replace("\\", "\\\\").replace('"', '\\"')
        said = f'--string "{escaped}"'
    text: str = f" -m string{inverted(flags & 1)} {said} --algo {string(algorithm)}"
    text += f" --from {start}" * bool(start) + f" --to {end}" * (end != 0xFFFF)
    return text + " --icase" * fold


_U32_TEST: Final = 180
"""Bytes of struct xt_u32_test."""
_U32_OPERATORS: Final = ("&", "<<", ">>", "@")


def _u32(info: bytes, family: int, sets: SetNames) -> str:
    tests, off = info[1980:1982]
    if not 0 < tests <= 11:
        raise NotRendered(f"u32 of {tests} tests")
    words = []
    for start in range(0, tests * _U32_TEST, _U32_TEST):
        numbers, values = info[start + 176 : start + 178]
        if not (0 < numbers <= 11 and 0 < values <= 11):
            raise NotRendered(f"u32 of {numbers} numbers and {values} values")
        where = ""
        for at in range(start, start + 8 * numbers, 8):
            number, operator = struct.unpack_from("=IB", info, at)
            if operator >= len(_U32_OPERATORS):
                raise NotRendered(f"u32 of operator {operator}")
            where += f"{_U32_OPERATORS[operator] if at > start else ''}0x{number:x}"
        ranges = []
        for at in range(start + 88, start + 88 + 8 * values, 8):
            low, high = _TWO_U32.unpack_from(info, at)
            ranges.append(f"0x{low:x}" if low == high else f"0x{low:x}:0x{high:x}")
        words.append(f"{where}={','.join(ranges)}")
    return f' -m u32{inverted(off)} --u32 "{"&&".join(words)}"'


def _bpf(info: bytes, family: int, sets: SetNames) -> str:
    mode, count = struct.unpack("=HH", info[:4])
    if mode == 1:
        return f" -m bpf --object-pinned {string(info[8:520])}"
    if mode or not 0 < count <= 64:
        raise NotRendered(f"bpf of mode {mode} and {count} instructions")
    code = struct.iter_unpack("=HBBI", info[8 : 8 + 8 * count])
    said = ",".join(" ".join(map(str, instruction)) for instruction in code)
    return f' -m bpf --bytecode "{count},{said}"'


HEADER_MATCHES: Final[Renderers] = {
    ("multiport", 1): (48, _multiport),
    ("tcp", 0): (16, _tcp),
    ("udp", 0): (16, _udp),
    ("sctp", 0): (296, _sctp),
    ("physdev", 0): (72, _physdev),
    ("iprange", 1): (72, _iprange),
    ("mac", 0): (16, _mac),
    ("tos", 1): (8, _tos),
    ("dscp", 0): (8, _dscp),
    ("ecn", 0): (8, _ecn),
    ("length", 0): (8, _length),
    ("ttl", 0): (8, _hops("ttl")),
    ("hl", 0): (8, _hops("hl")),
    ("icmp", 0): (8, _icmp("icmp", "--icmp-type")),
    ("icmp6", 0): (8, _icmp("icmp6", "--icmpv6-type")),
    ("pkttype", 0): (8, _pkttype),
    ("tcpmss", 0): (8, _tcpmss),
    ("esp", 0): (16, _spi("esp")),
    ("string", 1): (160, _string),
    ("u32", 0): (1984, _u32),
    ("bpf", 1): (528, _bpf),
}
"""Alike for both IP versions; iptables asks for those of one version only there."""
