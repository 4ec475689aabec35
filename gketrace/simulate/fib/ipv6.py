"""IPv6 routing tables: fib6_table_lookup, rt6_select, fib6_select_path (net/ipv6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv6Address

from gketrace.simulate.evolve import evolve
from gketrace.simulate.fib.ipv4 import Choice
from gketrace.simulate.fib.multipath import shares
from gketrace.simulate.fib.rules import Flow, RuleOutcome, RuleTable
from gketrace.simulate.fib.table import Hit, PrefixIndex, group_tables
from gketrace.simulate.fib.view import LOOPBACK, NetView
from gketrace.snapshot import NextHop, PolicyRule, Route, RouteType

__all__ = ["Ipv6Tables", "hop_text6"]

PROTOCOL_KERNEL = 2
"""RTPROT_KERNEL."""

ROUTE_ERROR = {
    RouteType.BLACKHOLE: "EINVAL",
    RouteType.UNREACHABLE: "EHOSTUNREACH",
    RouteType.PROHIBIT: "EACCES",
    RouteType.THROW: "EAGAIN",
    RouteType.NAT: "EINVAL",
}
"""fib6_prop (net/ipv6/route.c)."""

_USABLE_NEIGHBOUR = frozenset(
    {"REACHABLE", "STALE", "DELAY", "PROBE", "PERMANENT", "NOARP", "INCOMPLETE", "NONE", ""}
)


@dataclass(slots=True)
class _Leaf:
    """One next hop of one route: what the kernel keeps as a fib6_info."""

    route: Route
    hop: NextHop


class Ipv6Tables:
    """The IPv6 routing tables and rules of one namespace."""

    def __init__(self, view: NetView) -> None:
        self.view = view

    @cached_property
    def routes(self) -> dict[int, list[Route]]:
        return group_tables(self.view.routes, 6)

    @cached_property
    def rules(self) -> RuleTable:
        return RuleTable(self.view, 6)

    @cached_property
    def _indexes(self) -> dict[int, PrefixIndex[_Leaf]]:
        return {table: _index(routes) for table, routes in self.routes.items()}

    @cached_property
    def forwarding(self) -> bool:
        return bool(self.view.sysctl("net.ipv6.conf.all.forwarding"))

    def lookup(self, flow: Flow, oif: str, *, strict: bool) -> list[RuleOutcome]:
        """fib6_rule_lookup with ip6_pol_route; `oif` is preferred, or must be if `strict`."""

        def look_up(table: int) -> Hit | None:
            return self.table(table, flow, oif, strict=strict)

        return self.rules.resolve(flow, look_up, self._kept)

    def table(self, table: int, flow: Flow, oif: str, *, strict: bool) -> Hit | None:
        """fib6_table_lookup: with routers known to be unreachable left out first on hosts."""
        index = self._indexes.get(table)
        if index is None:
            return None
        hit = None
        if not self.forwarding:
            hit = self._search(index, flow, oif, strict=strict, reachable=True)
        if hit is None:
            hit = self._search(index, flow, oif, strict=strict, reachable=False)
        return None if hit is not None and hit.error == "EAGAIN" else hit

    def device_match(self, flow: Flow, oif: str, *, strict: bool) -> list[RuleOutcome]:
        """ip6_route_lookup: rules with ip6_pol_route_lookup and rt6_device_match."""

        def look_up(table: int) -> Hit | None:
            index = self._indexes.get(table)
            for leaves in () if index is None else self._nodes(index, flow):
                return self._match_device(leaves, flow, oif, strict)
            return None

        return self.rules.resolve(flow, look_up, self._kept)

    def _match_device(self, leaves: list[_Leaf], flow: Flow, oif: str, strict: bool) -> Hit | None:
        alive = [leaf for leaf in leaves if "dead" not in leaf.hop.flags]
        if not oif and not flow.src:
            return _hit(leaves[0]) if leaves[0] in alive else None
        own = self.view.own.get(IPv6Address(flow.src)) if flow.src else None
        for leaf in alive:
            if (
                self.view.device(leaf.hop).name == oif
                if oif
                else (own is not None and own.ifindex == leaf.hop.oif)
            ):
                return _hit(leaf)
        if oif and strict:
            return None
        return _hit(leaves[0]) if leaves[0] in alive else None

    def _kept(self, rule: PolicyRule, hit: Hit) -> Hit | None:
        """fib6_rule_suppress; of a multipath route the device of the one that the hash took."""
        if rule.suppress_prefixlength is not None and hit.prefixlen <= rule.suppress_prefixlength:
            return None
        if rule.suppress_ifgroup is None or hit.route is None or hit.hop is None:
            return hit
        if self.over_loopback(hit.route):
            return hit if self.view.link(LOOPBACK).group != rule.suppress_ifgroup else None
        spread = hit.spread or (hit.hop,)
        left = tuple(h for h in spread if self.view.device(h).group != rule.suppress_ifgroup)
        if len(left) == len(spread):
            return hit
        return evolve(hit, hop=left[0], spread=left) if left else None

    def over_loopback(self, route: Route) -> bool:
        """Whether packets made here for this route go over the loopback (ip6_rt_get_dev_rcu).

        Anycast routes do if the kernel made them (RTF_ANYCAST); those of a user's do not.
        """
        if route.type is RouteType.ANYCAST:
            return route.protocol == PROTOCOL_KERNEL
        return route.type is RouteType.LOCAL

    def _nodes(self, index: PrefixIndex[_Leaf], flow: Flow) -> Iterator[list[_Leaf]]:
        """The leaves to try, in fib6_node_lookup's order and then fib6_backtrack's.

        A prefix that has source-specific routes is entered through them: while none has been
        entered yet and no source matches, the kernel passes over the prefix's plain routes too,
        except at the root (::/0), where a look-up that found nothing ends.
        """
        entered = False
        for leaves in index.matches(flow.dst):
            if leaves[0].route.src is None:
                entered = True
                yield leaves
                continue
            start = 0
            while start < len(leaves):
                source = leaves[start].route.src
                end = start
                while end < len(leaves) and leaves[end].route.src == source:
                    end += 1
                if source is None:
                    if entered or not leaves[start].route.dst.prefixlen:
                        yield leaves[start:]
                elif not (flow.src ^ int(source.network_address)) >> (128 - source.prefixlen):
                    entered = True
                    yield leaves[start:end]
                start = end

    def _search(
        self, index: PrefixIndex[_Leaf], flow: Flow, oif: str, *, strict: bool, reachable: bool
    ) -> Hit | None:
        for leaves in self._nodes(index, flow):
            hit = self._select(leaves, oif, strict=strict, reachable=reachable)
            if hit is not None:
                return hit
        return None

    def _select(
        self, leaves: list[_Leaf], oif: str, *, strict: bool, reachable: bool
    ) -> Hit | None:
        """rt6_select: the best of the lowest metric; failing that, the best of all the others."""
        metric = leaves[0].route.priority
        end = 0
        while end < len(leaves) and leaves[end].route.priority == metric:
            end += 1
        for part in (leaves[:end], leaves[end:]):
            best: _Leaf | None = None
            score = -1
            for leaf in part:
                value = self._score(leaf, oif, strict=strict, reachable=reachable)
                if value > score:
                    best, score = leaf, value
            if best is not None:
                return _hit(best, self._siblings(best, oif, strict))
        return None

    def _score(self, leaf: _Leaf, oif: str, *, strict: bool, reachable: bool) -> int:
        """find_match with rt6_score_route; -1: not usable."""
        hop = leaf.hop
        if not self._alive(hop):
            return -1
        score = 2 if not oif or self.view.device(hop).name == oif else 0
        if not score and strict:
            return -1
        if reachable and hop.gateway is not None and hop.oif is not None:
            neighbour = self.view.neighbour_of.get((hop.oif, hop.gateway))
            if neighbour is not None and neighbour.state not in _USABLE_NEIGHBOUR:
                return -1
        return score

    def _alive(self, hop: NextHop) -> bool:
        if not hop.flags:
            return True
        if "dead" in hop.flags:
            return False
        if "linkdown" not in hop.flags:
            return True
        name = self.view.device(hop).name
        return not self.view.conf(6, name, "ignore_routes_with_linkdown")

    def _siblings(self, leaf: _Leaf, oif: str, strict: bool) -> tuple[NextHop, ...]:
        """Among whom fib6_select_path chooses; empty: no choice."""
        if len(leaf.route.next_hops) < 2:
            return ()
        return tuple(
            hop
            for hop in leaf.route.next_hops
            if self._alive(hop) and not (strict and oif and self.view.device(hop).name != oif)
        )

    def choices(self, hit: Hit, oif: str) -> list[Choice]:
        """The next hops that the hash can choose, with their shares."""
        if hit.route is None or hit.hop is None:
            return []
        if len(hit.spread) < 2:
            return [Choice(hit.route, hit.hop)]
        # Told an interface, the kernel falls back on the first match where the hash leads astray.
        whole = len(hit.spread) == len([h for h in hit.route.next_hops if self._alive(h)])
        return [
            Choice(
                hit.route,
                hop,
                share if whole and not oif else None,
                f"multipath: {hop_text6(self.view, hop)}",
            )
            for hop, share in shares(hit.spread)
        ]


def hop_text6(view: NetView, hop: NextHop) -> str:
    via = f"{hop.gateway} " if hop.gateway is not None else ""
    return f"{via}dev {view.device(hop).name}"


def _hit(leaf: _Leaf, spread: tuple[NextHop, ...] = ()) -> Hit:
    route = leaf.route
    return Hit(
        route=route,
        hop=leaf.hop,
        error=ROUTE_ERROR.get(route.type, ""),
        prefixlen=route.dst.prefixlen,
        table=route.table,
        spread=spread,
    )


def _index(routes: list[Route]) -> PrefixIndex[_Leaf]:
    index = PrefixIndex(
        128,
        (
            (int(route.dst.network_address), route.dst.prefixlen, _Leaf(route, hop))
            for route in routes
            for hop in route.next_hops
        ),
    )
    index.sort(_order)
    return index


def _order(leaf: _Leaf) -> tuple[int, ...]:
    source = leaf.route.src
    if source is None:
        return (0, 0, leaf.route.priority)
    return (-source.prefixlen, int(source.network_address), leaf.route.priority)
