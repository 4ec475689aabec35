"""Words that rules are written with: addresses, masks, quoted strings, protocols.

Text is str of Latin-1: each character is one byte of what iptables-nft-save would write, whatever
it is.

Source: iptables libxtables/xtables.c (xtables_save_string, xtables_ipmask_to_numeric,
xtables_ip6mask_to_cidr), iptables/xshared.c (mask_to_str, save_ipv6_addr, proto_to_name).
"""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

__all__ = [
    "NotRendered",
    "address",
    "bit_names",
    "flags_in",
    "inverted",
    "mark_and_mask",
    "masked",
    "named",
    "prefix_length",
    "protocol_name",
    "quoted",
    "rate",
    "string",
]


class NotRendered(Exception):
    """Something of a rule is not known here; the message says what."""


_PLAIN: Final = re.compile(r"[-_0-9A-Za-z]+").fullmatch
_ESCAPED: Final = re.compile(r"[\"\\']")
_BITS: Final = {4: 32, 6: 128}
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_PROTOCOLS: Final = {
    6: "tcp",
    17: "udp",
    1: "icmp",
    58: "ipv6-icmp",
    132: "sctp",
    136: "udplite",
    50: "esp",
    51: "ah",
    135: "mobility-header",
}
"""What iptables names by itself (xtables_chain_protos); others come from /etc/protocols."""
_ETC_PROTOCOLS: Final = Path("/etc/protocols")


def string(data: bytes) -> str:
    """A C string: up to its first NUL, or all of it."""
    return data.split(b"\0", 1)[0].decode("latin-1")


def quoted(value: str) -> str:
    """A value as iptables-restore reads it back, but on one line; no leading blank."""
    if _PLAIN(value):
        return value
    escaped = _ESCAPED.sub(r"\\\g<0>", value).replace("\n", "\\n")
    return f'"{escaped}"'


def inverted(yes: object) -> str:
    """The negation before an option, or nothing."""
    return " !" if yes else ""


def address(data: bytes, family: int) -> str:
    """An address at the beginning of `data`, in network byte order."""
    return socket.inet_ntop(_FAMILIES[family], data[: _BITS[family] // 8])


def prefix_length(mask: bytes) -> int:
    """The number of leading ones; -1 when ones follow zeros."""
    bits = 8 * len(mask)
    value = int.from_bytes(mask, "big")
    length = value.bit_count()
    return length if value == (1 << bits) - (1 << (bits - length)) else -1


def masked(data: bytes, mask: bytes, family: int) -> str:
    """An address of a match's own options: no ``/32`` and no ``/128``."""
    size = _BITS[family] // 8
    length = prefix_length(mask[:size])
    if length == _BITS[family]:
        return address(data, family)
    return f"{address(data, family)}/{address(mask, family) if length < 0 else length}"


def mark_and_mask(mark: int, mask: int) -> str:
    """``0x1/0xff``; the mask only where it has a zero."""
    return f"0x{mark:x}" if mask == 0xFFFFFFFF else f"0x{mark:x}/0x{mask:x}"


def flags_in(value: int, known: int, what: str) -> int:
    """`value`.  Raises `NotRendered` when it has a bit that `known` has not."""
    if value & ~known:
        raise NotRendered(f"{what} with flags 0x{value:x}")
    return value


def bit_names(mask: int, names: Sequence[str], what: str) -> str:
    """Names of the bits from 0 on, with commas.  Raises `NotRendered` for a bit without a name."""
    return named(mask, [(1 << bit, name) for bit, name in enumerate(names)], what)


def named(mask: int, names: Iterable[tuple[int, str]], what: str) -> str:
    """As `bit_names`, for (bit, name) in the order of `names`."""
    pairs = tuple(names)
    flags_in(mask, sum(bit for bit, _ in pairs), what)
    return ",".join(name for bit, name in pairs if mask & bit)


def rate(period: int, scale: int) -> tuple[str, int]:
    """``5/min`` for a cost of `period` for each packet, and the unit in units of 1/`scale` s.

    Raises `NotRendered` for no cost at all.  As print_rate() in libxt_limit.c, libxt_hashlimit.c.
    """
    if not period:
        raise NotRendered("a rate without a limit")
    units: Iterable[tuple[str, int]] = (
        ("day", scale * 86400),
        ("hour", scale * 3600),
        ("min", scale * 60),
        ("sec", scale),
    )
    name, chosen = "", 0
    for unit, size in units:
        if name and (period > size or size // period < size % period):
            break
        name, chosen = unit, size
    return f"{chosen // period}/{name}", chosen


def protocol_name(number: int) -> str:
    """As ``-p`` is printed."""
    return _PROTOCOLS.get(number) or _listed().get(number, str(number))


@functools.cache
def _listed() -> dict[int, str]:
    """getprotobynumber(): the first line with the number counts."""
    found: dict[int, str] = {}
    try:
        lines = _ETC_PROTOCOLS.read_text("latin-1").splitlines()
    except OSError:
        return found  # then iptables prints the number
    for line in lines:
        words = line.partition("#")[0].split()
        if len(words) >= 2 and words[1].isdigit():
            found.setdefault(int(words[1]), words[0])
    return found
