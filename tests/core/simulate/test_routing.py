"""Routing decisions: one small namespace a test, the exact decision asserted."""

from __future__ import annotations

from fractions import Fraction
from ipaddress import ip_address, ip_network

import pytest

from gketrace.simulate.routing import Fib, RouteDecision, RouteKind
from gketrace.simulate.state import Ternary
from gketrace.snapshot import (
    Address,
    NetnsSnapshot,
    NextHop,
    PolicyAction,
    PolicyRule,
    RouteType,
    Unavailable,
)
from gketrace.trace import Source
from tests.core.simulate.networks import (
    ADDRESSES,
    LINKS,
    ROUTES,
    RULES,
    network,
    packet,
    route,
    sysctls,
)


def one(decisions: tuple[RouteDecision, ...]) -> RouteDecision:
    assert len(decisions) == 1
    return decisions[0]


def output(snapshot: NetnsSnapshot, dst: str, **more: object) -> RouteDecision:
    return one(Fib(snapshot).output(ip_address(dst), **more))  # type: ignore[arg-type]


def received(
    snapshot: NetnsSnapshot, src: str, dst: str, iif: str = "eth0", **more: object
) -> RouteDecision:
    return one(Fib(snapshot).input(packet(src, dst, **more), iif))


class TestOutput:
    def test_longest_prefix_wins_and_the_gateway_selects_the_source(self) -> None:
        near = output(network(), "10.40.0.7")
        assert (near.kind, near.interface, near.next_hop) == (RouteKind.FORWARD, "veth1", None)
        far = output(network(), "203.0.113.10")
        assert (far.interface, far.next_hop) == ("eth0", ip_address("10.142.0.1"))
        assert far.source == ip_address("10.142.0.6")
        assert far.mtu == 1460
        assert [c.source for c in far.citations] == [Source.POLICY_RULE, Source.ROUTE]

    def test_own_address_goes_over_the_loopback(self) -> None:
        decision = output(network(), "10.40.0.1")
        assert (decision.kind, decision.interface) == (RouteKind.LOCAL, "lo")
        assert decision.source == ip_address("10.40.0.1")

    def test_prefsrc_before_the_interface_address(self) -> None:
        routes = (*ROUTES, route("192.0.2.0/24", 2, prefsrc=ip_address("10.40.0.1")))
        assert output(network(routes=routes), "192.0.2.1").source == ip_address("10.40.0.1")

    def test_lower_metric_wins(self) -> None:
        routes = (*ROUTES, route("192.0.2.0/24", 3, priority=20), route("192.0.2.0/24", 2))
        assert output(network(routes=routes), "192.0.2.1").interface == "eth0"

    @pytest.mark.parametrize(
        ("kind", "expected", "errno"),
        [
            (RouteType.UNREACHABLE, RouteKind.UNREACHABLE, "EHOSTUNREACH"),
            (RouteType.BLACKHOLE, RouteKind.BLACKHOLE, "EINVAL"),
            (RouteType.PROHIBIT, RouteKind.PROHIBIT, "EACCES"),
            (RouteType.THROW, RouteKind.NO_ROUTE, "ENETUNREACH"),
        ],
    )
    def test_special_routes(self, kind: RouteType, expected: RouteKind, errno: str) -> None:
        routes = (*ROUTES, route("192.0.2.0/24", kind=kind))
        decision = output(network(routes=routes), "192.0.2.1")
        assert (decision.kind, decision.errno) == (expected, errno)

    def test_foreign_source_is_refused_unless_routed_again(self) -> None:
        decision = output(network(), "203.0.113.10", src=ip_address("192.0.2.9"))
        assert decision.kind is RouteKind.BAD_SOURCE
        again = output(network(), "203.0.113.10", src=ip_address("192.0.2.9"), any_source=True)
        assert (again.kind, again.interface) == (RouteKind.FORWARD, "eth0")

    def test_multipath_by_weight(self) -> None:
        hops = (NextHop(oif=2, weight=3), NextHop(oif=3, weight=1))
        routes = (*ROUTES, route("192.0.2.0/24", next_hops=hops))
        decisions = Fib(network(routes=routes)).output(ip_address("192.0.2.1"))
        assert [(d.interface, d.chance) for d in decisions] == [
            ("eth0", Fraction(3, 4)),
            ("veth1", Fraction(1, 4)),
        ]

    def test_unreadable_routes_are_unknown(self) -> None:
        decision = output(network(routes=Unavailable(reason="EPERM")), "10.40.0.7")
        assert (decision.kind, decision.chance) == (RouteKind.UNKNOWN, None)
        assert "EPERM" in decision.detail

    def test_the_order_of_interfaces_is_not_guessed(self) -> None:
        links = (*LINKS, LINKS[2].__class__(ifindex=4, name="bare", flags=("UP", "LOWER_UP")))
        routes = (*ROUTES, route("192.0.2.0/24", 4))
        values = sysctls(bare__route_localnet=0)
        decision = output(network(links=links, routes=routes, values=values), "192.0.2.1")
        assert decision.kind is RouteKind.UNKNOWN
        assert "in an order that it does not show" in decision.detail


class TestRules:
    def test_mark_chooses_the_table(self) -> None:
        rules = (*RULES, PolicyRule(family=4, priority=74, fwmark=0x4000, fwmask=0x4000, table=7))
        routes = (*ROUTES, route("default", 3, table=7))
        snapshot = network(rules=rules, routes=routes)
        assert output(snapshot, "192.0.2.1", mark=0x4001).interface == "veth1"
        assert output(snapshot, "192.0.2.1", mark=0x1).interface == "eth0"

    def test_not_iif(self) -> None:
        rules = (*RULES, PolicyRule(family=4, priority=76, iif="eth0", invert=True, table=7))
        routes = (*ROUTES, route("default", 2, "10.142.0.1", table=7))
        snapshot = network(rules=rules, routes=routes)
        assert received(snapshot, "10.40.0.7", "10.40.0.9", "veth1").rule == rules[-1]

    def test_suppressed_default_route(self) -> None:
        rule = PolicyRule(family=4, priority=10, table=254, suppress_prefixlength=0)
        other = PolicyRule(family=4, priority=11, action=PolicyAction.PROHIBIT)
        snapshot = network(rules=(*RULES, rule, other))
        assert output(snapshot, "192.0.2.1").kind is RouteKind.PROHIBIT
        assert output(snapshot, "10.40.0.7").interface == "veth1"

    def test_goto_skips(self) -> None:
        rules = (
            *RULES,
            PolicyRule(family=4, priority=10, action=PolicyAction.GOTO, goto=32766),
            PolicyRule(family=4, priority=11, action=PolicyAction.BLACKHOLE),
        )
        assert output(network(rules=rules), "192.0.2.1").kind is RouteKind.FORWARD

    def test_an_unknown_port_gives_both_continuations(self) -> None:
        rule = PolicyRule(family=4, priority=10, dport=(53, 53), action=PolicyAction.PROHIBIT)
        fib = Fib(network(rules=(*RULES, rule)))
        decisions = fib.output(ip_address("192.0.2.1"), protocol=17)
        assert [(d.kind, d.chance) for d in decisions] == [
            (RouteKind.PROHIBIT, None),
            (RouteKind.FORWARD, None),
        ]
        assert decisions[0].because.startswith("if the rule matches")
        decided = fib.output(ip_address("192.0.2.1"), protocol=17, dport=80)
        assert one(decided).chance == 1

    def test_an_unknown_port_that_makes_no_difference(self) -> None:
        rule = PolicyRule(family=4, priority=10, dport=(53, 53), table=254)
        decision = output(network(rules=(*RULES, rule)), "192.0.2.1", protocol=17)
        assert (decision.chance, decision.because) == (1, "")


class TestInput:
    def test_forwarded(self) -> None:
        decision = received(network(), "203.0.113.10", "10.40.0.7")
        assert (decision.kind, decision.interface) == (RouteKind.FORWARD, "veth1")
        assert "net.ipv4.conf.eth0.forwarding = 1" in [c.text for c in decision.citations]

    def test_local(self) -> None:
        decision = received(network(), "203.0.113.10", "10.142.0.6")
        assert (decision.kind, decision.interface) == (RouteKind.LOCAL, "eth0")

    def test_forwarding_off_on_the_input_interface(self) -> None:
        snapshot = network(values=sysctls(eth0__forwarding=0))
        decision = received(snapshot, "203.0.113.10", "10.40.0.7")
        assert decision.kind is RouteKind.NOT_FORWARDING
        assert "net.ipv4.conf.eth0.forwarding = 0" in [c.text for c in decision.citations]

    @pytest.mark.parametrize(("mode", "kind"), [(1, RouteKind.RP_FILTER), (2, RouteKind.FORWARD)])
    def test_rp_filter(self, mode: int, kind: RouteKind) -> None:
        snapshot = network(values=sysctls(all__rp_filter=mode))
        assert received(snapshot, "203.0.113.10", "10.142.0.99", "veth1").kind is kind

    def test_rp_filter_takes_the_greater_of_all_and_interface(self) -> None:
        snapshot = network(values=sysctls(all__rp_filter=1, veth1__rp_filter=2))
        decision = received(snapshot, "203.0.113.10", "10.142.0.99", "veth1")
        assert decision.kind is RouteKind.FORWARD

    def test_own_source_is_a_martian(self) -> None:
        decision = received(network(), "10.40.0.1", "10.40.0.7")
        assert decision.kind is RouteKind.MARTIAN
        allowed = network(values=sysctls(eth0__accept_local=1))
        assert received(allowed, "10.40.0.1", "10.40.0.7").kind is RouteKind.FORWARD

    def test_loopback_needs_route_localnet(self) -> None:
        assert received(network(), "203.0.113.10", "127.0.0.1").kind is RouteKind.MARTIAN
        snapshot = network(values=sysctls(eth0__route_localnet=1))
        assert received(snapshot, "203.0.113.10", "127.0.0.1").kind is RouteKind.LOCAL

    def test_too_long_to_forward(self) -> None:
        args = (network(), "10.40.0.7", "203.0.113.10", "veth1")
        assert received(*args, length=1461).kind is RouteKind.FRAG_NEEDED
        assert received(*args, length=1460).kind is RouteKind.FORWARD
        assert received(*args, length=1461, dont_fragment=False).kind is RouteKind.FORWARD

    def test_ttl_is_used_up(self) -> None:
        assert (
            received(network(), "203.0.113.10", "10.40.0.7", ttl=1).kind is RouteKind.TTL_EXCEEDED
        )

    def test_a_missing_sysctl_that_matters_is_unknown(self) -> None:
        values = sysctls()
        del values["net.ipv4.conf.eth0.forwarding"]
        decision = received(network(values=values), "203.0.113.10", "10.40.0.7")
        assert decision.kind is RouteKind.UNKNOWN
        assert "net.ipv4.conf.eth0.forwarding" in decision.detail
        assert (
            received(network(values=values), "203.0.113.10", "10.142.0.6").kind is RouteKind.LOCAL
        )


class TestNetfilter:
    def test_address_types(self) -> None:
        fib = Fib(network())
        for text, expected in (
            ("10.142.0.6", "local"),
            ("127.3.4.5", "local"),
            ("10.40.0.7", "unicast"),
            ("255.255.255.255", "broadcast"),
            ("224.0.0.1", "multicast"),
        ):
            assert fib.address_type(ip_address(text)) == expected
        assert fib.address_type(ip_address("10.142.0.6"), "veth1") == "unicast"
        assert fib.address_type(ip_address("10.142.0.6"), "eth0") == "local"
        assert Fib(network(routes=Unavailable(reason="x"))).address_type(ip_address("::1")) is None

    def test_reverse_path(self) -> None:
        fib = Fib(network())
        spoofed = packet("203.0.113.10", "10.142.0.6")
        assert fib.reverse_path(spoofed, "eth0") is Ternary.YES
        assert fib.reverse_path(spoofed, "veth1") is Ternary.NO
        assert fib.reverse_path(spoofed, "veth1", loose=True) is Ternary.YES

    def test_masquerade_prefers_the_address_of_the_next_hops_subnet(self) -> None:
        addresses = (
            *ADDRESSES,
            Address(ifindex=2, address=ip_address("192.168.5.2"), prefixlen=24),
        )
        fib = Fib(network(addresses=addresses))
        sent = packet("10.40.0.7", "203.0.113.10")
        assert fib.masquerade_address("eth0", sent, ip_address("10.142.0.1")) == ip_address(
            "10.142.0.6"
        )
        assert fib.masquerade_address("eth0", sent, ip_address("192.168.5.1")) == ip_address(
            "192.168.5.2"
        )

    def test_redirect(self) -> None:
        fib = Fib(network())
        assert fib.redirect_address(4, "") == ip_address("127.0.0.1")
        assert fib.redirect_address(4, "eth0") == ip_address("10.142.0.6")


class TestIpv6:
    LOCAL = route("fd00:1::1/128", 2, table=255, kind=RouteType.LOCAL)
    ROUTES = (
        LOCAL,
        route("fd00:1::/64", 2, priority=256),
        route("fd00:2::/64", 3, "fe80::9", priority=1024),
        route("::/0", 2, "fd00:1::ff", priority=1024),
    )
    ADDRESSES = (
        Address(ifindex=2, address=ip_address("fd00:1::1"), prefixlen=64),
        Address(ifindex=3, address=ip_address("fe80::1"), prefixlen=64, scope="link"),
    )

    def snapshot(self, **more: object) -> NetnsSnapshot:
        more.setdefault("routes", self.ROUTES)
        return network(addresses=self.ADDRESSES, **more)  # type: ignore[arg-type]

    def test_output(self) -> None:
        decision = output(self.snapshot(), "2001:db8::1")
        assert (decision.interface, decision.next_hop) == ("eth0", ip_address("fd00:1::ff"))
        assert decision.source == ip_address("fd00:1::1")

    def test_source_of_a_wider_scope_than_the_links_own(self) -> None:
        assert output(self.snapshot(), "fd00:2::5").source == ip_address("fd00:1::1")

    def test_forwarding(self) -> None:
        decision = received(self.snapshot(), "2001:db8::1", "fd00:2::5")
        assert (decision.kind, decision.interface) == (RouteKind.FORWARD, "veth1")
        off = sysctls() | {"net.ipv6.conf.all.forwarding": "0"}
        decision = received(self.snapshot(values=off), "2001:db8::1", "fd00:2::5")
        assert decision.kind is RouteKind.NOT_FORWARDING

    def test_source_specific_route(self) -> None:
        special = route("fd00:2::/64", 2, "fd00:1::7", src=ip_network("fd00:9::/64"), priority=1024)
        snapshot = self.snapshot(routes=(*self.ROUTES, special))
        assert received(snapshot, "fd00:9::1", "fd00:2::5").interface == "eth0"
        # While no source matches, the kernel passes over the plain route of that prefix too.
        assert received(snapshot, "fd00:8::1", "fd00:2::5").route == self.ROUTES[3]

    def test_address_types(self) -> None:
        fib = Fib(self.snapshot())
        assert fib.address_types(ip_address("fd00:1::1")) == {"local", "unicast"}
        assert fib.address_type(ip_address("fd00:1::1")) == "local"
        assert fib.address_type(ip_address("ff02::1")) == "multicast"
