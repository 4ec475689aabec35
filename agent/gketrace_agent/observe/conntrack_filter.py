"""Which connection-tracking entries are wanted: the part that the kernel filters, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gketrace import conntrack_filter
from gketrace.conntrack import ConntrackEntry
from gketrace.errors import UsageError
from gketrace.packet import PORT_PROTOCOLS, IPAddress
from gketrace.snapshot import IPNetwork
from gketrace_agent.kernel.conntrack_layout import STATES
from gketrace_agent.kernel.conntrack_request import KernelFilter, TupleFilter

if TYPE_CHECKING:  # NumPy takes 0.1 s to import; only bulk reading needs it
    from gketrace_agent.kernel.conntrack_columns import Array, Group

__all__ = ["ConntrackFilter", "ConntrackFilters"]

_STATES: Final = frozenset(state for states in STATES.values() for state in states)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackFilter(conntrack_filter.ConntrackFilter):
    """What the kernel is asked for, and what is left to us; see the fields' descriptions there."""

    def __post_init__(self) -> None:
        if self.tcp_state and self.tcp_state not in _STATES:
            raise UsageError(
                f"no such state: {self.tcp_state!r}", hint="one of " + ", ".join(sorted(_STATES))
            )

    def kernel(self) -> tuple[KernelFilter, ...]:
        """What to ask the kernel for: whole addresses, not prefixes.

        One dump, but four for `address`: the kernel compares each of an entry's addresses by
        itself.  To walk the table four times costs it less than to send it once.
        """
        nats = (self.src_nat, self.dst_nat)
        given = [n for n in (*self.networks(), *nats, self.address) if n is not None]
        family = self.family or (given[0].version if given else 0)
        halves = (
            TupleFilter(
                src=_host(self.orig_src),
                dst=_host(self.orig_dst),
                sport=self.orig_sport,
                dport=self.orig_dport,
            ),
            TupleFilter(
                src=_host(self.reply_src) or _host(self.dst_nat),
                dst=_host(self.reply_dst) or _host(self.src_nat),
                sport=self.reply_sport if self.reply_sport is not None else self.dst_nat_port,
                dport=self.reply_dport if self.reply_dport is not None else self.src_nat_port,
            ),
        )
        ways = [halves]
        any_of = _host(self.address)
        if any_of is not None and any_of.version == 4:
            ways = list(_somewhere(halves, any_of))
        return tuple(
            KernelFilter(
                family=family,
                protocol=self.protocol,
                orig=orig,
                reply=reply,
                mark=self.mark,
                mark_mask=self.mark_mask,
                status=self.status | self.nat_bits(),
                status_mask=self.status_mask | self.nat_bits(),
            )
            for orig, reply in ways
        )

    def mask(self, group: Group) -> Array | None:
        """What `takes` says of each row; None: all are wanted."""
        import numpy as np

        layout = group.layout
        if (self.family and self.family != layout.family) or self.protocol not in (
            None,
            layout.protocol,
        ):
            return np.zeros(len(group), bool)
        parts: list[Array] = []
        ports = (self.orig_sport, self.orig_dport, self.reply_sport, self.reply_dport)
        for wanted, name in zip(ports, _PORTS, strict=True):
            if wanted is not None:
                parts.append(_port(group, name) == wanted)
        if self.zone is not None:
            parts.append(_number(group, "zone") == self.zone)
        if self.mark is not None:
            parts.append(_number(group, "mark") & np.uint32(self.mark_mask) == self.mark)
        if self.status_mask:
            parts.append(_number(group, "status") & np.uint32(self.status_mask) == self.status)
        if self.tcp_state:
            parts.append(_in_state(group, self.tcp_state))
        for network, name in zip(self.networks(), _ADDRESSES, strict=True):
            if network is not None:
                parts.append(_inside(group, name, network))
        if bits := self.nat_bits():
            parts.append(_number(group, "status") & np.uint32(bits) == bits)
            parts += self._nat_parts(group)
        if self.address is not None:
            ends = [_inside(group, name, self.address) for name in _ADDRESSES]
            parts.append(np.logical_or.reduce(ends))
        return np.logical_and.reduce(parts) if parts else None

    def _nat_parts(self, group: Group) -> list[Array]:
        parts: list[Array] = []
        for network, new, old in (
            (self.src_nat, "reply_dst", "orig_src"),
            (self.dst_nat, "reply_src", "orig_dst"),
        ):
            if network is not None:
                parts.append(_inside(group, new, network))
                parts.append((group.octets(new) != group.octets(old)).any(axis=1))
        for port, new, old in (
            (self.src_nat_port, "reply_dport", "orig_sport"),
            (self.dst_nat_port, "reply_sport", "orig_dport"),
        ):
            if port is not None:
                now = _port(group, new)
                parts += [now == port, now != _port(group, old)]
        return parts


@dataclass(frozen=True, slots=True)
class ConntrackFilters:
    """Any one of them takes an entry."""

    filters: Sequence[ConntrackFilter] = (ConntrackFilter(),)
    among: Callable[[], frozenset[IPAddress]] | None = None
    """What the caller may see: only entries with one of these addresses, as they are then, are
    taken, counted or told of; None: all."""

    def kernel(self) -> tuple[KernelFilter, ...]:
        asked = (one for wanted in self.filters for one in wanted.kernel())
        return tuple(dict.fromkeys(asked))

    def takes(self, entry: ConntrackEntry) -> bool:
        if self.among is not None:
            halves = (entry.orig, entry.reply)
            if self.among().isdisjoint(end for one in halves for end in (one.src, one.dst)):
                return False
        return any(wanted.takes(entry) for wanted in self.filters)

    def mask(self, group: Group) -> Array | None:
        own = None if self.among is None else _touches(group, self.among())
        total: Array | None = None
        for wanted in self.filters:
            which = wanted.mask(group)
            if which is None:
                return own
            total = which if total is None else total | which
        return total if total is None or own is None else total & own


_ADDRESSES: Final = ("orig_src", "orig_dst", "reply_src", "reply_dst")
_PORTS: Final = ("orig_sport", "orig_dport", "reply_sport", "reply_dport")


def _somewhere(
    halves: tuple[TupleFilter, TupleFilter], address: IPAddress
) -> list[tuple[TupleFilter, TupleFilter]]:
    orig, reply = halves

    def with_src(half: TupleFilter) -> TupleFilter:
        return TupleFilter(src=address, dst=half.dst, sport=half.sport, dport=half.dport)

    def with_dst(half: TupleFilter) -> TupleFilter:
        return TupleFilter(src=half.src, dst=address, sport=half.sport, dport=half.dport)

    return [
        (with_src(orig), reply),
        (with_dst(orig), reply),
        (orig, with_src(reply)),
        (orig, with_dst(reply)),
    ]


def _host(network: IPNetwork | None) -> IPAddress | None:
    if network is None or network.prefixlen != network.max_prefixlen:
        return None
    return network.network_address


def _number(group: Group, name: str) -> Array:
    """The column, or zeros where the kernel sends none."""
    import numpy as np

    return group.column(name) if name in group else np.zeros(len(group), np.uint32)


def _port(group: Group, name: str) -> Array:
    """A port, or ICMP's identifier where an entry has it as its source port."""
    import numpy as np

    if name in group and group.layout.protocol in PORT_PROTOCOLS:
        return group.column(name)
    half, _, which = name.partition("_")
    if which == "sport" and f"{half}_icmp_id" in group:
        return group.column(f"{half}_icmp_id")
    return np.full(len(group), -1, np.int64)


def _in_state(group: Group, state: str) -> Array:
    import numpy as np

    for name, states in STATES.items():
        if name in group and state in states:
            same: Array = group.column(name) == states.index(state)
            return same
    return np.zeros(len(group), bool)


def _touches(group: Group, addresses: frozenset[IPAddress]) -> Array:
    """Which rows have one of `addresses`, in any place."""
    import numpy as np

    total = np.zeros(len(group), bool)
    for name in _ADDRESSES:
        octets = np.ascontiguousarray(group.octets(name))
        size = octets.shape[1]
        # As byte strings of one length: equal when all their bytes are.
        kind = np.dtype(f"S{size}")
        known = [one.packed for one in addresses if len(one.packed) == size]
        total |= np.isin(octets.view(kind).ravel(), np.array(known, kind))
    return total


def _inside(group: Group, name: str, network: IPNetwork) -> Array:
    import numpy as np

    octets = group.octets(name)
    if octets.shape[1] != network.max_prefixlen // 8:
        return np.zeros(len(group), bool)
    full, rest = divmod(network.prefixlen, 8)
    wanted = np.frombuffer(network.network_address.packed, np.uint8)
    same: Array = (octets[:, :full] == wanted[:full]).all(axis=1)
    if rest:
        bits = np.uint8(0xFF << (8 - rest) & 0xFF)
        same &= octets[:, full] & bits == wanted[full]
    return same
