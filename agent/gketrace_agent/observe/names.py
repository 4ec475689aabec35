"""Names that iproute2 gives to the numbers of rtnetlink (its built-in tables, lib/rt_names.c)."""

from __future__ import annotations

from typing import Final

__all__ = ["protocol_text", "scope_name", "table_text"]

_SCOPES: Final = {0: "global", 200: "site", 253: "link", 254: "host", 255: "nowhere"}
_TABLES: Final = {253: "default", 254: "main", 255: "local"}
_PROTOCOLS: Final = {
    0: "unspec",
    1: "redirect",
    2: "kernel",
    3: "boot",
    4: "static",
    8: "gated",
    9: "ra",
    10: "mrt",
    11: "zebra",
    12: "bird",
    13: "dnrouted",
    14: "xorp",
    15: "ntk",
    16: "dhcp",
    18: "keepalived",
    42: "babel",
    186: "bgp",
    187: "isis",
    188: "ospf",
    189: "rip",
    192: "eigrp",
}


def scope_name(number: int) -> str:
    """rtm_scope, ifa_scope: ``253`` → ``"link"``."""
    return _SCOPES.get(number, str(number))


def table_text(number: int) -> str:
    """``254`` → ``"main"``; other tables keep their number (a node's rt_tables is not read)."""
    return _TABLES.get(number, str(number))


def protocol_text(number: int) -> str:
    """rtm_protocol: ``2`` → ``"kernel"``, ``66`` → ``"66"``."""
    return _PROTOCOLS.get(number, str(number))
