"""The tests of nftables' rules that nft may leave out of its listing.

nft takes a test for a dependency of the expression behind it, and does not print it, though
somebody wrote it: ``ct l3proto ipv6 reject`` is listed as ``reject with icmpv6 port-unreachable``,
``meta protocol ip ip6 saddr fd00::/16 accept`` as ``ip6 saddr fd00::/16 accept`` (nftables 1.0.6,
src/netlink_delinearize.c, payload_dependency_kill()).  What the kernel runs is in its own dump, so
that is asked for them: comparisons for equality of the fields that dependencies are made of.

Source: kernel net/netfilter/nf_tables_api.c (nf_tables_fill_rule_info), nft_meta.c, nft_ct.c,
nft_payload.c, nft_cmp.c; include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import re
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from gketrace.ruleset.nft import NftTest
from gketrace_agent.kernel.netlink import NetlinkSocket, attribute, attributes, text
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER, NFNL_SUBSYS_NFTABLES, NftTable, nfnl_type

__all__ = ["FAMILIES", "NftTests", "nft_tests"]

NftTests: TypeAlias = Mapping[int, tuple[NftTest, ...]]
"""Rule handle → its tests, in order; a rule without any is not in it."""

_NFT_MSG_GETRULE: Final = 7
FAMILIES: Final[Mapping[str, int]] = {"inet": 1, "ip": 2, "ip6": 10}
"""Families of tables that are simulated, and their numbers."""
_RULE_TABLE, _RULE_HANDLE, _RULE_EXPRESSIONS = 1, 3, 4
_EXPR_NAME, _EXPR_DATA = 1, 2
_CMP_SREG, _CMP_OP, _CMP_DATA, _DATA_VALUE = 1, 2, 3, 1
_META_DREG, _META_KEY, _META_SREG = 1, 2, 3
_CT_DREG, _CT_KEY, _CT_DIRECTION, _CT_SREG = 1, 2, 3, 4
_PAYLOAD_DREG, _PAYLOAD_BASE, _PAYLOAD_OFFSET, _PAYLOAD_LEN, _PAYLOAD_SREG = 1, 2, 3, 4, 5
_EXTHDR_SREG: Final = 7

_META: Final[Mapping[int, str]] = {1: "protocol", 8: "iiftype", 15: "nfproto", 16: "l4proto"}
_CT: Final[Mapping[int, str]] = {7: "l3proto", 10: "protocol"}
_LINK, _NETWORK = 0, 1
_PAYLOAD: Final[Mapping[tuple[str, int, int, int], tuple[str, str]]] = {
    ("ip", _NETWORK, 9, 1): ("ip", "protocol"),
    ("ip6", _NETWORK, 6, 1): ("ip6", "nexthdr"),
    ("", _LINK, 12, 2): ("ether", "type"),
}
"""(network header, "" for any; base, offset, length) → header and field."""
_HEADERS: Final[Mapping[tuple[str, int], str]] = {
    ("nfproto", socket.AF_INET): "ip",
    ("nfproto", socket.AF_INET6): "ip6",
    ("protocol", 0x0800): "ip",
    ("protocol", 0x86DD): "ip6",
    ("type", 0x0800): "ip",
    ("type", 0x86DD): "ip6",
}
"""Tests after which it is known which network header there is."""
_HOST_ORDER: Final = frozenset(("iiftype",))


def _u32(kind: int) -> bytes:
    """The beginning of an attribute that holds a big-endian number below 256."""
    return re.escape(struct.pack("=HH", 8, kind) + b"\0\0\0")


_CMP: Final = attribute(_EXPR_NAME, b"cmp\0")
_LOADS: Final = re.compile(
    # meta and ct have their key, payload its base in attribute 2.
    _u32(2) + rb"[\x07\x08\x0a\x0f\x10]|"
    rb"meta\0.{7}(?:.{8})?" + _u32(_META_KEY) + rb"\x01|"
    + _u32(_PAYLOAD_OFFSET) + rb"[\x06\x09]|"
    + _u32(_PAYLOAD_BASE) + rb"\0" + _u32(_PAYLOAD_OFFSET) + rb"\x0c",
    re.DOTALL,
)  # fmt: skip
"""Whether a rule may load one of the fields above: most rules of large tables do not."""


def nft_tests(netfilter: NetlinkSocket, table: NftTable) -> NftTests:
    """The tests of `table`'s rules.  Raises `NetlinkError`; the table's family must be ip, ip6 or
    inet."""
    body = NFNL_HEADER.pack(FAMILIES[table.family], 0, 0)
    body += attribute(_RULE_TABLE, table.name.encode() + b"\0")
    dump = netfilter.dump(
        nfnl_type(NFNL_SUBSYS_NFTABLES, _NFT_MSG_GETRULE),
        body,
        what=f"rules of table {table}",
        wanted=_may_test,
    )
    found: dict[int, tuple[NftTest, ...]] = {}
    seen: dict[bytes, tuple[NftTest, ...]] = {}
    for message in dump.messages:
        rule = attributes(message.body, NFNL_HEADER.size)
        expressions = rule.get(_RULE_EXPRESSIONS, b"")
        # Up to the last comparison: thousands of rules differ only behind it.
        last = expressions.rfind(_CMP) - 4
        length = int.from_bytes(expressions[last : last + 2], sys.byteorder)
        head = expressions[: last + length]
        tests = seen.get(head)
        if tests is None:
            tests = seen[head] = tuple(_tests(head, table.family))
        if tests:
            found[int.from_bytes(rule[_RULE_HANDLE], "big")] = tests
    return found


def _may_test(body: bytes) -> bool:
    return _CMP in body and _LOADS.search(body) is not None


def _tests(expressions: bytes, family: str) -> Iterator[NftTest]:
    loaded: dict[int, tuple[Any, bool]] = {}
    changes = 0
    header = family if family in _HEADERS.values() else ""
    for name, data in _expressions(expressions):
        number = {key: int.from_bytes(value, "big") for key, value in data.items()}
        if name == "cmp":
            source = loaded.get(number.get(_CMP_SREG, -1))
            if source is not None and not number.get(_CMP_OP):
                left, host_order = source
                value = attributes(data[_CMP_DATA]).get(_DATA_VALUE, b"")
                right = int.from_bytes(value, sys.byteorder if host_order else "big")
                header = _HEADERS.get((_name_of(left), right), header)
                match = {"op": "==", "left": left, "right": right}
                yield NftTest(statement={"match": match}, after=changes)
            continue
        left = _load(name, number, header)
        if left is not None:
            register, field = left
            loaded[register] = field, name == "meta" and field["meta"]["key"] in _HOST_ORDER
            continue
        changes += _changes(name, data)
        # Whatever else writes a register (bitwise, another load): it is not the bare field.
        for key in (1, 2):
            loaded.pop(number.get(key, -1), None)


def _expressions(data: bytes) -> Iterator[tuple[str, dict[int, bytes]]]:
    offset = 0
    while offset + 4 <= len(data):
        length = int.from_bytes(data[offset : offset + 2], sys.byteorder)
        if length < 4:
            raise ValueError(f"an nf_tables expression of {length} bytes")
        parts = attributes(data[offset + 4 : offset + length])
        yield text(parts[_EXPR_NAME]), attributes(parts.get(_EXPR_DATA, b""))
        offset += (length + 3) & ~3


def _name_of(left: Any) -> str:
    ((_, body),) = left.items()
    return str(body.get("key") or body["field"])


def _load(name: str, number: Mapping[int, int], header: str) -> tuple[int, Any] | None:
    """(register, expression as nft's JSON has it) of a load of a field that counts here.

    `header`: ``ip`` or ``ip6`` where the packet is known to have it.
    """
    if name == "meta" and _META_DREG in number:
        key = _META.get(number.get(_META_KEY, -1))
        return None if key is None else (number[_META_DREG], {"meta": {"key": key}})
    if name == "ct" and _CT_DREG in number and _CT_DIRECTION not in number:
        key = _CT.get(number.get(_CT_KEY, -1))
        return None if key is None else (number[_CT_DREG], {"ct": {"key": key}})
    if name == "payload" and _PAYLOAD_DREG in number:
        base, offset, length = (
            number.get(key, -1) for key in (_PAYLOAD_BASE, _PAYLOAD_OFFSET, _PAYLOAD_LEN)
        )
        field = _PAYLOAD.get((header if base != _LINK else "", base, offset, length))
        if field is not None:
            return number[_PAYLOAD_DREG], {"payload": {"protocol": field[0], "field": field[1]}}
    return None


def _changes(name: str, data: Mapping[int, bytes]) -> bool:
    """Whether the expression changes the packet, its connection or a set."""
    setters = {"meta": _META_SREG, "ct": _CT_SREG, "payload": _PAYLOAD_SREG, "exthdr": _EXTHDR_SREG}
    return name in ("dynset", "notrack") or setters.get(name, -1) in data
