"""Which conntrack events a socket is given: filters as classic BPF, so that the others cost only
the kernel.

Source: kernel net/core/filter.c; include/uapi/linux/bpf_common.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Final

from gketrace.packet import Protocol
from gketrace_agent.kernel.conntrack_request import KernelFilter

__all__ = ["events_program"]

_LOAD_WORD: Final = 0x20
_LOAD_HALF: Final = 0x28
_LOAD_BYTE: Final = 0x30
_JUMP_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_ACCEPT: Final = 0xFFFFFFFF
_AT_MOST: Final = 4096
"""BPF_MAXINSNS."""
_PORTS: Final = frozenset({Protocol.TCP, Protocol.UDP, Protocol.SCTP})
_FAMILY_AT: Final = 16
"""struct nfgenmsg, behind struct nlmsghdr."""
_ORIG_AT: Final = 20
"""CTA_TUPLE_ORIG, which comes first; CTA_TUPLE_REPLY follows it."""


def events_program(filters: Sequence[KernelFilter]) -> bytes:
    """Lets an event through unless surely none of `filters` takes it; empty: no program.

    Where the attributes are not at their usual places (zones, protocols without ports) it lets the
    event through, and `ConntrackFilters` decides.
    """
    if not filters or any(not wanted.family for wanted in filters):
        return b""
    code = b"".join(map(_block, filters)) + _pack(_RETURN, 0, 0, 0)
    return code if len(code) // 8 <= _AT_MOST else b""


def _block(wanted: KernelFilter) -> bytes:
    """Returns for what one filter takes, and runs past its end for what it does not."""
    family = socket.AF_INET if wanted.family == 4 else socket.AF_INET6
    checks: list[tuple[int, int, int, bool]] = [(_LOAD_BYTE, _FAMILY_AT, family, False)]
    """Load instruction, offset, value, and whether another value says nothing."""
    size = 4 if wanted.family == 4 else 16
    first = 1 if wanted.family == 4 else 3
    length = 2 * (size + 4) + 4 + 4 + 4 + 8 + 8 + 8
    halves = ((wanted.orig, _ORIG_AT, 1), (wanted.reply, _ORIG_AT + length, 2))
    for half, start, number in halves:
        given = any(one is not None for one in (half.src, half.dst, half.sport, half.dport))
        if number == 2 and not given:
            continue
        source = start + 12
        destination = source + size + 4
        protocol = destination + size + 8
        for address, offset, kind in (
            (half.src, source, first),
            (half.dst, destination, first + 1),
        ):
            if address is not None:
                checks.append((_LOAD_WORD, offset - 4, _header(size + 4, kind), True))
                for part in range(0, size, 4):
                    value = int.from_bytes(address.packed[part : part + 4], "big")
                    checks.append((_LOAD_WORD, offset + part, value, False))
        if wanted.protocol is not None:
            checks.append((_LOAD_WORD, protocol - 4, _header(5, 1), True))
            checks.append((_LOAD_BYTE, protocol, wanted.protocol, False))
        if wanted.protocol in _PORTS:
            for port, offset, kind in (
                (half.sport, protocol + 8, 2),
                (half.dport, protocol + 16, 3),
            ):
                if port is not None:
                    checks.append((_LOAD_WORD, offset - 4, _header(6, kind), True))
                    checks.append((_LOAD_HALF, offset, port, False))
    accept = 2 * len(checks)
    code: list[bytes] = []
    for load, offset, value, says_nothing in checks:
        otherwise = accept if says_nothing else accept + 1
        code.append(_pack(load, 0, 0, offset))
        code.append(_pack(_JUMP_EQUAL, 0, otherwise - len(code) - 1, value))
    return b"".join((*code, _pack(_RETURN, 0, 0, _ACCEPT)))


def _pack(code: int, true: int, false: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)


def _header(length: int, kind: int) -> int:
    """An attribute's header as BPF loads it: most significant byte first."""
    return int.from_bytes(struct.pack("=HH", length, kind), "big")
