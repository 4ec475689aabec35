"""Core dataclasses ↔ protobuf messages, mapped by field name.

A core dataclass and its message have the same field names, so one walk over the fields serves all
of them; a test fails when the two sides differ.  Conversions by the dataclass's type:

- ``IPv4Address | IPv6Address`` and networks ↔ string; `Fraction` ↔ ``"n/d"``
- `Enum` member ↔ proto enum value ``PREFIX_MEMBER``
- ``tuple[T, ...]`` ↔ repeated; ``tuple[int, int]`` ↔ ``PortRange``; ``X | None`` ↔ optional
- ``tuple[int, ...] | None`` ↔ optional ``ByteList``; ``Mapping[str, str]`` ↔ map
- a byte in a string that is not UTF-8, as a rule's comment may have, travels as ``\\xff``

An enum value that this side does not know becomes the enum's ``UNKNOWN`` member where it has one
(a newer peer), else `GketraceError`: nothing is dropped silently.  What no kernel has and
no walk makes is one, too (`_CHECKS`).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from fractions import Fraction
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from google.protobuf.message import Message

import gketrace.trace
from gketrace import conntrack, packet, snapshot, trace
from gketrace.errors import GketraceError
from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.utf8 import as_utf8
from gketrace_proto.v1alpha1 import packet_pb2, snapshot_pb2, trace_pb2

__all__ = [
    "MESSAGES",
    "decode",
    "encode",
    "snapshot_from_proto",
    "snapshot_to_proto",
]

MESSAGES: Mapping[type[Any], type[Message]] = {
    packet.Packet: packet_pb2.Packet,
    packet.Tuple5: packet_pb2.Tuple5,
    conntrack.ConntrackEntry: packet_pb2.ConntrackEntry,
    trace.NetnsRef: trace_pb2.NetnsRef,
    trace.Citation: trace_pb2.Citation,
    trace.Step: trace_pb2.Step,
    trace.Flow: trace_pb2.Flow,
    trace.Outcome: trace_pb2.Outcome,
    trace.Ingress: trace_pb2.Ingress,
    trace.Branch: trace_pb2.Branch,
    trace.Missing: trace_pb2.Missing,
    trace.Walk: trace_pb2.Walk,
    snapshot.LinkPeer: snapshot_pb2.LinkPeer,
    snapshot.BridgePort: snapshot_pb2.BridgePort,
    snapshot.Link: snapshot_pb2.Link,
    snapshot.Address: snapshot_pb2.Address,
    snapshot.NextHop: snapshot_pb2.NextHop,
    snapshot.Route: snapshot_pb2.Route,
    snapshot.PolicyRule: snapshot_pb2.PolicyRule,
    snapshot.Neighbour: snapshot_pb2.Neighbour,
    snapshot.FdbEntry: snapshot_pb2.FdbEntry,
    snapshot.Socket: snapshot_pb2.Socket,
    snapshot.RecentEntry: snapshot_pb2.RecentEntry,
    snapshot.IpSetEntry: snapshot_pb2.IpSetEntry,
    snapshot.IpSet: snapshot_pb2.IpSet,
}
"""Every core type that travels, and its message."""

T = TypeVar("T")
_Put = Callable[[Message, str, Any], None]
_Get = Callable[[Message, str], Any]

_SNAPSHOT_LISTS = ("links", "addresses", "routes", "rules", "neighbours", "fdb", "sockets")


def encode(value: Any) -> Any:
    """Core dataclass → its message.  Raises TypeError for a type that does not travel."""
    message = _message_type(type(value))()
    for name, put, _ in _plan(type(value)):
        field_value = getattr(value, name)
        if field_value is not None:
            put(message, name, field_value)
    return message


def decode(cls: type[T], message: Message) -> T:
    """Message → core dataclass.  Raises `GketraceError` for what this side cannot read."""
    try:
        value = cls(**{name: get(message, name) for name, _, get in _plan(cls)})
        if cls in _CHECKS:
            _CHECKS[cls](value)
        return value
    except ValueError as error:
        raise GketraceError(f"unreadable {cls.__name__} in a reply: {error}") from error


def snapshot_to_proto(shot: NetnsSnapshot) -> snapshot_pb2.NetnsSnapshot:
    """A snapshot without its rule sets and conntrack."""
    message = snapshot_pb2.NetnsSnapshot(netns=encode(shot.netns), taken_at=shot.taken_at)
    for name in _SNAPSHOT_LISTS:
        value = getattr(shot, name)
        if isinstance(value, Unavailable):
            message.unavailable[name] = value.reason
        else:
            getattr(message, name).extend(encode(item) for item in value)
    if isinstance(shot.sysctls, Unavailable):
        message.unavailable["sysctls"] = shot.sysctls.reason
    else:
        message.sysctls.update(shot.sysctls)
    if isinstance(shot.recent, Unavailable):
        message.unavailable["recent"] = shot.recent.reason
    else:
        for name, entries in shot.recent.items():
            message.recent[name].entries.extend(encode(entry) for entry in entries)
    if isinstance(shot.ipsets, Unavailable):
        message.unavailable["ipsets"] = shot.ipsets.reason
    else:
        message.ipsets.extend(encode(one) for one in shot.ipsets.values())
    message.missing.extend(encode(item) for item in shot.missing)
    return message


def snapshot_from_proto(message: snapshot_pb2.NetnsSnapshot) -> NetnsSnapshot:
    """The inverse of `snapshot_to_proto`; what did not travel is `Unavailable`.

    Raises `GketraceError` for what this side cannot read.
    """
    absent = Unavailable(reason="not part of this reply")
    gone = {name: Unavailable(reason=why) for name, why in message.unavailable.items()}
    parts: dict[str, Any] = {}
    for name in _SNAPSHOT_LISTS:
        (item_type,) = (cls for cls in _ITEM_TYPES[name])
        parts[name] = gone.get(name) or tuple(
            decode(item_type, item) for item in getattr(message, name)
        )
    return NetnsSnapshot(
        netns=decode(trace.NetnsRef, message.netns),
        sysctls=gone.get("sysctls") or dict(message.sysctls),
        rulesets=(),
        conntrack=absent,
        recent=gone.get("recent")
        or {
            name: tuple(decode(snapshot.RecentEntry, entry) for entry in listed.entries)
            for name, listed in message.recent.items()
        },
        ipsets=gone.get("ipsets")
        or {one.name: decode(snapshot.IpSet, one) for one in message.ipsets},
        missing=tuple(decode(trace.Missing, item) for item in message.missing),
        taken_at=message.taken_at,
        **parts,
    )


_ITEM_TYPES: Mapping[str, tuple[type[Any]]] = {
    "links": (snapshot.Link,),
    "addresses": (snapshot.Address,),
    "routes": (snapshot.Route,),
    "rules": (snapshot.PolicyRule,),
    "neighbours": (snapshot.Neighbour,),
    "fdb": (snapshot.FdbEntry,),
    "sockets": (snapshot.Socket,),
}


def _message_type(cls: type[Any]) -> type[Message]:
    try:
        return MESSAGES[cls]
    except KeyError:
        raise TypeError(f"{cls.__name__} does not travel") from None


_PLANS: dict[type[Any], tuple[tuple[str, _Put, _Get], ...]] = {}


def _plan(cls: type[Any]) -> tuple[tuple[str, _Put, _Get], ...]:
    """(field name, how to put it into a message, how to get it out), for each field."""
    if cls not in _PLANS:
        _PLANS[cls] = _make_plan(cls)
    return _PLANS[cls]


def _make_plan(cls: type[Any]) -> tuple[tuple[str, _Put, _Get], ...]:
    hints = typing.get_type_hints(cls, vars(gketrace.trace) | vars(snapshot))
    plan = []
    for field in fields(cls):
        optional, hint = _strip_optional(hints[field.name])
        put, get = _converter(hint, _message_type(cls), field.name)
        plan.append((field.name, put, _optional(get) if optional else get))
    return tuple(plan)


def _check_walk(walk: trace.Walk) -> None:
    """A tree: what follows parents comes to an end, and each way has an outcome."""
    forks = {branch.parent for branch in walk.branches[1:]}
    for number, branch in enumerate(walk.branches):
        parent = branch.parent
        if parent is not None if number == 0 else parent is None or parent >= number:
            raise ValueError(f"branch {number} has parent {parent}")
        if (branch.outcome is None) is not (number in forks):
            raise ValueError(f"branch {number} has an outcome and goes on, or neither")
    if not walk.branches:
        raise ValueError("it has no branches")


def _check_branch(branch: trace.Branch) -> None:
    if branch.chance is not None and not 0 <= branch.chance <= 1:
        raise ValueError(f"a probability of {branch.chance}")


def _check_address(one: snapshot.Address) -> None:
    peer = one.peer or one.address
    if one.prefixlen > one.address.max_prefixlen or peer.version != one.address.version:
        raise ValueError(f"{one.address}/{one.prefixlen}, its other end {peer}")


def _check_route(route: snapshot.Route) -> None:
    parts = (route.dst, route.src, route.prefsrc)
    if any(part is not None and part.version != route.family for part in parts):
        raise ValueError(f"of family {route.family} to {route.dst}")


def _check_rule(rule: snapshot.PolicyRule) -> None:
    parts = (rule.src, rule.dst)
    if any(part is not None and part.version != rule.family for part in parts):
        raise ValueError(f"of family {rule.family}: {rule.text[:100]!r}")


_CHECKS: Mapping[type[Any], Callable[[Any], None]] = {
    trace.Walk: _check_walk,
    trace.Branch: _check_branch,
    snapshot.Address: _check_address,
    snapshot.Route: _check_route,
    snapshot.PolicyRule: _check_rule,
}
"""What the fields' types do not say.  Each raises ValueError."""


def _fraction(text: str) -> Fraction:
    """``n/d``.  Not `Fraction` itself, which takes 1e999999999 for a number to compute."""
    number, _, divisor = text.partition("/")
    parts = int(number), int(divisor or "1")
    if not parts[1]:
        raise ValueError(f"{text} is no fraction")
    return Fraction(*parts)


def _strip_optional(hint: Any) -> tuple[bool, Any]:
    """``X | None`` → (True, X)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(rest) < len(typing.get_args(hint)):
            return True, rest[0] if len(rest) == 1 else typing.Union[tuple(rest)]  # noqa: UP007
    return False, hint


def _optional(get: _Get) -> _Get:
    return lambda message, name: get(message, name) if message.HasField(name) else None


def _put_plain(message: Message, name: str, value: Any) -> None:
    try:
        setattr(message, name, value)
    except UnicodeEncodeError:
        setattr(message, name, as_utf8(value))


def _put_text(message: Message, name: str, value: Any) -> None:
    setattr(message, name, str(value))


def _put_map(message: Message, name: str, value: Any) -> None:
    try:
        getattr(message, name).update(value)
    except UnicodeEncodeError:
        getattr(message, name).update({as_utf8(k): as_utf8(v) for k, v in value.items()})


def _put_message(message: Message, name: str, value: Any) -> None:
    getattr(message, name).CopyFrom(encode(value))


def _converter(hint: Any, message: type[Message], name: str) -> tuple[_Put, _Get]:
    origin = typing.get_origin(hint)
    if origin in (Mapping, dict):
        return _put_map, lambda m, n: dict(getattr(m, n))
    if origin is tuple:
        return _tuple_converter(typing.get_args(hint), message, name)
    if origin in (typing.Union, types.UnionType):
        is_network = any("Network" in part.__name__ for part in typing.get_args(hint))
        parse: Callable[[str], Any] = ip_network if is_network else ip_address
        return _put_text, lambda m, n: parse(getattr(m, n))
    if hint is Fraction:
        return _put_text, lambda m, n: _fraction(getattr(m, n))
    if isinstance(hint, type) and issubclass(hint, Enum) and not issubclass(hint, int):
        return _enum_converter(hint, message, name)
    if is_dataclass(hint) and isinstance(hint, type):
        return _put_message, lambda m, n: decode(hint, getattr(m, n))
    if hint in (int, str, bool, float):
        return _put_plain, getattr
    raise TypeError(f"{name}: no conversion for {hint!r}")


def _tuple_converter(args: tuple[Any, ...], message: type[Message], name: str) -> tuple[_Put, _Get]:
    item = args[0]
    if args[-1] is not Ellipsis:

        def put_range(m: Message, n: str, value: Any) -> None:
            getattr(m, n).first, getattr(m, n).last = value

        return put_range, lambda m, n: (getattr(m, n).first, getattr(m, n).last)
    if item is int:

        def put_bytes(m: Message, n: str, value: Any) -> None:
            getattr(m, n).SetInParent()
            getattr(m, n).values.extend(value)

        return put_bytes, lambda m, n: tuple(getattr(m, n).values)
    if is_dataclass(item) and isinstance(item, type):

        def put_many(m: Message, n: str, value: Any) -> None:
            getattr(m, n).extend(encode(part) for part in value)

        return put_many, lambda m, n: tuple(decode(item, part) for part in getattr(m, n))

    def put_all(m: Message, n: str, value: Any) -> None:
        getattr(m, n).extend(as_utf8(one) if isinstance(one, str) else one for one in value)

    return put_all, lambda m, n: tuple(getattr(m, n))


def _enum_converter(cls: type[Enum], message: type[Message], name: str) -> tuple[_Put, _Get]:
    enum_type = message.DESCRIPTOR.fields_by_name[name].enum_type
    if enum_type is None:
        raise TypeError(f"{name} is no enum in {message.__name__}")
    values = enum_type.values
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    number = {cls[v.name.removeprefix(prefix)]: v.number for v in values[1:]}
    member = {n: m for m, n in number.items()}
    unknown = cls.__members__.get("UNKNOWN")

    def put(m: Message, n: str, value: Any) -> None:
        setattr(m, n, number[value])

    def get(m: Message, n: str) -> Enum:
        found = member.get(getattr(m, n), unknown)
        if found is None:
            raise ValueError(f"{n} {getattr(m, n)} is newer than this program")
        return found

    return put, get
