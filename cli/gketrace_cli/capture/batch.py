"""Packets of one tap that came together, as NumPy columns over the bytes that the agent sent.

Nothing is done for one packet at a time until somebody asks for `CapturedPacket`s, and columns that
not everybody wants are made when they are asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from gketrace.capture import ring
from gketrace.capture.packets import CapturedPacket, Direction, LinkType, PacketFlag, Tap
from gketrace.errors import GketraceError

__all__ = ["Array", "PacketBatch", "batch_from_blocks", "batch_from_packets"]

Array: TypeAlias = npt.NDArray[Any]

_HEADER: Final = 64
"""Bytes of a packet's header that are looked at: all but half of its link address."""
# What the header's words of 4 bytes are.
_SEC: Final = ring.SEC // 4
_NSEC: Final = ring.NSEC // 4
_SNAPLEN: Final = ring.SNAPLEN // 4
_LENGTH: Final = ring.LENGTH // 4
_STATUS: Final = ring.STATUS // 4
_TCI: Final = ring.VLAN_TCI // 4
_TPID: Final = ring.VLAN_TPID // 4
_PROTOCOL: Final = ring.SLL // 4
_IFINDEX: Final = ring.IFINDEX // 4
_HATYPE: Final = ring.HATYPE // 4
_MAC: Final = ring.MAC // 2
"""Of its words of 2 bytes."""
_SECOND: Final = 1_000_000_000
_MACS: Final = 12
"""Bytes before the place of a VLAN tag."""
_TAG: Final = 4
_8021Q: Final = 0x8100
_ETHERNET_HEADER: Final = 14
_PROTOCOLS: Final = (0x0008, 0xDD86, 0x0608)
"""IPv4, IPv6, ARP: EtherTypes as a little endian number has them."""
_DIRECTIONS: Final = (Direction.UNKNOWN, Direction.IN, Direction.OUT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PacketBatch:
    """Columns have one element for each packet, in the order of the kernel's ring."""

    tap: Tap
    buffer: Array
    """uint8; where the packets' bytes are."""
    starts: Array
    """int64; of each packet's bytes in `buffer`, after `heads`."""
    sizes: Array
    """int64; bytes there."""
    times: Array
    """int64; nanoseconds since the epoch."""
    lengths: Array
    """int64; bytes that the packet had, `heads` among them."""
    headers: Array | None = None
    """uint32, N x 16: the kernel's headers (`gketrace.capture.ring`); None: read from a file."""
    read: tuple[Array, Array, Array, Array] | None = None
    """Where there are no `headers`: flags, directions, vlans, ifindexes."""
    heads: Array | None = None
    """uint8, N x 20: cooked headers, which the kernel does not write; they come before the
    packet's bytes."""
    comments: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def head_size(self) -> int:
        """Bytes of each of `heads`."""
        return 0 if self.heads is None else int(self.heads.shape[1])

    @property
    def captured(self) -> int:
        """Bytes of all packets together."""
        return int(self.sizes.sum()) + self.head_size * len(self)

    @property
    def pkttypes(self) -> Array | None:
        """uint8; `ring.PacketType`.  None: the file does not say."""
        return None if self.headers is None else _pkttypes(self.headers)

    @property
    def flags(self) -> Array:
        """uint16; `PacketFlag`."""
        if self.headers is None:
            return self._from_file[0]
        return _flags(self.tap, self.headers)

    @property
    def directions(self) -> Array:
        """uint8; 0: unknown, 1: in, 2: out."""
        if self.headers is None:
            return self._from_file[1]
        outgoing = _pkttypes(self.headers) == ring.PacketType.OUTGOING
        return np.where(outgoing, 2, 1).astype(np.uint8)

    @property
    def vlans(self) -> Array:
        """int32; tag control information that the kernel had taken off; -1: none."""
        if self.headers is None:
            return self._from_file[2]
        tagged = (self.headers[:, _STATUS] & int(ring.Status.VLAN_VALID)) != 0
        return np.where(tagged, self.headers[:, _TCI].astype(np.int32), -1)

    @property
    def ifindexes(self) -> Array:
        """uint32; 0: not known."""
        return self._from_file[3] if self.headers is None else self.headers[:, _IFINDEX]

    @property
    def _from_file(self) -> tuple[Array, Array, Array, Array]:
        assert self.read is not None
        return self.read

    def take(self, which: Array | slice) -> PacketBatch:
        """Some of the packets, by a mask, indexes or a slice."""
        comments = self.comments
        if comments is not None:
            places = np.arange(len(self))[which].tolist()
            comments = tuple(comments[place] for place in places)
        flags, directions, vlans, ifindexes = self.read or (None,) * 4
        read = None
        if flags is not None and directions is not None:
            assert vlans is not None
            assert ifindexes is not None
            read = flags[which], directions[which], vlans[which], ifindexes[which]
        return replace(
            self,
            starts=self.starts[which],
            sizes=self.sizes[which],
            times=self.times[which],
            lengths=self.lengths[which],
            headers=None if self.headers is None else self.headers[which],
            read=read,
            heads=None if self.heads is None else self.heads[which],
            comments=comments,
        )

    def shifted(self, nanoseconds: int) -> PacketBatch:
        """With `nanoseconds` added to all times."""
        return self if not nanoseconds else replace(self, times=self.times + nanoseconds)

    def packets(self) -> Iterator[CapturedPacket]:
        """All of them, made one by one; their bytes are copied."""
        view = self.buffer.data
        heads = self.heads
        flags = self.flags.tolist()
        directions = self.directions.tolist()
        vlans = self.vlans.tolist()
        ifindexes = self.ifindexes.tolist()
        for place, (start, size, time_ns, length) in enumerate(
            zip(
                self.starts.tolist(),
                self.sizes.tolist(),
                self.times.tolist(),
                self.lengths.tolist(),
                strict=True,
            )
        ):
            data = bytes(view[start : start + size])
            yield CapturedPacket(
                tap=self.tap,
                time_ns=time_ns,
                data=data if heads is None else heads[place].tobytes() + data,
                original_length=length,
                direction=_DIRECTIONS[directions[place]],
                vlan=None if vlans[place] < 0 else vlans[place],
                flags=PacketFlag(flags[place]),
                ifindex=ifindexes[place],
                comment="" if self.comments is None else self.comments[place],
            )


def batch_from_blocks(
    tap: Tap, data: memoryview, counts: tuple[int, ...], lengths: tuple[int, ...]
) -> PacketBatch:
    """What CapturePackets has (`gketrace.capture.ring`).

    Raises `GketraceError` when the blocks' packets are not where their headers say.
    """
    buffer = np.frombuffer(data, np.uint8)
    if sum(lengths) != len(buffer):
        raise GketraceError("an agent's packets and their lengths do not agree")
    if sum(counts) > len(buffer) // ring.HEADER_LENGTH:
        raise GketraceError("an agent's packets are not where their headers say")
    places, headers = _headers(tap, buffer, np.array(counts, np.int64), np.array(lengths, np.int64))
    offsets = headers.view("<u2")[:, _MAC]
    starts = places + offsets
    sizes = headers[:, _SNAPLEN].astype(np.int64)
    sent = headers[:, _LENGTH].astype(np.int64)
    if len(places) and (
        int((starts + sizes).max()) > len(buffer) or int(offsets.min()) < ring.HEADER_LENGTH
    ):
        raise GketraceError("an agent's packets are not where their headers say")
    times = headers[:, _SEC].astype(np.int64)
    times *= _SECOND
    times += headers[:, _NSEC]
    heads = None
    if tap.link_type == LinkType.LINUX_SLL2:
        heads = _cooked(headers, buffer, places)
        sent += ring.COOKED_LENGTH
    elif (headers[:, _STATUS] & int(ring.Status.VLAN_VALID)).any():
        tagged = np.flatnonzero(headers[:, _STATUS] & int(ring.Status.VLAN_VALID))
        fits = tagged[sizes[tagged] >= _MACS]
        buffer = _put_back(buffer, starts[fits], headers[fits])
        starts[fits] -= _TAG
        sizes[fits] += _TAG
        sent[tagged] += _TAG
    if tap.snap_length:
        # What is put before a packet counts, too.
        most = tap.snap_length - (0 if heads is None else ring.COOKED_LENGTH)
        if len(sizes) and int(sizes.max()) > most:
            np.minimum(sizes, max(most, 0), out=sizes)
    return PacketBatch(
        tap=tap,
        buffer=buffer,
        starts=starts,
        sizes=sizes,
        times=times,
        lengths=sent,
        headers=headers,
        heads=heads,
    )


def _headers(tap: Tap, buffer: Array, counts: Array, lengths: Array) -> tuple[Array, Array]:
    """Where the packets' headers begin, and the headers.

    Each header says where the next one is.  To follow that chain takes a step of Python for each
    packet; so headers are looked for by what they all have (the address family and the interface
    in sockaddr_ll), and then the chain is checked for all of them together.  Only where something
    else looks like a header, too, is the chain followed.
    """
    if len(counts) != len(lengths) or len(buffer) % ring.ALIGNMENT or not counts.all():
        raise GketraceError("an agent's packets and their lengths do not agree")
    ends = np.cumsum(lengths)
    total = int(counts.sum())
    for find in (_equal_steps, _same_link, _alike):
        places = find(tap, buffer, total)
        if 0 < len(places) == total and int(places[-1]) + _HEADER <= len(buffer):
            headers = _read(buffer, places)
            if _is_chain(places, headers[:, 0], counts, lengths, ends):
                return places, headers
    places = _follow(buffer, counts, ends, lengths)
    return places, _read(buffer, places)


def _read(buffer: Array, places: Array) -> Array:
    """The headers at `places`, in words of 4 bytes."""
    # A view of overlapping headers, one at each byte; only those at `places` are read.
    windows = np.ndarray(
        (max(len(buffer) - _HEADER + 1, 0),), f"V{_HEADER}", buffer.data, strides=(1,)
    )
    return windows[places].view("<u4").reshape(len(places), _HEADER // 4)


def _equal_steps(_: Tap, buffer: Array, total: int) -> Array:
    """For packets of one size, as in bulk transfers: every block is full of equal steps."""
    step, rest = divmod(len(buffer), max(total, 1))
    if rest or step % ring.ALIGNMENT:
        return np.zeros(0, np.int64)
    return np.arange(total, dtype=np.int64) * step


def _same_link(tap: Tap, buffer: Array, total: int) -> Array:
    """Where there are headers of packets of the usual protocols, of the tap's interface: the whole
    word is compared, which takes half the time of looking at a part of each."""
    words = buffer.view("<u8")
    found: Array | None = None
    for protocol in _PROTOCOLS if tap.ifindex else ():
        word = tap.ifindex << 32 | protocol << 16 | ring.AF_PACKET
        more = words == np.uint64(word)
        found = more if found is None else found | more
        places = np.flatnonzero(found)
        if len(places) == total:
            break
    else:
        return np.zeros(0, np.int64)
    places *= ring.ALIGNMENT
    places -= ring.SLL
    return places


def _alike(tap: Tap, buffer: Array, _: int) -> Array:
    """The same for any protocol, and for taps of all interfaces."""
    halves = buffer.view("<u4")
    if tap.ifindex:
        found = halves[_IFINDEX::2] == tap.ifindex
    else:
        found = (halves[_PROTOCOL::2] & 0xFFFF) == ring.AF_PACKET
    places = np.flatnonzero(found) * ring.ALIGNMENT
    return np.compress((halves[(places >> 2) + _PROTOCOL] & 0xFFFF) == ring.AF_PACKET, places)


def _is_chain(places: Array, nexts: Array, counts: Array, lengths: Array, ends: Array) -> bool:
    """Whether each header leads to the next one, and each block begins where it must."""
    firsts = np.cumsum(counts) - counts
    reached = places + nexts
    # The last header of a block has 0, and what it reaches is the next block.
    lasts = firsts + counts - 1
    reached[lasts] = ends
    return bool(
        np.array_equal(places[firsts], ends - lengths)
        and np.array_equal(places[1:], reached[:-1])
        and (places[lasts] + ring.HEADER_LENGTH <= ends).all()
    )


def _follow(buffer: Array, counts: Array, ends: Array, lengths: Array) -> Array:
    """The chain of headers, step by step."""
    view = buffer.data
    read = struct.Struct("<I").unpack_from
    places: list[int] = []
    for count, end, length in zip(counts.tolist(), ends.tolist(), lengths.tolist(), strict=True):
        place = end - length
        for left in range(count - 1, -1, -1):
            if place + ring.HEADER_LENGTH > end:
                raise GketraceError("an agent's packets are not where their headers say")
            places.append(place)
            step = read(view, place)[0]
            if left and (step < ring.HEADER_LENGTH or step % ring.ALIGNMENT):
                raise GketraceError("an agent's packets are not where their headers say")
            place += step
    return np.array(places, np.int64)


def _pkttypes(headers: Array) -> Array:
    return headers.view(np.uint8)[:, ring.PKTTYPE]


def _flags(tap: Tap, headers: Array) -> Array:
    status, pkttypes = headers[:, _STATUS], _pkttypes(headers)
    flags = np.zeros(len(status), np.uint16)
    for bit, flag in (
        (ring.Status.CHECKSUM_NOT_READY, PacketFlag.CHECKSUM_NOT_READY),
        (ring.Status.CHECKSUM_VALID, PacketFlag.CHECKSUM_VALID),
        (ring.Status.GSO_TCP, PacketFlag.MERGED),
        (ring.Status.HARDWARE_TIME, PacketFlag.HARDWARE_TIME),
    ):
        flags[(status & np.uint32(int(bit))) != 0] |= int(flag)
    for kind, flag in (
        (ring.PacketType.OTHERHOST, PacketFlag.NOT_FOR_US),
        (ring.PacketType.BROADCAST, PacketFlag.BROADCAST),
        (ring.PacketType.MULTICAST, PacketFlag.MULTICAST),
    ):
        flags[pkttypes == kind] |= int(flag)
    if tap.mtu:
        most = tap.mtu + (_ETHERNET_HEADER if tap.link_type == LinkType.ETHERNET else 0)
        flags[headers[:, _LENGTH] > most] |= int(PacketFlag.MERGED)
    return flags


_COOKED: Final = np.dtype(
    [
        ("protocol", "<u2"),
        ("reserved", "<u2"),
        ("ifindex", ">u4"),
        ("hatype", ">u2"),
        ("pkttype", "u1"),
        ("halen", "u1"),
        ("address", "<u8"),
    ]
)


def _cooked(headers: Array, buffer: Array, places: Array) -> Array:
    """The link headers of LINKTYPE_LINUX_SLL2."""
    made = np.zeros(len(headers), _COOKED)
    made["protocol"] = headers[:, _PROTOCOL] >> 16  # big endian in both
    made["ifindex"] = headers[:, _IFINDEX]
    made["hatype"] = headers[:, _HATYPE] & 0xFFFF
    made["pkttype"] = headers[:, _HATYPE] >> 16
    made["halen"] = headers[:, _HATYPE] >> 24
    halves = buffer.view("<u4")
    first = (places + ring.ADDRESS) >> 2
    made["address"] = halves[first + 1].astype(np.uint64) << np.uint64(32) | halves[first]
    return made.view(np.uint8).reshape(len(headers), ring.COOKED_LENGTH)


def _put_back(buffer: Array, starts: Array, headers: Array) -> Array:
    """A copy of `buffer` in which the packets that begin at `starts` have their VLAN tags again.

    Their MAC addresses move four bytes to the front, into what the kernel leaves free there, as
    libpcap does it.
    """
    buffer = buffer.copy()
    macs = starts[:, None] + np.arange(_MACS)
    buffer[macs - _TAG] = buffer[macs]
    has_tpid = (headers[:, _STATUS] & int(ring.Status.VLAN_TPID_VALID)) != 0
    tag = np.zeros((len(starts), 2), ">u2")
    tag[:, 0] = np.where(has_tpid, headers[:, _TPID] & 0xFFFF, _8021Q)
    tag[:, 1] = headers[:, _TCI]
    places = starts[:, None] + np.arange(_MACS - _TAG, _MACS)
    buffer[places] = tag.view(np.uint8).reshape(len(starts), _TAG)
    return buffer


def batch_from_packets(tap: Tap, packets: list[CapturedPacket]) -> PacketBatch:
    """The other way: for writing what was read from a file, or is changed packet by packet."""
    sizes = np.array([len(one.data) for one in packets], np.int64)
    vlans = [-1 if one.vlan is None else one.vlan for one in packets]
    return PacketBatch(
        tap=tap,
        buffer=np.frombuffer(b"".join(one.data for one in packets), np.uint8),
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        times=np.array([one.time_ns for one in packets], np.int64),
        lengths=np.array([one.original_length for one in packets], np.int64),
        read=(
            np.array([int(one.flags) for one in packets], np.uint16),
            np.array([_DIRECTIONS.index(one.direction) for one in packets], np.uint8),
            np.array(vlans, np.int32),
            np.array([one.ifindex for one in packets], np.uint32),
        ),
        comments=tuple(one.comment for one in packets),
    )
