"""Routing policy rules, both families (RTM_NEWRULE).

Source: kernel net/core/fib_rules.c fib_nl_fill_rule(), net/ipv4/fib_rules.c; the text follows
iproute2 ip/iprule.c print_rule().
"""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from typing import Final

from gketrace.packet import protocol_name
from gketrace.snapshot import PolicyAction, PolicyRule
from gketrace_agent.kernel.netlink import attributes, text, u32
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.kernel.rtnetlink import ROUTE_HEADER, dump_rules
from gketrace_agent.observe.names import protocol_text, table_text
from gketrace_agent.observe.route_text import prefix_text
from gketrace_agent.observe.routes import network

__all__ = ["observe_rules"]

_FRA_DST: Final = 1
_FRA_SRC: Final = 2
_FRA_IIFNAME: Final = 3
_FRA_GOTO: Final = 4
_FRA_PRIORITY: Final = 6
_FRA_FWMARK: Final = 10
_FRA_FLOW: Final = 11
_FRA_TUN_ID: Final = 12
_FRA_SUPPRESS_IFGROUP: Final = 13
_FRA_SUPPRESS_PREFIXLEN: Final = 14
_FRA_TABLE: Final = 15
_FRA_FWMASK: Final = 16
_FRA_OIFNAME: Final = 17
_FRA_L3MDEV: Final = 19
_FRA_UID_RANGE: Final = 20
_FRA_PROTOCOL: Final = 21
_FRA_IP_PROTO: Final = 22
_FRA_SPORT_RANGE: Final = 23
_FRA_DPORT_RANGE: Final = 24

_FIB_RULE_INVERT: Final = 0x02
_FIB_RULE_UNRESOLVED: Final = 0x04
_FIB_RULE_IIF_DETACHED: Final = 0x08
_FIB_RULE_OIF_DETACHED: Final = 0x10
_RTPROT_KERNEL: Final = 2
_NONE: Final = 0xFFFFFFFF
_ACTIONS: Final = {
    1: PolicyAction.TABLE,
    2: PolicyAction.GOTO,
    3: PolicyAction.NOP,
    6: PolicyAction.BLACKHOLE,
    7: PolicyAction.UNREACHABLE,
    8: PolicyAction.PROHIBIT,
}


def observe_rules(reader: KernelReader) -> tuple[PolicyRule, ...]:
    """All rules in the kernel's order: IPv4 by priority, then IPv6 by priority."""
    return tuple(
        _rule(family, message.body)
        for family in (socket.AF_INET, socket.AF_INET6)
        for message in reader.messages("rules", dump_rules(reader.rtnl, family))
    )


def _rule(family: int, body: bytes) -> PolicyRule:
    _, dst_length, src_length, tos, table, _, _, action, flags = ROUTE_HEADER.unpack_from(body)
    values = attributes(body, ROUTE_HEADER.size)

    def number(kind: int) -> int | None:
        return u32(values[kind]) if kind in values else None

    def suppress(kind: int) -> int | None:
        value = number(kind)
        return None if value is None or value == _NONE else value

    table = u32(values[_FRA_TABLE]) if _FRA_TABLE in values else table
    mark, mask = number(_FRA_FWMARK), number(_FRA_FWMASK)
    if action not in _ACTIONS:
        raise ValueError(f"policy rule with the unknown action {action}")
    tunnel = values.get(_FRA_TUN_ID)
    rule = PolicyRule(
        family=4 if family == socket.AF_INET else 6,
        priority=number(_FRA_PRIORITY) or 0,
        action=_ACTIONS[action],
        table=table,
        goto=number(_FRA_GOTO),
        src=network(family, values[_FRA_SRC], src_length) if _FRA_SRC in values else None,
        dst=network(family, values[_FRA_DST], dst_length) if _FRA_DST in values else None,
        iif=text(values.get(_FRA_IIFNAME, b"")),
        oif=text(values.get(_FRA_OIFNAME, b"")),
        fwmark=None if mark is None and mask is None else mark or 0,
        fwmask=_NONE if mask is None else mask,
        tos=tos,
        ip_protocol=values[_FRA_IP_PROTO][0] if _FRA_IP_PROTO in values else None,
        sport=_range(values.get(_FRA_SPORT_RANGE), "=HH"),
        dport=_range(values.get(_FRA_DPORT_RANGE), "=HH"),
        uid_range=_range(values.get(_FRA_UID_RANGE), "=II"),
        suppress_prefixlength=suppress(_FRA_SUPPRESS_PREFIXLEN),
        suppress_ifgroup=suppress(_FRA_SUPPRESS_IFGROUP),
        l3mdev=bool(values.get(_FRA_L3MDEV, b"\0")[0]),
        invert=bool(flags & _FIB_RULE_INVERT),
        tun_id=None if tunnel is None else int.from_bytes(tunnel, "big"),
    )
    protocol = values[_FRA_PROTOCOL][0] if _FRA_PROTOCOL in values else 0
    line = _text(rule, flags, src_length, dst_length, number(_FRA_FLOW), protocol)
    return replace(rule, text=line)


def _range(raw: bytes | None, layout: str) -> tuple[int, int] | None:
    if raw is None:
        return None
    first, last = struct.unpack(layout, raw)
    return first, last


def _text(
    rule: PolicyRule,
    flags: int,
    src_length: int,
    dst_length: int,
    realms: int | None,
    protocol: int,
) -> str:
    """As ``ip rule`` prints it, with one blank for the tab after the priority."""
    words = [f"{rule.priority}:"]
    if rule.invert:
        words.append("not")
    default = f"0/{src_length}" if src_length else "all"
    words += ["from", default if rule.src is None else prefix_text(rule.src)]
    if rule.dst is not None:
        words += ["to", prefix_text(rule.dst)]
    elif dst_length:
        words += ["to", f"0/{dst_length}"]
    if rule.tos:
        words += ["tos", f"{rule.tos:#04x}"]
    if rule.fwmark is not None:
        mark = _hex(rule.fwmark)
        words += ["fwmark", mark if rule.fwmask == _NONE else f"{mark}/{_hex(rule.fwmask)}"]
    if rule.iif:
        words += ["iif", rule.iif]
    if flags & _FIB_RULE_IIF_DETACHED:
        words.append("[detached]")
    if rule.oif:
        words += ["oif", rule.oif]
    if flags & _FIB_RULE_OIF_DETACHED:
        words.append("[detached]")
    if rule.l3mdev:
        words += ["lookup", "[l3mdev-table]"]
    if rule.uid_range:
        words += ["uidrange", f"{rule.uid_range[0]}-{rule.uid_range[1]}"]
    if rule.ip_protocol is not None:
        words += ["ipproto", protocol_name(rule.ip_protocol)]
    words += _ports("sport", rule.sport) + _ports("dport", rule.dport)
    if rule.tun_id is not None:
        words += ["tun_id", str(rule.tun_id)]
    if rule.table:
        words += ["lookup", table_text(rule.table)]
        if rule.suppress_prefixlength is not None:
            words += ["suppress_prefixlength", str(rule.suppress_prefixlength)]
        if rule.suppress_ifgroup is not None:
            words += ["suppress_ifgroup", str(rule.suppress_ifgroup)]
    if realms:
        source = f"{realms >> 16}/" if realms >> 16 else ""
        words += ["realms", f"{source}{realms & 0xFFFF}"]
    if rule.action is PolicyAction.GOTO:
        words += ["goto", str(rule.goto) if rule.goto is not None else "none"]
        if flags & _FIB_RULE_UNRESOLVED:
            words.append("[unresolved]")
    elif rule.action is not PolicyAction.TABLE:
        words.append(rule.action.value)
    if protocol not in (0, _RTPROT_KERNEL):
        words += ["proto", protocol_text(protocol)]
    return " ".join(words)


def _hex(value: int) -> str:
    """As C prints %#x: no prefix for 0."""
    return f"{value:#x}" if value else "0"


def _ports(word: str, ports: tuple[int, int] | None) -> list[str]:
    if ports is None:
        return []
    first, last = ports
    return [word, str(first) if first == last else f"{first}-{last}"]
