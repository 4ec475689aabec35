"""Kinds of addresses, as numbers: include/linux/in.h and __ipv6_addr_type."""

from __future__ import annotations

from typing import Final

__all__ = [
    "is_broadcast",
    "is_link_local6",
    "is_local_multicast",
    "is_loopback",
    "is_multicast",
    "is_multicast6",
    "is_zeronet",
]

LOOPBACK6: Final = 1


def is_multicast(address: int) -> bool:
    return address >> 28 == 0xE


def is_local_multicast(address: int) -> bool:
    return address >> 8 == 0xE00000


def is_broadcast(address: int) -> bool:
    return address == 0xFFFFFFFF


def is_zeronet(address: int) -> bool:
    """0.0.0.0 alone since Linux 5.3, no longer all of 0.0.0.0/8 (ipv4_is_zeronet)."""
    return address == 0


def is_loopback(address: int) -> bool:
    return address >> 24 == 127


def is_multicast6(address: int) -> bool:
    return address >> 120 == 0xFF


def is_link_local6(address: int) -> bool:
    return address >> 118 == 0xFE80 >> 6
