"""A tap, and a packet that passed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag

from gketrace.trace import NetnsRef

__all__ = ["CapturedPacket", "Direction", "LinkType", "PacketFlag", "Tap"]


class LinkType(IntEnum):
    """LINKTYPE_ values of the taps that are made here; others may be read from files."""

    ETHERNET = 1
    """A MAC header; loopback interfaces have one too, of zeros."""
    RAW = 101
    """Begins with the IPv4 or IPv6 header."""
    LINUX_SLL = 113
    """Linux cooked header, 16 bytes: packet type (2), ARPHRD type (2), address length (2), address
    (8), protocol (2)."""
    LINUX_SLL2 = 276
    """Linux cooked header v2, 20 bytes: protocol (2), reserved (2), interface index (4), ARPHRD
    type (2), packet type (1), address length (1), address (8)."""


class Direction(Enum):
    """Which way a packet passed the interface, as its own namespace sees it."""

    IN = "in"
    OUT = "out"
    UNKNOWN = "unknown"
    """The file does not say."""


class PacketFlag(IntFlag):
    """What the kernel says about a packet beside its bytes."""

    NONE = 0
    CHECKSUM_NOT_READY = 1
    """It never left this machine, or leaves it after this tap: the checksum is filled in later, by
    hardware or never (TP_STATUS_CSUMNOTREADY)."""
    CHECKSUM_VALID = 2
    """The kernel or the device has checked the checksum (TP_STATUS_CSUM_VALID)."""
    MERGED = 4
    """Several segments merged by GRO, or one that is not yet cut by GSO: the kernel says so
    (TP_STATUS_GSO_TCP, Linux 6.0), or it is larger than the interface's MTU."""
    HARDWARE_TIME = 8
    """The device made the timestamp, by its own clock."""
    NOT_FOR_US = 16
    """Received for another host's link address (PACKET_OTHERHOST), in promiscuous mode."""
    BROADCAST = 32
    MULTICAST = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """One interface of one namespace of one node, with the filter that was set there."""

    node: str
    """Empty: read from a file that does not say."""
    netns: NetnsRef
    interface: str
    """``any`` for all of the namespace's."""
    link_type: int
    """`LinkType` or another LINKTYPE_ value."""
    ifindex: int = 0
    """0: any, or not known."""
    mtu: int = 0
    """0: not known."""
    hardware: str = ""
    """Link address as text; empty: none or not known."""
    snap_length: int = 0
    """Bytes kept of each packet; 0: all."""
    filter: str = ""
    """As compiled, with what the agent excluded."""
    excluded: tuple[tuple[str, str], ...] = ()
    """(filter of what the agent left out, why)."""
    index: int = 0
    """Of the agent's taps, or the file's interfaces."""
    description: str = field(default="", compare=False)
    """The user's or plan's words, e.g. ``hop 2: cbr0``; if_description in files."""
    interfaces: Mapping[int, str] = field(default_factory=dict, compare=False)
    """Of ``any``: names by index, as they were when it was opened."""

    @property
    def pod(self) -> str:
        """``namespace/name``; empty: the host's namespace."""
        return self.netns.pod

    def __str__(self) -> str:
        where = f"{self.node} " if self.node else ""
        return f"{where}{self.netns} {self.interface}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedPacket:
    """One packet at one tap."""

    tap: Tap
    time_ns: int
    """Nanoseconds since the epoch, by the node's clock (corrected where a merge says so)."""
    data: bytes
    """From the link header of `tap.link_type` on, at most the tap's snap length; a VLAN tag that
    the kernel had taken off is put back."""
    original_length: int
    """Bytes that it had, VLAN tag and link header among them."""
    direction: Direction = Direction.UNKNOWN
    vlan: int | None = None
    """Tag control information that was put back; None: the kernel had not taken a tag off."""
    flags: PacketFlag = PacketFlag.NONE
    ifindex: int = 0
    """The interface, where the tap is ``any``; 0: not known."""
    comment: str = ""
    """opt_comment, read from a file or to be written."""

    @property
    def time(self) -> float:
        """Seconds since the epoch, to the microsecond; for showing, not for comparing."""
        return self.time_ns / 1e9
