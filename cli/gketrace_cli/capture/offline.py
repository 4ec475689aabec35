"""Filters over packets that were read from a file: libpcap's own, where it is installed.

Source: pcap_offline_filter(3PCAP).
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from gketrace.capture.packets import CapturedPacket
from gketrace.errors import UnsupportedError, UsageError

__all__ = ["OfflineFilter"]

_LIBRARIES: Final = ("libpcap.so.0.8", "libpcap.so.1", "libpcap.dylib")
_SNAP: Final = 262_144
_NETMASK_UNKNOWN: Final = 0xFFFFFFFF


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))


class _Header(ctypes.Structure):
    """struct pcap_pkthdr; the time is not looked at."""

    _fields_ = (
        ("seconds", ctypes.c_long),
        ("part", ctypes.c_long),
        ("caplen", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
    )


def _load() -> Any:
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.pcap_open_dead.restype = ctypes.c_void_p
        library.pcap_geterr.restype = ctypes.c_char_p
        library.pcap_geterr.argtypes = (ctypes.c_void_p,)
        library.pcap_compile.argtypes = (
            ctypes.c_void_p,
            ctypes.POINTER(_Program),
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint32,
        )
        return library
    raise UnsupportedError(
        "a filter with -r needs libpcap, which is not installed here",
        hint="leave the filter out, or install libpcap",
    )


class OfflineFilter:
    """For packets of one link type.  Lives as long as the program."""

    def __init__(self, link_type: int, text: str) -> None:
        """Raises `UsageError` with libpcap's message, `UnsupportedError`."""
        self._library = _load()
        handle = self._library.pcap_open_dead(link_type, _SNAP)
        self._program = _Program()
        if self._library.pcap_compile(
            handle, ctypes.byref(self._program), text.encode(), 1, _NETMASK_UNKNOWN
        ):
            why = self._library.pcap_geterr(handle).decode(errors="replace")
            raise UsageError(f"filter {text!r}: {why}")

    def matches(self, packet: CapturedPacket) -> bool:
        header = _Header(0, 0, len(packet.data), packet.original_length)
        found = self._library.pcap_offline_filter(
            ctypes.byref(self._program), ctypes.byref(header), packet.data
        )
        return bool(found)
