"""IPv4 routing tables: fib_lookup, fib_table_lookup and the choice among next hops."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from ipaddress import IPv4Address

from gketrace.packet import IPAddress
from gketrace.simulate.evolve import evolve
from gketrace.simulate.fib.multipath import shares
from gketrace.simulate.fib.rules import Flow, RuleOutcome, RuleTable
from gketrace.simulate.fib.saddr4 import select_address
from gketrace.simulate.fib.table import Hit, PrefixIndex, group_tables
from gketrace.simulate.fib.view import NetView, NotKnown, scope_number
from gketrace.simulate.state import CERTAIN
from gketrace.snapshot import Link, NextHop, PolicyRule, Route, RouteType

__all__ = ["Choice", "Ipv4Tables", "hop_text"]

LOCAL, MAIN, DEFAULT = 255, 254, 253
RT_TOS_MASK = 0x1C

ROUTE_ERROR = {
    RouteType.BLACKHOLE: "EINVAL",
    RouteType.UNREACHABLE: "EHOSTUNREACH",
    RouteType.PROHIBIT: "EACCES",
    RouteType.NAT: "EINVAL",
}
"""fib_props (net/ipv4/fib_semantics.c), without THROW, which means "ask the next rule"."""


@dataclass(slots=True)
class Choice:
    """One next hop that the kernel may choose."""

    route: Route
    hop: NextHop
    chance: Fraction | None = CERTAIN
    because: str = ""
    gateway: IPAddress | None = None


class Ipv4Tables:
    """The IPv4 routing tables and rules of one namespace."""

    def __init__(self, view: NetView) -> None:
        self.view = view

    @cached_property
    def routes(self) -> dict[int, list[Route]]:
        return group_tables(self.view.routes, 4)

    @cached_property
    def rules(self) -> RuleTable:
        return RuleTable(self.view, 4)

    @cached_property
    def _plain(self) -> bool:
        return self.rules.plain()

    @cached_property
    def custom_local(self) -> bool:
        """netns_ipv4.fib_has_custom_local_routes, as far as routes that are still there tell."""
        return any(
            route.type is RouteType.LOCAL and route.protocol != 2
            for routes in self.routes.values()
            for route in routes
        )

    @cached_property
    def custom(self) -> bool:
        """True: rules or local routes are known to have been changed by hand."""
        return not self._plain or self.custom_local

    @cached_property
    def _indexes(self) -> dict[int, PrefixIndex[Route]]:
        return {table: _index(routes) for table, routes in self.routes.items()}

    @cached_property
    def _merged(self) -> PrefixIndex[Route]:
        """local and main as one trie (fib_trie_table with an alias), local first."""
        return _index([*self.routes.get(LOCAL, ()), *self.routes.get(MAIN, ())])

    def table(self, table: int, flow: Flow, *, ignore_linkstate: bool = False) -> Hit | None:
        index = self._indexes.get(table)
        return None if index is None else self._search(index, flow, ignore_linkstate)

    def lookup(self, flow: Flow, *, ignore_linkstate: bool = False) -> list[RuleOutcome]:
        """fib_lookup.  More than one outcome only where something is not known."""

        def look_up(table: int) -> Hit | None:
            return self.table(table, flow, ignore_linkstate=ignore_linkstate)

        outcomes = self.rules.resolve(flow, look_up, self._kept)
        if not self._plain:
            return outcomes
        # Until a rule is added or deleted for the first time, the kernel keeps local and main in
        # one trie and asks that.  Whether it ever happened is not shown; it rarely matters.
        split = outcomes[0]
        hit = split.hit
        if (
            hit is not None
            and not hit.error
            and (hit.prefixlen == 32 or not (hit.route and hit.route.table == LOCAL))
        ):
            return outcomes
        merged = self._search(self._merged, flow, ignore_linkstate)
        if merged is None and DEFAULT in self._indexes:
            merged = look_up(DEFAULT)
        if _same(merged, hit):
            return outcomes
        rule = next((r for r in self.rules.rules if merged and r.table == merged.table), None)
        return [
            RuleOutcome(
                hit=merged,
                rule=rule,
                assumptions=("if no policy rule was ever changed: local and main are one trie",),
            ),
            evolve(split, assumptions=("if a policy rule was changed before",)),
        ]

    def _kept(self, rule: PolicyRule, hit: Hit) -> Hit | None:
        """fib4_rule_suppress; of a multipath route the first next hop's device counts."""
        if rule.suppress_prefixlength is not None and hit.prefixlen <= rule.suppress_prefixlength:
            return None
        if rule.suppress_ifgroup is None or hit.route is None or not hit.route.next_hops:
            return hit
        group = self.view.device(hit.route.next_hops[0]).group
        return None if group == rule.suppress_ifgroup else hit

    def _search(self, index: PrefixIndex[Route], flow: Flow, ignore_linkstate: bool) -> Hit | None:
        tos = flow.tos & RT_TOS_MASK
        for routes in index.matches(flow.dst):
            for route in routes:
                if route.tos and route.tos != tos:
                    continue
                if flow.scope and scope_number(route.scope) < flow.scope:
                    continue
                if route.type is RouteType.THROW:
                    return None
                length = route.dst.prefixlen
                error = ROUTE_ERROR.get(route.type)
                if error is not None:
                    return Hit(route, None, error, length, route.table)
                for hop in route.next_hops:
                    if self._good(hop, flow.oif, ignore_linkstate):
                        return Hit(route, hop, "", length, route.table)
        return None

    def _good(self, hop: NextHop, oif: str, ignore_linkstate: bool) -> bool:
        """fib_lookup_good_nhc."""
        flags = hop.flags
        if flags:
            if "dead" in flags:
                return False
            if "linkdown" in flags and not ignore_linkstate and self.ignores_linkdown(hop):
                return False
        return not oif or self.view.device(hop).name == oif

    def ignores_linkdown(self, hop: NextHop) -> bool:
        name = self.view.device(hop).name
        return bool(self.view.conf(4, name, "ignore_routes_with_linkdown"))

    def uses_device(self, route: Route | None, ifindex: int) -> bool:
        """fib_info_nh_uses_dev."""
        return route is not None and any(hop.oif == ifindex for hop in route.next_hops)

    def choices(self, hit: Hit, source: int) -> list[Choice]:
        """fib_select_multipath: each next hop that the hash can choose.  `source`: 0 for none."""
        route, first = hit.route, hit.hop
        if route is None or first is None:
            return []
        if len(route.next_hops) < 2:
            return [Choice(route, first)]
        alive = tuple(
            hop
            for hop in route.next_hops
            if "dead" not in hop.flags
            and not ("linkdown" in hop.flags and self.ignores_linkdown(hop))
        )
        known = not self.view.sysctl("net.ipv4.fib_multipath_use_neigh", 0)
        if source and known:
            # Since 6.15 a next hop whose own source address it is comes first; older kernels
            # only hash.  Which of the two this kernel does is not in the snapshot.
            scope = scope_number(route.scope)
            mine = [
                hop
                for hop in alive
                if (own := self.hop_source(hop, scope)) is not None and int(own) == source
            ]
            known = len(mine) in (0, len(alive))
        return [
            Choice(route, hop, share if known else None, f"multipath: {hop_text(self.view, hop)}")
            for hop, share in shares(alive)
        ] or [Choice(route, first)]

    def default_choices(self, hit: Hit) -> list[Choice]:
        """fib_select_default: among equal default routes by the state of their gateways."""
        route, first = hit.route, hit.hop
        if route is None or first is None:
            return []
        plain = [Choice(route, first)]
        gateway = first.gateway
        if route.dst.prefixlen or route.type is not RouteType.UNICAST or gateway is None:
            return plain
        equal = [
            other
            for other in self.routes.get(hit.table, ())
            if other.dst.prefixlen == 0
            and (other.tos, other.priority) == (route.tos, route.priority)
            and other.type is RouteType.UNICAST
            and other.scope == route.scope
            and other.next_hops[0].gateway is not None
            and "dead" not in other.next_hops[0].flags
        ]
        if len(equal) < 2 or equal[0] is not route or first.oif is None:
            return plain
        neighbour = self.view.neighbour_of.get((first.oif, gateway))
        if neighbour is None or neighbour.state == "REACHABLE":
            return plain
        text = f"several default routes; the gateway {gateway} is {neighbour.state}"
        return [Choice(other, other.next_hops[0], None, text) for other in equal]

    def hop_source(self, hop: NextHop, scope: int) -> IPAddress | None:
        """fib_info_update_nhc_saddr: the source that goes with a next hop."""
        gateway = hop.gateway
        if gateway is None:
            dst = 0
        elif gateway.version == 4:
            dst = int(gateway)
        else:
            dst = int(gateway) >> 96  # the kernel reads the union's first four bytes
        return select_address(self.view, self.view.device(hop), dst, scope)

    def prefsrc(self, route: Route, hop: NextHop) -> IPAddress | None:
        """fib_result_prefsrc; None: the kernel would send from 0.0.0.0."""
        if route.prefsrc is not None:
            return route.prefsrc
        return self.hop_source(hop, scope_number(route.scope))

    def with_gateways(self, choices: list[Choice]) -> list[Choice]:
        """Each choice with who gets the packet next; two where that is not known.

        A gateway that was an address of this namespace when the route was made has given a next
        hop of scope host, which rt_set_nexthop does not take for a gateway: the destination is
        then asked for on the link.  That scope is not shown, so such a gateway gives both ways.
        """
        result: list[Choice] = []
        for choice in choices:
            gateway = choice.hop.gateway
            direct = gateway is None or gateway.version == 6 or "onlink" in choice.hop.flags
            if not direct and gateway is not None:
                hit = self.table(LOCAL, Flow(family=4, dst=int(gateway)))
                direct = not _is_local(hit)
            if direct:
                result.append(evolve(choice, gateway=gateway))
                continue
            text = f"the gateway {gateway} was this namespace's own when the route was made"
            because = f"{choice.because}; " if choice.because else ""
            result += [
                evolve(choice, gateway=None, chance=None, because=f"{because}if {text}"),
                evolve(choice, gateway=gateway, chance=None, because=f"{because}unless {text}"),
            ]
        return result

    def owner(self, address: int) -> Link | None:
        """__ip_dev_find(net, addr, false): the device that owns an address."""
        own = self.view.own.get(IPv4Address(address))
        if own is not None:
            return self.view.link_by_index.get(own.ifindex)
        hit = self.local(address)
        if not _is_local(hit):
            return None
        return self.view.device(hit.hop) if hit is not None and hit.hop is not None else None

    def local(self, address: int) -> Hit | None:
        """What the local table alone says of an address, when it makes it local or broadcast.

        Raises `NotKnown` where main, in one trie with it, would say something else.
        """
        flow = Flow(family=4, dst=address)
        hit = self.table(LOCAL, flow)
        if hit is not None and (hit.error or hit.route is None):
            hit = None
        if not self._plain or hit is None or hit.prefixlen == 32:
            return hit
        merged = self._search(self._merged, flow, False)
        if merged is not None and merged.route is not None and merged.route.table != LOCAL:
            raise NotKnown(
                f"whether {IPv4Address(address)} counts as local hangs on whether policy rules "
                "were ever changed in this namespace, which the kernel does not show"
            )
        return hit


def _is_local(hit: Hit | None) -> bool:
    return hit is not None and hit.route is not None and hit.route.type is RouteType.LOCAL


def hop_text(view: NetView, hop: NextHop) -> str:
    via = f"{hop.gateway} " if hop.gateway is not None else ""
    return f"{via}dev {view.device(hop).name}"


def _index(routes: list[Route]) -> PrefixIndex[Route]:
    index = PrefixIndex(32, ((int(r.dst.network_address), r.dst.prefixlen, r) for r in routes))
    index.sort(lambda route: (-route.table, -route.tos, route.priority))
    return index


def _same(a: Hit | None, b: Hit | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.route is b.route and a.hop is b.hop and a.error == b.error
