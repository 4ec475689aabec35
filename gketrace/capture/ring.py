"""How packets lie in the kernel's blocks (TPACKET_V3), and so in CapturePackets.data.

The agent sends blocks as they are, without their block descriptors: packet after packet, each at a
multiple of 8 bytes, little endian::

     0  tp_next_offset  u32  to the next packet of the block; 0: the last one
     4  tp_sec          u32  time, seconds since the epoch
     8  tp_nsec         u32
    12  tp_snaplen      u32  bytes from tp_mac on
    16  tp_len          u32  bytes that it had
    20  tp_status       u32  `Status`
    24  tp_mac          u16  where the data begins
    26  tp_net          u16  where the network header begins
    28  tp_rxhash       u32
    32  tp_vlan_tci     u32  what the VLAN tag held, with `Status.VLAN_VALID`
    36  tp_vlan_tpid    u16  its EtherType, with `Status.VLAN_TPID_VALID`
    48  sll_family      u16  17, AF_PACKET
    50  sll_protocol    u16  EtherType, big endian
    52  sll_ifindex     i32
    56  sll_hatype      u16  ARPHRD_
    58  sll_pkttype     u8   `PacketType`
    59  sll_halen       u8
    60  sll_addr        8 bytes

A cooked tap (LINKTYPE_LINUX_SLL2) has no link header in the data: it is made of the sockaddr_ll.

Source: include/uapi/linux/if_packet.h; net/packet/af_packet.c tpacket_rcv(),
prb_close_block().
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

__all__ = [
    "ADDRESS",
    "AF_PACKET",
    "ALIGNMENT",
    "COOKED_LENGTH",
    "HALEN",
    "HATYPE",
    "HEADER_LENGTH",
    "IFINDEX",
    "LENGTH",
    "MAC",
    "NET",
    "NEXT",
    "NSEC",
    "PKTTYPE",
    "PROTOCOL",
    "SEC",
    "SLL",
    "SNAPLEN",
    "STATUS",
    "VLAN_TCI",
    "VLAN_TPID",
    "PacketType",
    "Status",
]

NEXT: Final = 0
SEC: Final = 4
NSEC: Final = 8
SNAPLEN: Final = 12
LENGTH: Final = 16
STATUS: Final = 20
MAC: Final = 24
NET: Final = 26
VLAN_TCI: Final = 32
VLAN_TPID: Final = 36
SLL: Final = 48
PROTOCOL: Final = 50
IFINDEX: Final = 52
HATYPE: Final = 56
PKTTYPE: Final = 58
HALEN: Final = 59
ADDRESS: Final = 60
HEADER_LENGTH: Final = 68
"""TPACKET3_HDRLEN: no packet's data begins before."""
ALIGNMENT: Final = 8
"""V3_ALIGNMENT."""
AF_PACKET: Final = 17
COOKED_LENGTH: Final = 20
"""Of a header of LINKTYPE_LINUX_SLL2."""


class Status(IntFlag):
    """TP_STATUS_ bits of a packet."""

    CHECKSUM_NOT_READY = 1 << 3
    VLAN_VALID = 1 << 4
    VLAN_TPID_VALID = 1 << 6
    CHECKSUM_VALID = 1 << 7
    GSO_TCP = 1 << 8
    HARDWARE_TIME = 1 << 31


class PacketType(IntEnum):
    """PACKET_ values of sll_pkttype."""

    HOST = 0
    BROADCAST = 1
    MULTICAST = 2
    OTHERHOST = 3
    OUTGOING = 4
