"""Packets of one tap that came together, as NumPy columns over the bytes that the agent sent.

Nothing is done for one packet at a time until somebody asks for `CapturedPacket`s.
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

__all__ = ["PacketBatch", "batch_from_blocks", "batch_from_packets"]

Array: TypeAlias = npt.NDArray[Any]

_HEADER: Final = np.dtype(
    {
        "names": [
            *("next", "sec", "nsec", "snaplen", "length", "status", "mac", "net"),
            *("vlan_tci", "vlan_tpid", "protocol", "ifindex", "hatype", "pkttype", "halen"),
            "address",
        ],
        "formats": [
            *("<u4", "<u4", "<u4", "<u4", "<u4", "<u4", "<u2", "<u2"),
            *("<u4", "<u2", "<u2", "<u4", "<u2", "u1", "u1"),
            "<u8",
        ],
        "offsets": [
            *(ring.NEXT, ring.SEC, ring.NSEC, ring.SNAPLEN, ring.LENGTH, ring.STATUS),
            *(ring.MAC, ring.NET, ring.VLAN_TCI, ring.VLAN_TPID, ring.PROTOCOL, ring.IFINDEX),
            *(ring.HATYPE, ring.PKTTYPE, ring.HALEN, ring.ADDRESS),
        ],
        "itemsize": ring.HEADER_LENGTH,
    }
)
_FAMILY: Final = np.uint64(0xFFFF)
_FAMILY_AND_INTERFACE: Final = np.uint64(0xFFFFFFFF0000FFFF)
_MACS: Final = 12
"""Bytes before the place of a VLAN tag."""
_TAG: Final = 4
_8021Q: Final = 0x8100
_ETHERNET_HEADER: Final = 14


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
    flags: Array
    """uint16; `PacketFlag`."""
    directions: Array
    """uint8; 0: unknown, 1: in, 2: out."""
    vlans: Array
    """int32; tag control information that was put back; -1: none."""
    ifindexes: Array
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

    def take(self, which: Array | slice) -> PacketBatch:
        """Some of the packets, by a mask, indexes or a slice."""
        comments = self.comments
        if comments is not None:
            places = np.arange(len(self))[which]
            comments = tuple(comments[place] for place in places)
        return replace(
            self,
            starts=self.starts[which],
            sizes=self.sizes[which],
            times=self.times[which],
            lengths=self.lengths[which],
            flags=self.flags[which],
            directions=self.directions[which],
            vlans=self.vlans[which],
            ifindexes=self.ifindexes[which],
            heads=None if self.heads is None else self.heads[which],
            comments=comments,
        )

    def shifted(self, nanoseconds: int) -> PacketBatch:
        """With `nanoseconds` added to all times."""
        return self if not nanoseconds else replace(self, times=self.times + nanoseconds)

    def packet(self, place: int) -> CapturedPacket:
        """One packet; its bytes are copied."""
        start, size = int(self.starts[place]), int(self.sizes[place])
        data = self.buffer[start : start + size].tobytes()
        if self.heads is not None:
            data = self.heads[place].tobytes() + data
        vlan = int(self.vlans[place])
        return CapturedPacket(
            tap=self.tap,
            time_ns=int(self.times[place]),
            data=data,
            original_length=int(self.lengths[place]),
            direction=_DIRECTIONS[self.directions[place]],
            vlan=None if vlan < 0 else vlan,
            flags=PacketFlag(int(self.flags[place])),
            ifindex=int(self.ifindexes[place]),
            comment="" if self.comments is None else self.comments[place],
        )

    def packets(self) -> Iterator[CapturedPacket]:
        """All of them, made one by one."""
        return map(self.packet, range(len(self)))


_DIRECTIONS: Final = (Direction.UNKNOWN, Direction.IN, Direction.OUT)


def batch_from_blocks(
    tap: Tap, data: memoryview, counts: tuple[int, ...], lengths: tuple[int, ...]
) -> PacketBatch:
    """What CapturePackets has (`gketrace.capture.ring`).

    Raises `GketraceError` when the blocks' packets are not where their headers say.
    """
    buffer = np.frombuffer(data, np.uint8)
    places = _places(tap, buffer, np.array(counts, np.int64), np.array(lengths, np.int64))
    # A view of overlapping headers, one at each byte; only those at `places` are read.
    windows = np.ndarray(
        (max(len(buffer) - ring.HEADER_LENGTH + 1, 0),), _HEADER, buffer.data, strides=(1,)
    )
    headers = windows[places]
    status = headers["status"]
    starts = places + headers["mac"]
    sizes = headers["snaplen"].astype(np.int64)
    sent_lengths = headers["length"].astype(np.int64)
    times = headers["sec"].astype(np.int64)
    times *= 1_000_000_000
    times += headers["nsec"]
    pkttypes = headers["pkttype"]
    directions = np.where(pkttypes == ring.PacketType.OUTGOING, 2, 1).astype(np.uint8)
    flags = _flags(tap, status, pkttypes, sent_lengths)
    heads = None
    vlans = np.full(len(places), -1, np.int32)
    tagged = (status & int(ring.Status.VLAN_VALID)) != 0
    if tap.link_type == LinkType.LINUX_SLL2:
        heads = _cooked(headers)
        sent_lengths += ring.COOKED_LENGTH
        vlans[tagged] = headers["vlan_tci"][tagged]
    elif tagged.any():
        rows = np.flatnonzero(tagged)
        vlans[rows] = headers["vlan_tci"][rows]
        fits = rows[sizes[rows] >= _MACS]
        buffer = _put_back(buffer, starts[fits], headers[fits])
        starts[fits] -= _TAG
        sizes[fits] += _TAG
        sent_lengths[rows] += _TAG
    return PacketBatch(
        tap=tap,
        buffer=buffer,
        starts=starts,
        sizes=sizes,
        times=times,
        lengths=sent_lengths,
        flags=flags,
        directions=directions,
        vlans=vlans,
        ifindexes=headers["ifindex"],
        heads=heads,
    )


def _places(tap: Tap, buffer: Array, counts: Array, lengths: Array) -> Array:
    """Where the packets' headers begin.

    Each header says where the next one is.  To follow that chain takes a step of Python for each
    packet; so headers are looked for by what they all have (the address family and the interface
    in sockaddr_ll), and then the chain is checked for all of them together.  Only where something
    else looks like a header, too, is the chain followed.
    """
    if int(lengths.sum()) != len(buffer) or len(buffer) % ring.ALIGNMENT:
        raise GketraceError("an agent's packets and their lengths do not agree")
    ends = np.cumsum(lengths)
    words = buffer.view("<u8")[ring.SLL // 8 :]
    if tap.ifindex:
        found = (words & _FAMILY_AND_INTERFACE) == np.uint64(tap.ifindex << 32 | ring.AF_PACKET)
    else:
        found = (words & _FAMILY) == np.uint64(ring.AF_PACKET)
    places = np.flatnonzero(found) * ring.ALIGNMENT
    total = int(counts.sum())
    nexts = buffer.view("<u4")[places // 4] if len(places) == total else None
    if nexts is None or not _is_chain(places, nexts, counts, lengths, ends):
        return _follow(buffer, counts, ends, lengths)
    return places


def _is_chain(places: Array, nexts: Array, counts: Array, lengths: Array, ends: Array) -> bool:
    """Whether each header leads to the next one, and each block begins where it must."""
    firsts = np.cumsum(counts) - counts
    reached = places + nexts
    # The last header of a block has 0, and what it reaches is the next block.
    reached[firsts + counts - 1] = ends
    return bool(
        np.array_equal(places[firsts], ends - lengths) and np.array_equal(places[1:], reached[:-1])
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
            if left and step < ring.HEADER_LENGTH:
                raise GketraceError("an agent's packets are not where their headers say")
            place += step
    return np.array(places, np.int64)


def _flags(tap: Tap, status: Array, pkttypes: Array, lengths: Array) -> Array:
    flags = np.zeros(len(status), np.uint16)
    for bit, flag in (
        (ring.Status.CHECKSUM_NOT_READY, PacketFlag.CHECKSUM_NOT_READY),
        (ring.Status.CHECKSUM_VALID, PacketFlag.CHECKSUM_VALID),
        (ring.Status.GSO_TCP, PacketFlag.MERGED),
        (ring.Status.HARDWARE_TIME, PacketFlag.HARDWARE_TIME),
    ):
        flags[(status & int(bit)) != 0] |= int(flag)
    for kind, flag in (
        (ring.PacketType.OTHERHOST, PacketFlag.NOT_FOR_US),
        (ring.PacketType.BROADCAST, PacketFlag.BROADCAST),
        (ring.PacketType.MULTICAST, PacketFlag.MULTICAST),
    ):
        flags[pkttypes == kind] |= int(flag)
    if tap.mtu:
        header = _ETHERNET_HEADER + _TAG if tap.link_type == LinkType.ETHERNET else 0
        flags[lengths > tap.mtu + header] |= int(PacketFlag.MERGED)
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


def _cooked(headers: Array) -> Array:
    """The link headers of LINKTYPE_LINUX_SLL2."""
    made = np.zeros(len(headers), _COOKED)
    for name in ("protocol", "ifindex", "hatype", "pkttype", "halen", "address"):
        made[name] = headers[name]  # the protocol is big endian in both
    return made.view(np.uint8).reshape(len(headers), ring.COOKED_LENGTH)


def _put_back(buffer: Array, starts: Array, headers: Array) -> Array:
    """A copy of `buffer` in which the packets that begin at `starts` have their VLAN tags again.

    Their MAC addresses move four bytes to the front, into what the kernel leaves free there, as
    libpcap does it.
    """
    buffer = buffer.copy()
    macs = starts[:, None] + np.arange(_MACS)
    buffer[macs - _TAG] = buffer[macs]
    has_tpid = (headers["status"] & int(ring.Status.VLAN_TPID_VALID)) != 0
    tag = np.zeros((len(starts), 2), ">u2")
    tag[:, 0] = np.where(has_tpid, headers["vlan_tpid"], _8021Q)
    tag[:, 1] = headers["vlan_tci"]
    places = starts[:, None] + np.arange(_MACS - _TAG, _MACS)
    buffer[places] = tag.view(np.uint8).reshape(len(starts), _TAG)
    return buffer


def batch_from_packets(tap: Tap, packets: list[CapturedPacket]) -> PacketBatch:
    """The other way: for writing what was read from a file or changed packet by packet."""
    sizes = np.array([len(one.data) for one in packets], np.int64)
    vlans = [-1 if one.vlan is None else one.vlan for one in packets]
    return PacketBatch(
        tap=tap,
        buffer=np.frombuffer(b"".join(one.data for one in packets), np.uint8),
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        times=np.array([one.time_ns for one in packets], np.int64),
        lengths=np.array([one.original_length for one in packets], np.int64),
        flags=np.array([int(one.flags) for one in packets], np.uint16),
        directions=np.array([_DIRECTIONS.index(one.direction) for one in packets], np.uint8),
        vlans=np.array(vlans, np.int32),
        ifindexes=np.array([one.ifindex for one in packets], np.uint32),
        comments=tuple(one.comment for one in packets),
    )
