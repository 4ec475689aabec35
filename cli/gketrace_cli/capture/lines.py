"""Lines for a terminal, like tcpdump's: ``12:00:01.123456 2jdh eth0 In  IP 10.0.0.1.43210 > …``.

Between the time and the packet stand the node, the interface (with its pod, where it is in one's
namespace) and the direction, in columns that grow when they must.  With `numeric`, the rest of
the line is what ``tcpdump -n`` prints for the packet; without it, the names of pods and Services
stand behind addresses, in parentheses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from gketrace.capture.dissect import dissect
from gketrace.capture.layers import Cooked, Dissection, Ethernet, address
from gketrace.capture.packets import CapturedPacket, Direction, Tap
from gketrace.packet import IPAddress
from gketrace_cli.capture.dump_text import Texts, mac_text

__all__ = ["LineStyle", "Lines", "TimeStyle", "hex_dump"]

_ETHERTYPES: Final = {
    0x0800: "IPv4",
    0x0806: "ARP",
    0x86DD: "IPv6",
    0x8100: "802.1Q",
    0x88A8: "802.1Q-QinQ",
    0x88CC: "LLDP",
    0x8847: "MPLS unicast",
}
_SLL_TYPES: Final = ("In", "B", "M", "P", "Out")


class TimeStyle(Enum):
    """tcpdump's ``-t`` options."""

    CLOCK = ""
    """``12:00:01.123456``, local time."""
    NONE = "t"
    EPOCH = "tt"
    """Seconds since the epoch."""
    DELTA = "ttt"
    """Since the packet before."""
    DATE = "tttt"
    """Day and time, local."""
    SINCE_FIRST = "ttttt"


@dataclass(frozen=True, slots=True, kw_only=True)
class LineStyle:
    """How lines are written; the names of tcpdump's options are in parentheses."""

    numeric: bool = False
    """No names (``-n``)."""
    link: bool = False
    """The link header (``-e``)."""
    verbose: int = 0
    """(``-v``, ``-vv``)."""
    absolute: bool = False
    """Sequence numbers as they are (``-S``)."""
    time: TimeStyle = TimeStyle.CLOCK
    nanoseconds: bool = False
    hex: int = 0
    """1: the packet in hexadecimal (``-x``); 2: with its link header (``-xx``)."""
    hex_ascii: int = 0
    """The same, with the text beside (``-X``, ``-XX``)."""
    ascii: bool = False
    """The packet's text below (``-A``)."""


@dataclass(slots=True)
class Lines:
    """Writes packet after packet, and remembers what relative numbers and times refer to."""

    style: LineStyle
    short: Callable[[str], str] = str
    """Node name → what is shown."""
    names: Mapping[IPAddress, str] = field(default_factory=dict)
    """Address → pod or Service, shown unless numeric."""
    place: bool = True
    """False: no node, interface and direction; as tcpdump on one interface."""
    _texts: Texts = field(init=False)
    _widths: list[int] = field(init=False, default_factory=lambda: [0, 0])
    _places: dict[tuple[Tap, int], tuple[str, str]] = field(init=False, default_factory=dict)
    _first: int | None = field(init=False, default=None)
    _last: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._texts = Texts(
            verbose=self.style.verbose,
            absolute=self.style.absolute,
            name=(lambda _: "") if self.style.numeric else self._name,
        )

    def _name(self, raw: bytes) -> str:
        name = self.names.get(address(raw), "")
        kind, _, node = name.partition("/")
        return f"node/{self.short(node)}" if kind == "node" else name

    def reserve(self, *taps: Tap) -> None:
        """Makes the columns wide enough beforehand."""
        for tap in taps:
            for index in tap.interfaces or (0,):
                self._place(tap, index)

    def text(self, packet: CapturedPacket, packet_layers: Dissection | None = None) -> str:
        """One packet: one line, or more when its bytes are wanted.  No newline at the end."""
        found = packet_layers or dissect(packet.tap.link_type, packet.data, packet.original_length)
        parts = [self._time(packet.time_ns)]
        if self.place:
            index = found.link.ifindex if isinstance(found.link, Cooked) else 0
            node, where = self._place(packet.tap, index)
            direction = _direction(packet, found)
            parts.append(f"{node:<{self._widths[0]}} {where:<{self._widths[1]}} {direction:<3}")
        shown = self._packet(packet, found)
        parts.append(shown)
        line = " ".join(part for part in parts if part)
        return line + self._bytes(packet, found)

    def _place(self, tap: Tap, index: int) -> tuple[str, str]:
        """Of ``any`` it is the interface that the packet passed, `index`, where it has a name."""
        known = self._places.get((tap, index))
        if known is None:
            pod = tap.pod.rpartition("/")[2]
            interface = tap.interfaces.get(index, tap.interface)
            where = f"{pod}:{interface}" if pod else interface
            known = self._places[tap, index] = (self.short(tap.node), where)
            self._widths = [max(w, len(t)) for w, t in zip(self._widths, known, strict=True)]
        return known

    def _packet(self, packet: CapturedPacket, found: Dissection) -> str:
        link = found.link
        shown = self._texts.text(found, packet.data, packet.tap, prefix=not self.style.link)
        if isinstance(link, Ethernet) and (self.style.link or (not shown and not found.cut)):
            return _ethernet(link, packet.original_length) + (shown or "")
        if isinstance(link, Cooked) and (self.style.link or (not shown and not found.cut)):
            return f"{_cooked(link, packet.original_length)}{shown}"
        return shown or f"length {packet.original_length}"

    def _time(self, now: int) -> str:
        style = self.style.time
        if self._first is None:
            self._first = now
        last = now if self._last is None else self._last
        self._last = now
        digits = 9 if self.style.nanoseconds else 6
        if style is TimeStyle.NONE:
            return ""
        if style is TimeStyle.DELTA:
            return _elapsed(now, last, digits)
        if style is TimeStyle.SINCE_FIRST:
            return _elapsed(now, self._first, digits)
        seconds, rest = divmod(now, 10**9)
        fraction = f"{rest:09d}"[:digits]
        if style is TimeStyle.EPOCH:
            return f"{seconds}.{fraction}"
        form = "%Y-%m-%d %H:%M:%S" if style is TimeStyle.DATE else "%H:%M:%S"
        return f"{time.strftime(form, time.localtime(seconds))}.{fraction}"

    def _bytes(self, packet: CapturedPacket, found: Dissection) -> str:
        style = self.style
        level = style.hex_ascii or style.hex
        if not level and not style.ascii:
            return ""
        shown = packet.data if level == 2 else packet.data[found.network_offset :]
        if style.ascii:
            text = shown.replace(b"\r\n", b"\n")
            return "\n" + "".join(chr(c) if 32 <= c < 127 or c in (9, 10) else "." for c in text)
        return "\n" + hex_dump(shown, ascii=bool(style.hex_ascii))


def hex_dump(data: bytes, *, ascii: bool) -> str:
    """As tcpdump's ``-x`` and ``-X``: sixteen bytes a line."""
    made = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        pairs = " ".join(row[n : n + 2].hex() for n in range(0, len(row), 2))
        text = "".join(chr(c) if 33 <= c < 127 else "." for c in row)
        made.append(f"\t0x{at:04x}:  {pairs:<39}  {text}" if ascii else f"\t0x{at:04x}:  {pairs}")
    return "\n".join(made)


def _direction(packet: CapturedPacket, found: Dissection) -> str:
    if packet.direction is Direction.UNKNOWN:
        kind = found.link.packet_type if isinstance(found.link, Cooked) else -1
        return _SLL_TYPES[kind] if 0 <= kind < len(_SLL_TYPES) else "?"
    return "In" if packet.direction is Direction.IN else "Out"


def _elapsed(now: int, since: int, digits: int) -> str:
    """The difference of two times as they are shown, each cut to `digits`."""
    unit: int = 10 ** (9 - digits)
    difference = now // unit - since // unit
    sign = "-" if difference < 0 else ""
    seconds, rest = divmod(abs(difference), 10**digits)
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    return f"{sign} {hours:02d}:{minute:02d}:{second:02d}.{rest:0{digits}d}"


def _type_text(kind: int) -> str:
    return f"{_ETHERTYPES.get(kind, 'Unknown')} (0x{kind:04x})"


def _ethernet(link: Ethernet, length: int) -> str:
    first = 0x8100 if link.vlans else link.ethertype
    text = f"{mac_text(link.source)} > {mac_text(link.destination)}, "
    text += f"ethertype {_type_text(first)}, length {length}: "
    for number, tag in enumerate(link.vlans):
        last = number == len(link.vlans) - 1
        kind = _type_text(link.ethertype if last else 0x8100)
        text += f"vlan {tag & 0xFFF}, p {tag >> 13}, ethertype {kind}, "
    return text


def _cooked(link: Cooked, length: int) -> str:
    index = f"ifindex {link.ifindex} " if link.ifindex else ""
    return (
        f"{index}{mac_text(link.source)} ethertype {_type_text(link.ethertype)}, length {length}: "
    )
