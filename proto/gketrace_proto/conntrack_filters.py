"""Filters of connection-tracking entries as requests have them → the core's."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Literal, TypeAlias, TypeVar

from gketrace.conntrack_filter import ConntrackFilter
from gketrace.errors import UsageError
from gketrace.snapshot import IPNetwork
from gketrace_proto.v1alpha1 import agent_pb2

__all__ = ["filters_from_proto"]

F = TypeVar("F", bound=ConntrackFilter)
_Number: TypeAlias = Literal[
    "orig_sport",
    "orig_dport",
    "reply_sport",
    "reply_dport",
    "mark",
    "zone",
    "src_nat_port",
    "dst_nat_port",
]
"""Fields of a filter that tell zero from not given."""
_PORTS = (
    "orig_sport",
    "orig_dport",
    "reply_sport",
    "reply_dport",
    "src_nat_port",
    "dst_nat_port",
    "zone",
)
"""Fields of 16 bits."""


def _filter(cls: type[F], message: agent_pb2.ConntrackFilter) -> F:
    """Raises `UsageError` for what cannot be meant."""
    if message.family not in (0, 4, 6):
        raise UsageError(f"no such address family: {message.family}", hint="4, 6, or 0 for both")

    most = {"protocol": 255} | dict.fromkeys(_PORTS, 65535)
    for name, bound in most.items():
        if getattr(message, name) > bound:
            raise UsageError(f"no such {name}: {getattr(message, name)}; {bound} is the last one")

    def number(name: _Number) -> int | None:
        return getattr(message, name) if message.HasField(name) else None

    return cls(
        family=message.family,
        protocol=message.protocol or None,
        orig_src=_network(message.orig_src),
        orig_dst=_network(message.orig_dst),
        reply_src=_network(message.reply_src),
        reply_dst=_network(message.reply_dst),
        orig_sport=number("orig_sport"),
        orig_dport=number("orig_dport"),
        reply_sport=number("reply_sport"),
        reply_dport=number("reply_dport"),
        mark=number("mark"),
        mark_mask=message.mark_mask or 0xFFFFFFFF,
        zone=number("zone"),
        address=_network(message.address),
        tcp_state=message.tcp_state.upper(),
        status=message.status,
        status_mask=message.status_mask,
        src_nat=_network(message.src_nat),
        dst_nat=_network(message.dst_nat),
        src_nat_port=number("src_nat_port"),
        dst_nat_port=number("dst_nat_port"),
    )


def filters_from_proto(
    cls: type[F], request: agent_pb2.ListConntrackRequest | agent_pb2.FollowConntrackRequest
) -> tuple[F, ...]:
    """All filters of a request; without any, one that takes every entry.

    Raises `UsageError` for what cannot be meant.
    """
    given = list(request.any)
    if request.HasField("filter") or not given:
        given.insert(0, request.filter)
    return tuple(_filter(cls, one) for one in given)


def _network(text: str) -> IPNetwork | None:
    if not text:
        return None
    try:
        return ip_network(text, strict=False)
    except ValueError:
        raise UsageError(f"not an address or network: {text!r}") from None
