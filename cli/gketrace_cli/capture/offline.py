"""Filters over packets that were read from a file: libpcap's own, where it is installed.

Nothing ends libpcap's work on a long filter, nor its wait for a name server, not even Ctrl-C.  So
these are compiled by a program of their own, ``python -m gketrace_cli.capture.offline LINKTYPE
FILTER``, which prints what pcap_compile() makes.

Source: pcap_offline_filter(3PCAP).
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any, Final

from gketrace.capture.filter_names import names_in
from gketrace.capture.packets import CapturedPacket
from gketrace.errors import UnsupportedError, UsageError

__all__ = ["OfflineFilter"]

_LIBRARIES: Final = ("libpcap.so.0.8", "libpcap.so.1", "libpcap.dylib")
_SNAP: Final = 262_144
_NETMASK_UNKNOWN: Final = 0xFFFFFFFF
_SHORT: Final = 768
"""Characters up to which the worst of filters takes less than a second: no process for that."""
_SECONDS: Final = 10.0
"""For a longer one, and for one with names."""
_INSTRUCTION: Final = 8
"""Bytes of a struct bpf_insn."""
_REFUSED: Final = 2
"""Exit status of the program: libpcap does not take the filter."""


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
        library.pcap_close.argtypes = (ctypes.c_void_p,)
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
    """For packets of one link type."""

    def __init__(self, link_type: int, text: str) -> None:
        """Raises `UsageError` with libpcap's message, `UnsupportedError`."""
        self._library = _load()
        apart = len(text) > _SHORT or names_in(text)
        code = (_compile_apart if apart else _compile)(link_type, text)
        self._code = ctypes.create_string_buffer(code, len(code))
        self._program = _Program(len(code) // _INSTRUCTION, ctypes.addressof(self._code))

    def matches(self, packet: CapturedPacket) -> bool:
        header = _Header(0, 0, len(packet.data), packet.original_length)
        found = self._library.pcap_offline_filter(
            ctypes.byref(self._program), ctypes.byref(header), packet.data
        )
        return bool(found)


def _compile(link_type: int, text: str) -> bytes:
    """What pcap_compile() makes of it.  Raises `UsageError`, `UnsupportedError`."""
    library = _load()
    handle = library.pcap_open_dead(link_type, _SNAP)
    made = _Program()
    try:
        if library.pcap_compile(handle, ctypes.byref(made), text.encode(), 1, _NETMASK_UNKNOWN):
            why = library.pcap_geterr(handle).decode(errors="replace")
            raise UsageError(f"filter {text!r}: {why}")
        code = ctypes.string_at(made.instructions, made.length * _INSTRUCTION)
        library.pcap_freecode(ctypes.byref(made))
        return code
    finally:
        library.pcap_close(handle)


def _compile_apart(link_type: int, text: str) -> bytes:
    # -P: what is in the current directory is not taken for ours.
    argv = [sys.executable, "-P", "-m", __name__, str(link_type), text]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        named = names_in(text)
        why = "it is too large: libpcap has not compiled it"
        if named and len(text) <= _SHORT:
            why = f"{' and '.join(named)} could not be looked up"
        raise UsageError(
            f"filter {text!r:.200}: {why} in {_SECONDS:g} s",
            hint="name fewer addresses and ports, and by their numbers",
        ) from None
    said = done.stderr.decode(errors="replace")
    if done.returncode == _REFUSED:
        raise UsageError(said)
    if done.returncode:
        lines = said.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UnsupportedError(f"the filter could not be compiled here: {lines[-1]}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Prints a filter's instructions.  `_REFUSED`, and the message on stderr, for a bad one."""
    link_type, text = arguments
    try:
        code = _compile(int(link_type), text)
    except UsageError as error:
        sys.stderr.write(error.message)
        return _REFUSED
    sys.stdout.buffer.write(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
