"""Filters in libpcap's language, compiled by libpcap for one interface.

What libpcap takes for a filter grows with the cube of its size, and nothing ends it: two hundred
ranges of ports are 4 KB, and take half a minute.  Nor does anything end its wait for a name server,
where a host is named.  So a long filter, and one that may have names in it, is compiled by a
program of its own, ``python -m gketrace_agent.kernel.libpcap INTERFACE SNAP ARPHRD FILTER``, which
prints what pcap_compile() makes, and which can be ended.

Source: pcap-filter(7), pcap_compile(3PCAP); libpcap pcap-linux.c fix_program(), fix_offset().
"""

from __future__ import annotations

import ctypes
import resource
import struct
import sys
from dataclasses import dataclass
from typing import Any, Final

from gketrace.capture.filter_names import names_in
from gketrace.capture.packets import LinkType
from gketrace.errors import (
    ForbiddenError,
    GketraceError,
    NotFoundError,
    TimeoutExceeded,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from gketrace_agent.kernel.process import run

__all__ = ["FilterCompiler", "Program"]

_LIBRARIES: Final = ("libpcap.so.0.8", "libpcap.so.1")
"""Debian's name, and everybody else's."""
_ERROR_SIZE: Final = 256
"""PCAP_ERRBUF_SIZE."""
_BUFFER: Final = 64 << 10
_NETMASK_UNKNOWN: Final = 0xFFFFFFFF
_NO_SUCH_DEVICE: Final = -5
_PERMISSION_DENIED: Final = (-8, -11)
"""PCAP_ERROR_PERM_DENIED, PCAP_ERROR_PROMISC_PERM_DENIED."""
_NOT_UP: Final = -9
_LONGEST: Final = 32 << 10
"""Characters of a filter."""
_SHORT: Final = 768
"""Characters up to which the worst of filters takes less than a second: no process for that."""
_SECONDS: Final = 10.0
"""For a longer one, and for one with names."""
_MEMORY: Final = 512 << 20
"""Bytes of address space for it."""
_REFUSED: Final = 2
"""Exit status of the program: libpcap does not take the filter."""
_INSTRUCTION: Final = struct.Struct("=HBBI")
ANY: Final = "any"

# Classic BPF, include/uapi/linux/bpf_common.h and filter.h.
_CLASS: Final = 0x07
_LOADS: Final = (0x00, 0x01)
_MODE: Final = 0xE0
_RETURN: Final = 0x06
"""BPF_RET | BPF_K."""
_JUMP: Final = 0x05
"""BPF_JMP | BPF_JA: by the operand from the next instruction."""
_ABSOLUTE: Final = 0x20
_INDIRECT: Final = 0x40
_AUXILIARY: Final = 0x100000000 - 0x1000
"""SKF_AD_OFF."""
_AUXILIARY_OFFSETS: Final = {0: _AUXILIARY + 0, 4: _AUXILIARY + 8, 10: _AUXILIARY + 4}
"""Where fields of the cooked header v2 (protocol, interface, packet type) are in the kernel."""
_COOKED_LENGTH: Final = 20

# ARPHRD values whose packets libpcap takes without a link header, include/uapi/linux/if_arp.h.
_ETHERNET: Final = frozenset({1, 772})


class _BpfProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))


@dataclass(frozen=True, slots=True)
class Program:
    """Classic BPF for one interface."""

    code: bytes
    """struct sock_filter each; empty: no filter."""

    @property
    def instructions(self) -> int:
        return len(self.code) // _INSTRUCTION.size


def _load() -> Any:
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.pcap_create.restype = ctypes.c_void_p
        library.pcap_open_dead.restype = ctypes.c_void_p
        library.pcap_geterr.restype = ctypes.c_char_p
        for function in (
            library.pcap_geterr,
            library.pcap_activate,
            library.pcap_datalink,
            library.pcap_close,
        ):
            function.argtypes = (ctypes.c_void_p,)
        for function in (
            library.pcap_set_snaplen,
            library.pcap_set_buffer_size,
            library.pcap_set_promisc,
            library.pcap_set_datalink,
        ):
            function.argtypes = (ctypes.c_void_p, ctypes.c_int)
        library.pcap_compile.argtypes = (
            ctypes.c_void_p,
            ctypes.POINTER(_BpfProgram),
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint32,
        )
        return library
    raise UnsupportedError(
        "captures need libpcap, which is not installed on the node", hint="package libpcap0.8"
    )


class FilterCompiler:
    """Compiles for one interface of the calling thread's network namespace.

    libpcap opens the interface for it, as tcpdump does, so that the program fits what the kernel
    of this interface does: its link type, and VLAN tags that are not in the packet's bytes.
    """

    def __init__(self, interface: str, snap_length: int, *, hatype: int = 1) -> None:
        """`hatype` is the interface's ARPHRD value, for one that is down, which libpcap does not
        open.

        Raises `NotFoundError`, `ForbiddenError`, `UnavailableError`, `UnsupportedError`.
        """
        self._library = _load()
        self._argv = (interface, str(snap_length), str(hatype))
        self.snap_length: Final = snap_length
        self._handle = self._open(interface, hatype)
        link_type = int(self._library.pcap_datalink(self._handle))
        self.cooked = interface == ANY or link_type == LinkType.LINUX_SLL
        if link_type in (12, 14):  # DLT_RAW has two numbers in memory and one in files
            link_type = LinkType.RAW
        if self.cooked:
            link_type = LinkType.LINUX_SLL2
            if self._library.pcap_set_datalink(self._handle, link_type) != 0:
                self.close()
                self._handle = self._library.pcap_open_dead(link_type, snap_length)
        self.link_type: Final = int(link_type)
        """LINKTYPE_ value."""

    def _open(self, interface: str, hatype: int) -> int:
        library = self._library
        message = ctypes.create_string_buffer(_ERROR_SIZE)
        handle = library.pcap_create(interface.encode(), message)
        if not handle:
            raise UnavailableError(f"libpcap: {message.value.decode(errors='replace')}")
        library.pcap_set_snaplen(handle, self.snap_length)
        library.pcap_set_promisc(handle, 0)
        library.pcap_set_buffer_size(handle, _BUFFER)
        status = library.pcap_activate(handle)
        if status >= 0:
            return int(handle)
        why = library.pcap_geterr(handle).decode(errors="replace")
        library.pcap_close(handle)
        if status == _NOT_UP:
            link_type = LinkType.ETHERNET if hatype in _ETHERNET else LinkType.LINUX_SLL
            return int(library.pcap_open_dead(int(link_type), self.snap_length))
        if status == _NO_SUCH_DEVICE:
            raise NotFoundError(f"there is no interface {interface} there")
        if status in _PERMISSION_DENIED:
            raise ForbiddenError(
                f"may not capture on {interface}: {why}", hint="the agent needs NET_RAW"
            )
        raise UnavailableError(f"cannot capture on {interface}: {why or status}")

    def compile(self, text: str, first: str = "") -> Program:
        """For packets that both take; `first`: a filter of our own, which is looked at before.

        Two programs are made one, not two texts: what somebody asked for cannot end a parenthesis
        of ours, and its names and operators are read as if it stood alone.

        Raises `UsageError` with libpcap's message for what it does not take.
        """
        before = self._code(first) if first else b""
        if first and not text:
            return Program(before)
        return Program(_chained(before, self._code(text)))

    def _code(self, text: str) -> bytes:
        if len(text) > _LONGEST:
            raise UsageError(f"the filter is longer than {_LONGEST} characters")
        if "\0" in text:
            raise UsageError("the filter has a NUL character in it")
        apart = len(text) > _SHORT or names_in(text)
        code = self._compile_apart(text) if apart else self.instructions(text)
        return self._for_cooked(code, text) if self.cooked else code

    def instructions(self, text: str) -> bytes:
        """What pcap_compile() makes of it.  Raises `UsageError`."""
        made = _BpfProgram()
        library = self._library
        if library.pcap_compile(
            self._handle, ctypes.byref(made), text.encode(), 1, _NETMASK_UNKNOWN
        ):
            why = library.pcap_geterr(self._handle).decode(errors="replace")
            raise UsageError(f"filter {text!r}: {why}")
        try:
            return ctypes.string_at(made.instructions, made.length * _INSTRUCTION.size)
        finally:
            library.pcap_freecode(ctypes.byref(made))

    def _compile_apart(self, text: str) -> bytes:
        argv = (sys.executable, "-I", "-m", __name__, *self._argv, "--", text)
        try:
            done = run(argv, timeout=_SECONDS, limit=_MEMORY)
        except TimeoutExceeded:
            if len(text) <= _SHORT:
                raise UsageError(
                    f"filter {text!r}: {' and '.join(names_in(text))} could not be looked up in "
                    f"{_SECONDS:g} s",
                    hint="name addresses and ports by their numbers",
                ) from None
            raise UsageError(
                f"the filter of {len(text)} characters is too large: libpcap has not compiled it "
                f"in {_SECONDS:g} s",
                hint="name fewer addresses and ports, or ranges of them",
            ) from None
        if done.returncode == _REFUSED:
            raise UsageError(done.stderr)
        if not done.ok:
            raise UnavailableError(f"libpcap: {done.failure()}")
        return done.stdout

    def _for_cooked(self, code: bytes, text: str) -> bytes:
        """Offsets into a cooked header, which the kernel's packet does not have, as offsets into
        what it has."""
        fixed: list[bytes] = []
        for operation, jump_true, jump_false, operand in _INSTRUCTION.iter_unpack(code):
            kind, mode = operation & _CLASS, operation & _MODE
            loads = kind in _LOADS and mode in (_ABSOLUTE, _INDIRECT)
            if loads or (kind == 1 and mode == 0xA0):  # BPF_MSH: ldx 4*([k]&0xf)
                operand = self._moved(operand, text)
            fixed.append(_INSTRUCTION.pack(operation, jump_true, jump_false, operand))
        return b"".join(fixed)

    def _moved(self, offset: int, text: str) -> int:
        if offset >= _AUXILIARY:
            return offset
        if offset >= _COOKED_LENGTH:
            return offset - _COOKED_LENGTH
        if offset in _AUXILIARY_OFFSETS:
            return _AUXILIARY_OFFSETS[offset]
        raise UsageError(
            f"filter {text!r}: it reads link addresses, which a capture on all interfaces or on "
            "this one does not have for the kernel",
            hint="name an interface",
        )

    def close(self) -> None:
        """May be called twice."""
        handle, self._handle = self._handle, 0
        if handle:
            self._library.pcap_close(handle)

    def __enter__(self) -> FilterCompiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _chained(first: bytes, then: bytes) -> bytes:
    """A program for packets that both take: where `first` takes one, it goes on with `then`, which
    libpcap made without a word of what registers held before."""
    count = len(first) // _INSTRUCTION.size
    made = []
    for index, (operation, jump_true, jump_false, operand) in enumerate(
        _INSTRUCTION.iter_unpack(first)
    ):
        if operation == _RETURN and operand:
            operation, operand = _JUMP, count - index - 1
        made.append(_INSTRUCTION.pack(operation, jump_true, jump_false, operand))
    return b"".join((*made, then))


def main(arguments: list[str]) -> int:
    """Prints a filter's instructions.  `_REFUSED`, and the message on stderr, for a bad one."""
    interface, snap, hatype, _, text = arguments
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    try:
        with FilterCompiler(interface, int(snap), hatype=int(hatype)) as compiler:
            code = compiler.instructions(text)
    except UsageError as error:
        sys.stderr.write(error.message)
        return _REFUSED
    except GketraceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
