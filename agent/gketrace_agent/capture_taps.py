"""One tap of a capture: where it is, what it leaves out, its ring, and its packets as messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from gketrace_agent.capture_counts import CAPTURES
from gketrace_agent.kernel.libpcap import ANY, FilterCompiler
from gketrace_agent.kernel.packet_ring import Blocks, PacketRing, find_interface, interface_names
from gketrace_agent.observe.snapshot import Namespace
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import capture_pb2 as pb

__all__ = ["CapturePlace", "Exclusion", "OpenTap", "encode_packets", "exclusions", "open_tap"]

Exclusion: TypeAlias = tuple[str, str]
"""(filter of what is left out, why)."""

_FULL: Final = 4
"""Part of a ring, from which on blocks are no longer gathered."""
_METADATA: Final = "host 169.254.169.254 or host fd20:ce::254"
_KUBELET: Final = 10250
_KONNECTIVITY: Final = 8132


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlace:
    """Where one tap is."""

    request: pb.CaptureTap
    namespace: Namespace
    excluded: tuple[Exclusion, ...]


@dataclass(slots=True, kw_only=True)
class OpenTap:
    """An open tap."""

    index: int
    place: CapturePlace
    ring: PacketRing
    granted: int
    """Bytes of the ring, of the agent's share."""
    started: pb.CaptureTapStarted
    packets: int = 0
    bytes: int = 0
    waiting: int = 0
    """Dropped while the client held up."""
    reason: pb.CaptureEndReason.ValueType = pb.CAPTURE_END_REASON_UNSPECIFIED
    """Why it ends."""
    text: str = ""
    until: float = 0.0
    """It ends when what is in the ring has been handed over, at this time."""
    drained: bool = False
    """What is still in the ring is not wanted."""
    over: bool = False

    def count(self) -> int:
        """Brings the kernel's numbers up to date; returns what was dropped since the last time."""
        before = self.ring.dropped
        self.ring.count()
        dropped = self.ring.dropped - before
        CAPTURES.add(dropped=dropped)
        return dropped

    def statistics(self) -> pb.CaptureTapStatistics:
        if not self.over:
            self.count()
        return pb.CaptureTapStatistics(
            received=self.ring.received,
            dropped=self.ring.dropped,
            dropped_waiting=self.waiting,
            freezes=self.ring.freezes,
            packets=self.packets,
            bytes=self.bytes,
        )

    def fullness(self) -> float:
        """From 1 on it is time to read, whatever else is waited for."""
        enough = max(self.ring.blocks // _FULL, 1)
        return self.ring.ready(enough) / enough


def exclusions(*, host: bool, ports: Sequence[int], forwarded: bool) -> tuple[Exclusion, ...]:
    """What a tap leaves out unless it is asked not to.

    `host`: it is in the node's own namespace; `ports`: the agent's; `forwarded`: the client comes
    through the API server, so that what is captured passes the kubelet's port again.
    """
    found: list[Exclusion] = []
    if host:
        found += [(f"tcp port {port}", "the agents' own traffic") for port in ports]
        if forwarded:
            why = "by it the API server forwards this capture"
            found.append((f"tcp port {_KUBELET}", f"the kubelet: {why}"))
            found.append((f"tcp port {_KONNECTIVITY}", f"konnectivity: {why}"))
    found.append((_METADATA, "the metadata server"))
    return tuple(found)


def open_tap(
    place: CapturePlace,
    *,
    index: int,
    snap: int,
    ring_bytes: int,
    retire_ms: int,
    hardware_timestamps: bool,
) -> OpenTap:
    """To be called in the place's namespace, which may be left then.

    Raises `UsageError` for filters that libpcap does not take, `NotFoundError`, `ExhaustedError`,
    `ForbiddenError`, `UnavailableError`, `UnsupportedError`.
    """
    asked = place.request
    interface = find_interface(asked.interface)
    with FilterCompiler(interface.name, snap, hatype=interface.hatype) as compiler:
        own, typed = _own_filter(place, loopback=interface.loopback), asked.filter.strip()
        program = compiler.compile(typed, own)
        cooked, link_type = compiler.cooked, compiler.link_type
    ring = PacketRing(
        interface,
        program,
        cooked=cooked,
        ring_bytes=ring_bytes,
        retire_ms=retire_ms,
        ignore_outgoing=asked.direction == pb.CAPTURE_DIRECTION_IN,
        hardware_timestamps=hardware_timestamps,
    )
    return OpenTap(
        index=index,
        place=place,
        ring=ring,
        granted=ring_bytes,
        started=pb.CaptureTapStarted(
            interface=interface.name,
            ifindex=interface.ifindex,
            link_type=link_type,
            netns=codec.encode(place.namespace.ref),
            mtu=interface.mtu,
            hardware=interface.hardware,
            snap_length=snap,
            ring_bytes=ring.size,
            instructions=program.instructions,
            filter=f"{own} and ({typed})" if own and typed else own or typed,
            excluded=[pb.CaptureExclusion(filter=what, reason=why) for what, why in place.excluded],
            hardware_timestamps=hardware_timestamps,
            interfaces={} if interface.ifindex else interface_names(),
        ),
    )


def _own_filter(place: CapturePlace, *, loopback: bool) -> str:
    """What is left out whatever was asked for; empty: nothing."""
    asked = place.request
    parts: list[str] = []
    if place.excluded:
        parts.append(f"not ({' or '.join(what for what, _ in place.excluded)})")
    if asked.direction == pb.CAPTURE_DIRECTION_OUT:
        parts.append("outbound")
    elif loopback:
        # Packets pass it twice, out and in again.
        parts.append("inbound")
    elif asked.interface == ANY:
        parts.append("not (outbound and ifindex 1)")
    return " and ".join(parts)


def encode_packets(tap: int, blocks: Blocks) -> bytes:
    """A CaptureReply with CapturePackets, as protobuf would write it.

    By hand, because that copies the packets once where protobuf copies them three times.
    """
    lengths = [len(part) for part in blocks.parts]
    head = pb.CapturePackets(tap=tap, counts=blocks.counts, lengths=lengths).SerializeToString()
    data = b"\x22" + _varint(sum(lengths))  # field 4, with a length
    whole = len(head) + len(data) + sum(lengths)
    return b"".join((b"\x12", _varint(whole), head, data, *blocks.parts))  # field 2 of the reply


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
