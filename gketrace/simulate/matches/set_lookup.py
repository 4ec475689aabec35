"""Is a packet in an ipset: the kernel's ``kadt`` functions.

Source: net/netfilter/ipset/: ip_set_test() in ip_set_core.c, ip_set_getport.c, mtype_test_cidrs()
in ip_set_hash_gen.h, and the kadt function of each type.  The rule's ``src,dst`` words say, for
each part of an element in turn, from which side of the packet it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Final, TypeAlias

from gketrace.packet import IPAddress, Packet, Protocol
from gketrace.simulate.matches.header import protocol_number_of
from gketrace.simulate.matches.icmp import ICMP6_TYPES, ICMP_TYPES
from gketrace.simulate.state import NO, YES, Answer, Environment, PacketState, Ternary, unknown
from gketrace.snapshot import IpSet, IpSetEntry, Unavailable
from gketrace.trace import Hook

__all__ = ["DIMENSIONS", "element_of", "in_set"]

PortKey: TypeAlias = tuple[int, int]
"""Protocol, port; for ICMP the type and code as one number."""

DIMENSIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "bitmap:ip": ("ip",),
    "bitmap:ip,mac": ("ip", "maybe-mac"),
    "bitmap:port": ("bare-port",),
    "hash:ip": ("ip",),
    "hash:ip,mac": ("ip", "mac"),
    "hash:ip,mark": ("ip", "mark"),
    "hash:ip,port": ("ip", "port"),
    "hash:ip,port,ip": ("ip", "port", "ip"),
    "hash:ip,port,net": ("ip", "port", "net"),
    "hash:mac": ("src-mac",),
    "hash:net": ("net",),
    "hash:net,iface": ("net", "iface"),
    "hash:net,net": ("net", "net"),
    "hash:net,port": ("net", "port"),
    "hash:net,port,net": ("net", "port", "net"),
    "list:set": ("set",),
}
"""Type → what each part of its elements is."""
_ANY_FAMILY: Final = frozenset({"bitmap:port", "hash:mac", "list:set"})
_PLAIN: Final = frozenset({"ip", "port", "bare-port"})
"""Parts that have one spelling, so that an element that this packet added can be compared."""
_PORT_PROTOCOLS: Final = frozenset({Protocol.TCP, Protocol.UDP, Protocol.UDPLITE, Protocol.SCTP})
_MAX_NESTING: Final = 2
"""A list:set holds no list:set."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of the packet's own element: what entries' parts are compared with."""

    kind: str
    source: bool
    address: IPAddress | None = None
    port: PortKey | None = None
    text: str = ""
    missing: str = ""
    """What of it is not known."""


def in_set(
    ipset: IpSet,
    sides: tuple[str, ...],
    state: PacketState,
    env: Environment,
    *,
    return_nomatch: bool = False,
    nesting: int = 0,
) -> Answer:
    """ip_set_test(): `sides` are the rule's ``src`` and ``dst`` words."""
    kinds = DIMENSIONS.get(ipset.type)
    if kinds is None or nesting >= _MAX_NESTING:
        return unknown(f"sets of type {ipset.type} are not understood")
    if len(sides) < len(kinds):
        return NO
    # Types without a family option print none: bitmaps of addresses are IPv4.
    if ipset.type not in _ANY_FAMILY and (ipset.family or 4) != state.packet.family:
        return NO
    if ipset.type == "list:set":
        return _in_list(ipset, sides, state, env, return_nomatch, nesting)
    parts = _parts(ipset, kinds, sides, state)
    if parts is None:
        return NO
    changed = _changed(ipset, kinds, parts, state)
    if changed is not None:
        return changed
    best: tuple[tuple[int, ...], bool] | None = None
    doubt = ""
    for entry in ipset.entries:
        try:
            answer, length = _entry(parts, entry)
        except (ValueError, IndexError):
            answer, length = unknown(f"{entry.text or ','.join(entry.parts)}"), ()
        if answer.kind is Ternary.UNKNOWN:
            doubt = doubt or answer.reason
        elif answer is YES and (best is None or length > best[0]):
            best = (length, entry.nomatch)
    if doubt:
        return unknown(f"set {ipset.name}: {doubt}")
    if best is None:
        return NO
    return YES if best[1] is return_nomatch else NO


def _in_list(
    ipset: IpSet,
    sides: tuple[str, ...],
    state: PacketState,
    env: Environment,
    return_nomatch: bool,
    nesting: int,
) -> Answer:
    doubt: Answer | None = None
    for entry in ipset.entries:
        member = env.ipset(entry.parts[0])
        if isinstance(member, Unavailable):
            answer = unknown(f"set {entry.parts[0]}: {member.reason}")
        else:
            answer = in_set(
                member, sides, state, env, return_nomatch=return_nomatch, nesting=nesting + 1
            )
        if answer is YES:
            return YES
        if answer.kind is Ternary.UNKNOWN:
            doubt = doubt or answer
    return doubt or NO


def _parts(
    ipset: IpSet, kinds: tuple[str, ...], sides: tuple[str, ...], state: PacketState
) -> list[_Part] | None:
    """The packet's element; None: it cannot have one (``-EINVAL``), so it is not in the set."""
    parts: list[_Part] = []
    for kind, side in zip(kinds, sides, strict=False):
        part = _part(ipset, kind, side == "src", state)
        if part is None:
            return None
        parts.append(part)
    return parts


def _part(ipset: IpSet, kind: str, source: bool, state: PacketState) -> _Part | None:
    packet = state.packet
    if kind in ("ip", "net"):
        address = packet.src if source else packet.dst
        netmask = ipset.header.get("netmask", "") if kind == "ip" else ""
        if netmask:
            address = ip_network(f"{address}/{netmask}", strict=False).network_address
        return _Part(kind, source, address=address, text=str(address))
    if kind in ("port", "bare-port"):
        return _port_part(kind, source, packet)
    if kind == "iface":
        name = state.in_iface if source else state.out_iface
        if source and state.bridged and state.hook is Hook.POSTROUTING:
            # br_nf_post_routing() names no input interface; ip_output() does.
            name = ""
        return _Part(kind, source, text=name) if name else None
    if kind == "mark":
        mask = int(ipset.header.get("markmask", "0xffffffff"), 0)
        return _Part(kind, source, text=str(packet.mark & mask))
    if kind in ("src-mac", "maybe-mac") and not source:
        return None
    if not state.in_iface:
        return None
    known = source and packet.src_mac is not None
    missing = "" if known else "the frame's MAC address is not known"
    return _Part(kind, source, text=(packet.src_mac or "") if source else "", missing=missing)


def _port_part(kind: str, source: bool, packet: Packet) -> _Part | None:
    """get_port(): ICMP's type and code count as a port; other protocols have port 0."""
    if packet.fragment:
        return None
    protocol = packet.protocol
    if kind == "bare-port" and protocol not in (Protocol.TCP, Protocol.UDP):
        return None
    number: int | None = 0
    if protocol in _PORT_PROTOCOLS:
        number = packet.sport if source else packet.dport
    elif protocol in (Protocol.ICMP, Protocol.ICMPV6):
        number = None
        if packet.icmp_type is not None and packet.icmp_code is not None:
            number = packet.icmp_type << 8 | packet.icmp_code
    if number is None:
        side = "source" if source else "destination"
        return _Part(kind, source, port=(protocol, -1), missing=f"the {side} port is not known")
    return _Part(kind, source, port=(protocol, number), text=f"{protocol}:{number}")


def _entry(parts: list[_Part], entry: IpSetEntry) -> tuple[Answer, tuple[int, ...]]:
    """Does the packet's element meet this entry, and how long are the entry's prefixes.

    Longer prefixes are tried first, the first part's before the last part's.
    """
    doubt = ""
    lengths: list[int] = []
    texts = [*entry.parts, *[""] * (len(parts) - len(entry.parts))]
    for part, text in zip(parts, texts, strict=True):
        answer = _COMPARE[part.kind](part, text, entry, lengths)
        if answer is NO:
            return NO, ()
        if answer.kind is Ternary.UNKNOWN:
            doubt = doubt or answer.reason
    return (unknown(doubt) if doubt else YES), tuple(lengths)


def _same_address(part: _Part, text: str, entry: IpSetEntry, lengths: list[int]) -> Answer:
    if text == part.text:
        return YES
    if "/" not in text and "-" not in text:
        return YES if ip_address(text) == part.address else NO
    return _within_net(part, text, entry, lengths)


def _within_net(part: _Part, text: str, entry: IpSetEntry, lengths: list[int]) -> Answer:
    assert part.address is not None
    network = ip_network(text, strict=False)
    lengths.append(network.prefixlen)
    return YES if part.address in network else NO


def _same_port(part: _Part, text: str, entry: IpSetEntry, lengths: list[int]) -> Answer:
    assert part.port is not None
    protocol, number = parse_port(text)
    if part.kind == "port" and protocol != part.port[0]:
        return NO
    if part.missing:
        return unknown(part.missing)
    return YES if number == part.port[1] else NO


def parse_port(text: str) -> PortKey:
    """``tcp:80``, ``icmp:echo-request``, ``icmp:3/1``, ``gre:0`` or ``80``.

    Raises `ValueError`.
    """
    name, colon, rest = text.rpartition(":")
    protocol = protocol_number_of(name) if colon else Protocol.TCP
    if protocol in (Protocol.ICMP, Protocol.ICMPV6):
        names = ICMP_TYPES if protocol == Protocol.ICMP else ICMP6_TYPES
        if rest in names:
            kind, code = names[rest]
            return protocol, kind << 8 | (code or 0)
        kind_text, _, code_text = rest.partition("/")
        return protocol, int(kind_text) << 8 | int(code_text or 0)
    return protocol, int(rest)


def _same_iface(part: _Part, text: str, entry: IpSetEntry, lengths: list[int]) -> Answer:
    if text.startswith("physdev:"):
        return unknown(f"{text} of a bridge")
    if "wildcard" in entry.text.split():
        return YES if part.text.startswith(text) else NO
    return YES if part.text == text else NO


def _same_mark(part: _Part, text: str, entry: IpSetEntry, lengths: list[int]) -> Answer:
    return YES if int(text, 0) == int(part.text) else NO


def _same_mac(part: _Part, text: str, entry: IpSetEntry, lengths: list[int]) -> Answer:
    if not text and part.kind == "maybe-mac":
        return YES
    if part.missing:
        return unknown(part.missing)
    return YES if text.lower() == part.text else NO


_COMPARE: Final[Mapping[str, Callable[[_Part, str, IpSetEntry, list[int]], Answer]]] = {
    "ip": _same_address,
    "net": _within_net,
    "port": _same_port,
    "bare-port": _same_port,
    "iface": _same_iface,
    "mark": _same_mark,
    "mac": _same_mac,
    "src-mac": _same_mac,
    "maybe-mac": _same_mac,
}


def element_of(
    ipset: IpSet, sides: tuple[str, ...], state: PacketState
) -> tuple[str, ...] | Unavailable | None:
    """The element that SET would add or delete for this packet, as this module spells it.

    None: the packet has none.  `Unavailable`: it hangs on something that is not known.
    """
    kinds = DIMENSIONS.get(ipset.type)
    if kinds is None or not _PLAIN.issuperset(kinds):
        return Unavailable(reason=f"what SET does to a set of type {ipset.type} is not modelled")
    if len(sides) < len(kinds):
        return None
    parts = _parts(ipset, kinds, sides, state)
    if parts is None:
        return None
    for part in parts:
        if part.missing:
            return Unavailable(reason=part.missing)
    return tuple(part.text for part in parts)


def _changed(
    ipset: IpSet, kinds: tuple[str, ...], parts: list[_Part], state: PacketState
) -> Answer | None:
    """What this packet's own changes to the set say; None: nothing."""
    answer: Answer | None = None
    for change in state.sets:
        if change.name != ipset.name:
            continue
        if not change.element:
            return unknown(f"what this packet changed in set {ipset.name}")
        if any(part.missing for part in parts):
            return unknown(next(part.missing for part in parts if part.missing))
        if change.element == tuple(part.text for part in parts):
            answer = YES if change.add else NO
    return answer
