"""One packet's network layer and up as tcpdump (4.99) writes it: the part behind the time.

What tcpdump decodes beyond TCP, UDP, ICMP, ICMPv6, ARP, SCTP's chunk names, and the first line of
HTTP, is not decoded here: ``-w - | tcpdump -r -`` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from gketrace.capture.layers import (
    Arp,
    Dissection,
    Icmp,
    Ip4,
    Ip6,
    Sctp,
    Tcp,
    Udp,
    address,
)
from gketrace.packet import protocol_name
from gketrace_cli.capture.icmp_text import icmp6_text, icmp_text

__all__ = ["Conversations", "Texts", "checksum", "mac_text"]

_FLAGS: Final = tuple(zip((1, 2, 4, 8, 16, 32, 64, 128), "FSRP.UEW", strict=True))
_HTTP_PORTS: Final = frozenset({80, 8080, 3128})
_HTTP: Final = re.compile(rb"(?:[A-Z]{3,11} |HTTP/)[^\r\n]*")
_CHUNKS: Final = dict(
    enumerate(
        "DATA,INIT,INIT ACK,SACK,HB REQ,HB ACK,ABORT,SHUTDOWN,SHUTDOWN ACK,OP ERR,COOKIE ECHO,"
        "COOKIE ACK,ECN ECHO,CWR,SHUTDOWN COMPLETE".split(",")
    )
)
_PROTOCOLS: Final = {58: "ICMPv6", 44: "Fragment", 0: "Options"}


def mac_text(raw: bytes) -> str:
    return raw.hex(":")


def checksum(ip: Ip4 | Ip6, segment: bytes) -> int:
    """Of TCP or UDP with its pseudo header; 0: right (RFC 9293, RFC 768)."""
    pseudo = ip.source + ip.destination + len(segment).to_bytes(4, "big")
    data = pseudo + ip.protocol.to_bytes(4, "big") + segment
    if len(data) % 2:
        data += b"\0"
    total = int.from_bytes(data, "big") % 0xFFFF
    return ~total & 0xFFFF if total else 0


class Conversations:
    """The first sequence numbers of TCP connections, for relative ones.  At most `limit`."""

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._first: dict[object, list[int]] = {}

    def relative(self, ip: Ip4 | Ip6, tcp: Tcp, place: object) -> tuple[int, int, int, int]:
        """Sequence number, acknowledgement, and what to take from selective acknowledgements and
        from this side's own: as tcpdump, those of the first packet with ACK stay absolute."""
        if not tcp.flags & 0x10:
            return tcp.seq, tcp.ack, 0, 0
        here, there = (ip.source, tcp.sport), (ip.destination, tcp.dport)
        back = here > there
        key = (place, there, here) if back else (place, here, there)
        first = self._first.get(key)
        mine, other = (1, 0) if back else (0, 1)
        if first is None or tcp.flags & 0x02:
            if len(self._first) >= self._limit:
                self._first.pop(next(iter(self._first)))
            first = [0, 0]
            first[mine], first[other] = tcp.seq, (tcp.ack - 1) & 0xFFFFFFFF
            self._first[key] = first
            return tcp.seq, tcp.ack, first[other], first[mine]
        seq = (tcp.seq - first[mine]) & 0xFFFFFFFF
        return seq, (tcp.ack - first[other]) & 0xFFFFFFFF, first[other], first[mine]


class Texts:
    """Writes packets; remembers the first sequence numbers."""

    def __init__(
        self,
        *,
        verbose: int = 0,
        absolute: bool = False,
        name: Callable[[bytes], str] = lambda _: "",
    ) -> None:
        """`name`: what to write behind an address, empty for nothing."""
        self._verbose = verbose
        self._absolute = absolute
        self._name = name
        self._conversations = Conversations()

    def text(self, packet: Dissection, data: bytes, place: object = "", prefix: bool = True) -> str:
        """`data`: the captured bytes that were dissected.  `place`: sequence numbers are relative
        to the first seen there."""
        ip = packet.network
        if isinstance(ip, Arp):
            return self._arp(packet, ip, prefix)
        if ip is None:
            return self._nothing(packet, prefix)
        family = "IP" if isinstance(ip, Ip4) else "IP6"
        head = f"{family} " if prefix else ""
        if self._verbose:
            head += self._header(packet, ip)
        ends, body = self._body(packet, ip, data, place)
        return f"{head}{ends}: {body}"

    def _nothing(self, packet: Dissection, prefix: bool) -> str:
        if not packet.cut:
            return ""
        layer = {"ethernet": "ether", "sll2": "sll", "vlan": "vlan"}.get(packet.cut, packet.cut)
        family = {"ip": "IP ", "ip6": "IP6 ", "arp": "ARP, "}.get(packet.cut, "") if prefix else ""
        return f"{family} [|{layer}]"

    def _arp(self, packet: Dissection, arp: Arp, prefix: bool) -> str:
        head = "ARP, " if prefix else ""
        if self._verbose:
            head += "Ethernet (len 6), IPv4 (len 4), "
        sender, target = self._at(arp.sender), self._at(arp.target)
        if arp.operation == 1:
            known = f" ({mac_text(arp.target_mac)})" if any(arp.target_mac) else ""
            body = f"Request who-has {target}{known} tell {sender}"
        elif arp.operation == 2:
            body = f"Reply {sender} is-at {mac_text(arp.sender_mac)}"
        else:
            body = f"Unknown ({arp.operation})"
        return f"{head}{body}, length {packet.length}"

    def _at(self, raw: bytes, port: int | None = None) -> str:
        number = "" if port is None else f".{port}"
        name = self._name(raw)
        return f"{address(raw)}{number}{f'({name})' if name else ''}"

    def _header(self, packet: Dissection, ip: Ip4 | Ip6) -> str:
        protocol = ip.protocol if isinstance(ip, Ip4) else ip.next_header
        name = _PROTOCOLS.get(protocol) or protocol_name(protocol).upper()
        if isinstance(ip, Ip4):
            if name.isdigit():
                name = "unknown"
            flags = ",".join(w for bit, w in ((4, "rsvd"), (2, "DF"), (1, "+")) if ip.flags & bit)
            options = ", options" if ip.options else ""
            return (
                f"(tos 0x{ip.tos:x}{_ecn(ip.tos)}, ttl {ip.ttl}, id {ip.id}, offset {ip.offset}, "
                f"flags [{flags or 'none'}], proto {name} ({protocol}), length {packet.length}"
                f"{options})\n    "
            )
        if name.isdigit():
            name = "unknown"
        traffic = f"class 0x{ip.tos:02x}, " if ip.tos else ""
        label = f"flowlabel 0x{ip.flow_label:05x}, " if ip.flow_label else ""
        return (
            f"({traffic}{label}hlim {ip.ttl}, next-header {name} ({protocol}) "
            f"payload length: {ip.payload_length}) "
        )

    def _body(
        self, packet: Dissection, ip: Ip4 | Ip6, data: bytes, place: object
    ) -> tuple[str, str]:
        """Both ends, and what passes between them."""
        layer = packet.transport
        ends = f"{self._at(ip.source)} > {self._at(ip.destination)}"
        if packet.cut in ("ip", "ip6"):
            return ends, f" [|{packet.cut}]"
        shown = ""
        if isinstance(ip, Ip6) and ip.fragment:
            shown = self._fragment(packet, ip)
        if ip.offset:
            return ends, shown.rstrip() or f"ip-proto-{ip.protocol}"
        if isinstance(layer, Tcp | Udp | Sctp):
            source, target = (ip.source, layer.sport), (ip.destination, layer.dport)
            if shown:
                shown += f"{layer.sport} > {layer.dport}: "
            else:
                ends = f"{self._at(*source)} > {self._at(*target)}"
        if isinstance(layer, Tcp):
            return ends, shown + self._tcp(packet, ip, layer, data, place)
        if isinstance(layer, Udp):
            return ends, shown + self._udp(packet, ip, layer, data)
        if isinstance(layer, Sctp):
            return ends, shown + self._sctp(layer)
        if isinstance(layer, Icmp):
            size = packet.payload_length + 8
            if isinstance(ip, Ip6):
                payload = data[packet.payload_offset :]
                return ends, shown + icmp6_text(layer, payload, size, self._at)
            return ends, icmp_text(layer, size, self._at) + self._quote(layer)
        if packet.cut:
            return ends, f"{shown} [|{packet.cut}]"
        return ends, f"{shown} ip-proto-{ip.protocol} {packet.payload_length}"

    def _fragment(self, packet: Dissection, ip: Ip6) -> str:
        identity = f"0x{ip.id:08x}:" if self._verbose else ""
        size = packet.length - ip.header_length
        return f"frag ({identity}{ip.offset}|{size}) "

    def _tcp(self, packet: Dissection, ip: Ip4 | Ip6, tcp: Tcp, data: bytes, place: object) -> str:
        if not tcp.header_length:
            return " [|tcp]"
        if self._absolute:
            seq, ack, theirs, _ = tcp.seq, tcp.ack, 0, 0
        else:
            seq, ack, theirs, _ = self._conversations.relative(ip, tcp, place)
        flags = "".join(letter for bit, letter in _FLAGS if tcp.flags & bit) or "none"
        text = f"Flags [{flags}]"
        size = packet.payload_length
        if self._verbose and not ip.fragment:
            segment = data[packet.payload_offset - tcp.header_length :]
            segment = segment[: tcp.header_length + size]
            text += f", cksum 0x{tcp.checksum:04x}"
            if len(segment) == tcp.header_length + size:
                text += _judged(ip, segment, tcp.checksum, 16)
        if self._verbose > 1 or size or tcp.flags & 7:
            text += f", seq {seq}"
            if size:
                text += f":{(seq + size) & 0xFFFFFFFF}"
        if tcp.flags & 0x10:
            text += f", ack {ack}"
        text += f", win {tcp.window}"
        if tcp.flags & 0x20:
            text += f", urg {tcp.urgent}"
        if tcp.options:
            text += f", options [{','.join(_option(*option, theirs) for option in tcp.options)}"
            if packet.cut:
                return f"{text}, [|tcp]"
            text += "]"
        elif packet.cut:
            return f"{text} [|tcp]"
        text += f", length {size}"
        if size and {tcp.sport, tcp.dport} & _HTTP_PORTS:
            text += self._http(data[packet.payload_offset :][:size], size)
        return text

    def _http(self, payload: bytes, size: int) -> str:
        first = _HTTP.match(payload)
        if first is None:
            return ": HTTP"
        if not self._verbose:
            return f": HTTP: {_printable(first[0])}"
        head, _, _ = payload.partition(b"\r\n\r\n")
        lines = "".join(f"\n\t{_printable(line)}" for line in head.split(b"\r\n"))
        return f": HTTP, length: {size}{lines}\n\t"

    def _udp(self, packet: Dissection, ip: Ip4 | Ip6, udp: Udp, data: bytes) -> str:
        size = udp.length - 8 if udp.length >= 8 else packet.payload_length
        text = ""
        if self._verbose and isinstance(ip, Ip6) and not ip.fragment:
            segment = data[packet.payload_offset - 8 :][: packet.payload_length + 8]
            if len(segment) == packet.payload_length + 8 and not checksum(ip, segment):
                text = "[udp sum ok] "
        return f"{text}UDP, length {size}"

    def _sctp(self, sctp: Sctp) -> str:
        parts = [
            f" ({number}) [{_CHUNKS.get(kind, f'Unknown chunk type: 0x{kind:x}')}]"
            for number, (kind, _, _) in enumerate(sctp.chunks, 1)
        ]
        return "sctp" + "".join(parts)

    def _quote(self, icmp: Icmp) -> str:
        quoted = icmp.quoted
        if not self._verbose or quoted is None or not isinstance(quoted.network, Ip4):
            return ""
        return f"\n\t{self.text(quoted, b'', 'quoted')}"


def _ecn(tos: int) -> str:
    return ("", ",ECT(1)", ",ECT(0)", ",CE")[tos & 3]


def _judged(ip: Ip4 | Ip6, segment: bytes, sent: int, at: int) -> str:
    if not checksum(ip, segment):
        return " (correct)"
    should = checksum(ip, segment[:at] + b"\0\0" + segment[at + 2 :])
    return f" (incorrect -> 0x{should:04x})" if should != sent else " (correct)"


def _option(kind: int, data: bytes, theirs: int) -> str:
    """One TCP option."""
    if kind == 2 and len(data) == 2:
        return f"mss {int.from_bytes(data, 'big')}"
    if kind == 3 and len(data) == 1:
        return f"wscale {data[0]}"
    if kind == 5 and len(data) % 8 == 0:
        edges = [int.from_bytes(data[n : n + 4], "big") for n in range(0, len(data), 4)]
        edges = [(edge - theirs) & 0xFFFFFFFF for edge in edges]
        pairs = "".join(f"{{{a}:{b}}}" for a, b in zip(edges[::2], edges[1::2], strict=True))
        return f"sack {len(data) // 8} {pairs}"
    if kind == 8 and len(data) == 8:
        value, echo = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:], "big")
        return f"TS val {value} ecr {echo}"
    names = {0: "eol", 1: "nop", 4: "sackOK"}
    if kind in names and not data:
        return names[kind]
    return "[bad opt]" if kind < 0 else f"unknown-{kind} 0x{data.hex()}"


def _printable(line: bytes) -> str:
    """Nothing that a terminal would obey."""
    return "".join(chr(c) if 32 <= c < 127 else f"\\x{c:02x}" if c >= 127 else "." for c in line)
