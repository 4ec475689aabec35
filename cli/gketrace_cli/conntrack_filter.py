"""conntrack(8)'s filter flags, and pods and Services, → the filters that agents take.

Pure.  An agent's request holds alternatives, any one of which takes an entry; what was typed must
hold in each of them.  Nothing is filtered here: agents do it, and the kernel before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import Final, Literal, get_args

from gketrace.conntrack import CtStatus
from gketrace.conntrack_records import STATE_NAMES
from gketrace.errors import UsageError
from gketrace.objects import Endpoint, Pod, Service
from gketrace.packet import protocol_number
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = [
    "both",
    "door_filters",
    "endpoint_filters",
    "parse_family",
    "parse_mark",
    "parse_nat",
    "pod_filters",
    "typed_filter",
]

_FAMILIES: Final[Mapping[str, int]] = {"ipv4": 4, "ipv6": 6, "4": 4, "6": 6, "inet": 4, "inet6": 6}
_ADDRESSES: Final = (
    *("orig_src", "orig_dst", "reply_src", "reply_dst", "address"),
    *("src_nat", "dst_nat"),
)
_Number = Literal[
    "orig_sport",
    "orig_dport",
    "reply_sport",
    "reply_dport",
    "zone",
    "mark",
    "src_nat_port",
    "dst_nat_port",
]
_NUMBERS: Final[tuple[_Number, ...]] = get_args(_Number)


def parse_family(text: str) -> int:
    """Raises `UsageError`."""
    if text.lower() not in _FAMILIES:
        raise UsageError(f"no such address family: {text!r}", hint="ipv4 or ipv6")
    return _FAMILIES[text.lower()]


def parse_mark(text: str) -> tuple[int, int]:
    """``5``, ``0x4000/0x4000`` → (mark, mask).  Raises `UsageError`."""
    mark, slash, mask = text.partition("/")
    try:
        found = int(mark, 0), int(mask, 0) if slash else 0xFFFFFFFF
    except ValueError:
        raise UsageError(f"{text!r} is no mark", hint="use VALUE or VALUE/MASK") from None
    if not all(0 <= number <= 0xFFFFFFFF for number in found) or not found[1]:
        raise UsageError(f"{text!r} is no mark of 32 bits")
    return found


def typed_filter(
    *,
    family: str | None = None,
    protocol: str | None = None,
    addresses: Mapping[str, str | None] | None = None,
    ports: Mapping[str, int | None] | None = None,
    mark: str | None = None,
    zone: int | None = None,
    state: str | None = None,
    src_nat: str | None = None,
    dst_nat: str | None = None,
) -> pb.ConntrackFilter:
    """The flags as one filter; `addresses` and `ports` by its fields.  `src_nat`, `dst_nat`: empty
    for any translation, or what to.  Raises `UsageError`."""
    made = pb.ConntrackFilter(family=parse_family(family) if family else 0)
    if protocol is not None:
        made.protocol = protocol_number(protocol)
        if not made.protocol:
            raise UsageError("protocol 0 cannot be asked for")
    for name, text in (addresses or {}).items():
        if text is not None:
            setattr(made, name, _network(text))
    for name, port in (ports or {}).items():
        if port is not None:
            setattr(made, name, port)
    if mark is not None:
        made.mark, made.mark_mask = parse_mark(mark)
    if zone is not None:
        made.zone = zone
    made.tcp_state = (state or "").upper()
    if made.tcp_state not in STATE_NAMES:
        raise UsageError(f"no such state: {state!r}", hint=f"one of {', '.join(STATE_NAMES[1:])}")
    wanted = CtStatus.NONE
    if src_nat is not None:
        wanted |= CtStatus.SRC_NAT
        address, number = parse_nat(src_nat)
        made.src_nat = address
        if number is not None:
            made.src_nat_port = number
    if dst_nat is not None:
        wanted |= CtStatus.DST_NAT
        address, number = parse_nat(dst_nat)
        made.dst_nat = address
        if number is not None:
            made.dst_nat_port = number
    made.status = made.status_mask = int(wanted)
    return made


def parse_nat(text: str) -> tuple[str, int | None]:
    """``10.0.0.1``, ``10.0.0.1:80``, ``[fd00::1]:80``, ``:80`` or nothing → network and port, as
    conntrack(8) has them; also ``10.0.0.0/8``.  Raises `UsageError`."""
    address, port = text, ""
    if text.startswith("["):
        address, bracket, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        if not bracket or colon not in ("", ":"):
            raise UsageError(f"not an ADDRESS[:PORT]: {text!r}")
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
    if port and not (port.isdecimal() and int(port) < 65536):
        raise UsageError(f"not a port: {port!r}")
    return (_network(address) if address else ""), (int(port) if port else None)


def _network(text: str) -> str:
    try:
        return str(ip_network(text, strict=False))
    except ValueError:
        raise UsageError(f"not an address or network: {text!r}") from None


def pod_filters(pod: Pod) -> tuple[pb.ConntrackFilter, ...]:
    """Entries that have one of the pod's addresses in either direction."""
    return tuple(pb.ConntrackFilter(address=_network(ip)) for ip in pod.pod_ips)


def door_filters(service: Service, node_ips: Iterable[str]) -> tuple[pb.ConntrackFilter, ...]:
    """Entries whose first packet went to one of the Service's front doors.

    `node_ips`: the addresses of the node that is asked, for its node ports.
    """
    direct = [
        *service.cluster_ips,
        *service.external_ips,
        *(entry.ip for entry in service.ingress if entry.ip),
    ]
    doors = [(ip, port.port, port.protocol) for port in service.ports for ip in direct]
    doors += [
        (ip, port.node_port, port.protocol)
        for port in service.ports
        if port.node_port
        for ip in dict.fromkeys(node_ips)
    ]
    return tuple(_to("orig_dst", "orig_dport", *door) for door in dict.fromkeys(doors))


def endpoint_filters(endpoints: Sequence[Endpoint]) -> tuple[pb.ConntrackFilter, ...]:
    """Entries that are answered by one of the endpoints: behind another node's translation, a
    Service's connection has no front door any more."""
    ends = dict.fromkeys(
        (end.address, end.port, end.protocol) for end in endpoints if end.address_type != "FQDN"
    )
    return tuple(_to("reply_src", "reply_sport", *end) for end in ends)


def _to(address: str, port: str, ip: str, number: int, protocol: str) -> pb.ConntrackFilter:
    made = pb.ConntrackFilter(family=ip_address(ip).version, protocol=protocol_number(protocol))
    setattr(made, address, _network(ip))
    if number:
        setattr(made, port, number)
    return made


def both(one: pb.ConntrackFilter, other: pb.ConntrackFilter) -> pb.ConntrackFilter | None:
    """What both filters take; None: they contradict each other."""
    made = pb.ConntrackFilter()
    made.CopyFrom(one)
    for name in ("family", "protocol", "tcp_state"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine and theirs and mine != theirs:
            return None
        setattr(made, name, mine or theirs)
    for name in _NUMBERS:
        if not other.HasField(name):
            continue
        if one.HasField(name) and getattr(one, name) != getattr(other, name):
            return None
        setattr(made, name, getattr(other, name))
    made.mark_mask = one.mark_mask or other.mark_mask
    for name in _ADDRESSES:
        mine, theirs = getattr(one, name), getattr(other, name)
        narrow = _narrower(mine, theirs)
        if narrow is None:
            return None
        setattr(made, name, narrow)
    made.status, made.status_mask = one.status | other.status, one.status_mask | other.status_mask
    return made


def _narrower(one: str, other: str) -> str | None:
    if not one or not other:
        return one or other
    first, second = ip_network(one), ip_network(other)
    if not first.overlaps(second):
        return None
    return one if first.prefixlen >= second.prefixlen else other
