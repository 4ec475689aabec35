"""Packets off one interface, through a ring of memory that the kernel fills (TPACKET_V3).

The kernel writes packet after packet into a block, and hands over a block when it is full or when
its first packet has waited long enough.  Here blocks are copied as they are: the cost is for each
block, not for each packet.

Source: packet(7); net/packet/af_packet.c packet_set_ring(), tpacket_rcv(),
prb_retire_rx_blk_timer_expired().
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

from gketrace.capture import ring
from gketrace.errors import (
    ExhaustedError,
    ForbiddenError,
    GketraceError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from gketrace_agent.kernel.libpcap import ANY, Program

__all__ = ["BLOCK_SIZE", "Blocks", "Interface", "PacketRing", "find_interface", "interface_names"]

BLOCK_SIZE: Final = 256 << 10
"""Bytes; the largest packet of a ring, 64 KiB that GRO has merged, has to fit in."""
_FRAME_SIZE: Final = 2048
"""The kernel wants one that divides a block; packets have any size in TPACKET_V3."""
_V3: Final = 2
_ETH_P_ALL: Final = 0x0003
_SOL_PACKET: Final = 263
_PACKET_RX_RING: Final = 5
_PACKET_STATISTICS: Final = 6
_PACKET_VERSION: Final = 10
_PACKET_TIMESTAMP: Final = 17
_PACKET_IGNORE_OUTGOING: Final = 23
_SO_ATTACH_FILTER: Final = 26
_TIMESTAMP_RAW_HARDWARE: Final = 1 << 6
"""SOF_TIMESTAMPING_RAW_HARDWARE."""
_USER: Final = 1
"""TP_STATUS_USER: the block is ours."""
# struct tpacket_block_desc: what follows `version` and `offset_to_priv`.
_BLOCK_STATUS: Final = 8
_BLOCK: Final = struct.Struct("=IIII")
"""block_status, num_pkts, offset_to_first_pkt, blk_len."""
_NEXT: Final = struct.Struct("=I")
_NOTHING: Final = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""Classic BPF: return 0."""
_SIOCGIFNAME: Final = 0x8910
_SIOCGIFFLAGS: Final = 0x8913
_SIOCGIFMTU: Final = 0x8921
_SIOCGIFHWADDR: Final = 0x8927
_IFF_LOOPBACK: Final = 0x8
_IFF_UP: Final = 0x1
_IFREQ: Final = 40
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One of the calling thread's network namespace; or all of them, with `ifindex` 0."""

    name: str
    ifindex: int = 0
    mtu: int = 0
    hatype: int = 1
    """ARPHRD_ value."""
    hardware: str = ""
    loopback: bool = False
    up: bool = True


def find_interface(name: str) -> Interface:
    """Looks in the calling thread's network namespace.  Raises `NotFoundError`."""
    if name == ANY:
        return Interface(name=ANY)
    if not name or len(os.fsencode(name)) > 15:
        raise NotFoundError(f"there is no interface {name!r} there")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asked:
        try:
            ifindex = socket.if_nametoindex(name)
            flags = _ask(asked, _SIOCGIFFLAGS, name, "=H")
            mtu = _ask(asked, _SIOCGIFMTU, name, "=i")
            hatype = _ask(asked, _SIOCGIFHWADDR, name, "=H")
            raw = fcntl.ioctl(asked, _SIOCGIFHWADDR, _request(name))[18:24]
        except OSError as error:
            if error.errno in (None, errno.ENODEV, errno.ENXIO):  # None: if_nametoindex(3)
                raise NotFoundError(f"there is no interface {name} there") from None
            raise UnavailableError(f"cannot read interface {name}: {error.strerror}") from None
    return Interface(
        name=name,
        ifindex=ifindex,
        mtu=mtu,
        hatype=hatype,
        hardware=":".join(f"{byte:02x}" for byte in raw) if any(raw) else "",
        loopback=bool(flags & _IFF_LOOPBACK),
        up=bool(flags & _IFF_UP),
    )


def interface_names() -> dict[int, str]:
    """Of the calling thread's network namespace, by index."""
    return dict(socket.if_nameindex())


def _request(name: str) -> bytes:
    return os.fsencode(name).ljust(_IFREQ, b"\0")


def _ask(asked: socket.socket, what: int, name: str, form: str) -> int:
    return int(struct.unpack_from(form, fcntl.ioctl(asked, what, _request(name)), 16)[0])


@dataclass(frozen=True, slots=True)
class Blocks:
    """What was taken off a ring."""

    parts: tuple[memoryview, ...]
    """Of the ring: to be copied before the next `PacketRing` call."""
    counts: tuple[int, ...]
    """Packets of each part."""

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))


class PacketRing:
    """One socket with its ring, in the network namespace of the thread that makes it.

    The thread may leave the namespace then; the socket stays in it.  Use it from one thread.
    """

    def __init__(
        self,
        interface: Interface,
        program: Program,
        *,
        cooked: bool,
        ring_bytes: int,
        retire_ms: int,
        ignore_outgoing: bool = False,
        hardware_timestamps: bool = False,
    ) -> None:
        """Captures when it is made.  Raises `ForbiddenError`, `ExhaustedError`,
        `UnavailableError`, `UnsupportedError`."""
        self.interface: Final = interface
        self._count = max(ring_bytes // BLOCK_SIZE, 2)
        self.size: Final = self._count * BLOCK_SIZE
        """Bytes of the ring."""
        self.cut = False
        """Some packets were left out, for want of `take`'s `packets` or `size`."""
        self._at = 0
        """The block that is ours next."""
        self._held: list[int] = []
        """Blocks that were handed out and are to be given back."""
        self._lent: list[memoryview] = []
        kind = socket.SOCK_DGRAM if cooked else socket.SOCK_RAW
        try:
            # Protocol 0: nothing comes in until the filter is there and `bind` says so.
            self._socket = socket.socket(socket.AF_PACKET, kind | socket.SOCK_CLOEXEC, 0)
        except PermissionError:
            raise ForbiddenError("may not capture", hint="the agent needs NET_RAW") from None
        except OSError as error:
            raise UnavailableError(f"no packet socket: {error.strerror}") from None
        try:
            self._set(_PACKET_VERSION, _V3)
            if ignore_outgoing:
                self._set(_PACKET_IGNORE_OUTGOING, 1)
            if hardware_timestamps:
                self._set(_PACKET_TIMESTAMP, _TIMESTAMP_RAW_HARDWARE)
            self._attach(program)
            self._make_ring(retire_ms)
            self._bind()
        except GketraceError:
            self._socket.close()
            raise
        self.received = self.dropped = self.freezes = 0

    def _set(self, option: int, value: int | bytes) -> None:
        try:
            self._socket.setsockopt(_SOL_PACKET, option, value)
        except OSError as error:
            raise UnsupportedError(
                f"this kernel refuses packet option {option}: {error.strerror}"
            ) from None

    def _attach(self, program: Program) -> None:
        code = ctypes.create_string_buffer(program.code, len(program.code))
        fprog = struct.pack("@HP", program.instructions, ctypes.addressof(code))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
        except OSError as error:
            hint = ""
            if error.errno in (errno.ENOMEM, errno.EINVAL):
                hint = "it may be too long: see net.core.optmem_max; the kernel takes 4096 at most"
            raise ExhaustedError(
                f"the kernel refuses a filter of {program.instructions} instructions: "
                f"{error.strerror}",
                hint=hint,
            ) from None

    def _make_ring(self, retire_ms: int) -> None:
        frames = self.size // _FRAME_SIZE
        asked = struct.pack("=7I", BLOCK_SIZE, self._count, _FRAME_SIZE, frames, retire_ms, 0, 0)
        try:
            self._socket.setsockopt(_SOL_PACKET, _PACKET_RX_RING, asked)
            self._map = mmap.mmap(self._socket.fileno(), self.size, mmap.MAP_SHARED)
        except OSError as error:
            raise ExhaustedError(
                f"the kernel gives no ring of {self.size >> 20} MiB: {error.strerror}"
            ) from None
        self._view = memoryview(self._map)

    def _bind(self) -> None:
        address = struct.pack(
            "=HHiHBB8s", ring.AF_PACKET, socket.htons(_ETH_P_ALL), self.interface.ifindex, 0, 0, 0,
            b"",
        )  # fmt: skip
        if _libc.bind(self._socket.fileno(), address, len(address)) != 0:
            number = ctypes.get_errno()
            self._unmap()
            raise UnavailableError(
                f"cannot capture on {self.interface.name}: {os.strerror(number)}"
            )

    def fileno(self) -> int:
        """Of the socket; poll(2) it for input: a block is ours, or the interface has changed."""
        return self._socket.fileno()

    @property
    def blocks(self) -> int:
        """That it has."""
        return self._count

    def ready(self, most: int) -> int:
        """How many blocks are ours now; it stops to look at `most`."""
        count = 0
        while count < min(most, self._count):
            offset = (self._at + count) % self._count * BLOCK_SIZE
            if not _NEXT.unpack_from(self._view, offset + _BLOCK_STATUS)[0] & _USER:
                break
            count += 1
        return count

    def take(self, *, blocks: int, packets: int, size: int) -> Blocks:
        """At most so many of what is ours now: whole blocks, and of the last one so many packets
        that neither `packets` nor `size` bytes are exceeded; then `cut` is set.  Call `give_back`
        after it.

        A block's status is read before its packets, which Python cannot tell the processor; there
        are some hundred instructions in between, more than any holds back.
        """
        parts: list[memoryview] = []
        counts: list[int] = []
        while len(parts) < blocks and packets > 0 and size > 0:
            place = self._at * BLOCK_SIZE
            status, count, first, length = _BLOCK.unpack_from(self._view, place + _BLOCK_STATUS)
            if not status & _USER:
                break
            self._held.append(self._at)
            self._at = (self._at + 1) % self._count
            if not count:
                continue
            part = self._view[place + first : place + length]
            if count > packets or len(part) > size:
                wanted = min(count, packets)
                count, end = _fit(part, wanted, size)
                part = part[:end]
                # What is left of the block is not wanted.
                self.cut = True
                packets = count
            packets -= count
            size -= len(part)
            if count:
                parts.append(part)
                self._lent.append(part)
                counts.append(count)
        return Blocks(tuple(parts), tuple(counts))

    def give_back(self) -> None:
        """Lets the kernel fill again what `take` handed out; its parts are no longer valid."""
        for part in self._lent:
            part.release()
        self._lent.clear()
        for block in self._held:
            _NEXT.pack_into(self._map, block * BLOCK_SIZE + _BLOCK_STATUS, 0)
        self._held.clear()

    def shut(self) -> None:
        """Lets nothing more in.  What came before is handed over when its time is up."""
        self._attach(Program(_NOTHING))

    def count(self) -> None:
        """Adds the kernel's counts since the last time to `received`, `dropped`, `freezes`."""
        raw = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12)
        received, dropped, freezes = struct.unpack("=3I", raw)
        self.received += received
        self.dropped += dropped
        self.freezes += freezes

    def is_gone(self) -> bool:
        """Whether the interface is not in the ring's namespace any more; to be asked after an
        error, which it clears."""
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not self.interface.ifindex:
            return False
        request = struct.pack("=16si20x", b"", self.interface.ifindex)
        try:
            fcntl.ioctl(self._socket, _SIOCGIFNAME, request)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENXIO):
                return True
            raise UnavailableError(
                f"cannot read interface {self.interface.name}: {error.strerror}"
            ) from None
        return False

    def close(self) -> None:
        """Lets go of the ring and the namespace.  May be called twice."""
        self._unmap()
        self._socket.close()

    def _unmap(self) -> None:
        for part in self._lent:
            part.release()
        self._lent.clear()
        self._view.release()
        self._map.close()


def _fit(part: memoryview, packets: int, size: int) -> tuple[int, int]:
    """How many packets of a block fit, and where they end."""
    count = end = 0
    while count < packets:
        step = _NEXT.unpack_from(part, end + ring.NEXT)[0] or len(part) - end
        if end + step > size:
            break
        end += step
        count += 1
    return count, end
