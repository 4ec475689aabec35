from __future__ import annotations

from ipaddress import ip_address, ip_network

from gketrace.snapshot import NextHop, Route, RouteType
from gketrace_agent.observe.links import observe_links
from gketrace_agent.observe.routes import observe_routes
from tests.agent.observe.bed import Bed, Netns
from tests.agent.observe.conftest import World


def read(netns: Netns) -> tuple[Route, ...]:
    return netns.read(
        lambda reader: observe_routes(reader, observe_links(reader, netns.ref()).name)
    )


def printed(netns: Netns) -> list[str]:
    """What ip prints, a line for each route: next hops are on lines of their own."""
    text = netns.ip("-4", "route", "show", "table", "all")
    text += netns.ip("-6", "route", "show", "table", "all")
    return [" ".join(line.split()) for line in text.replace("\n\t", " ").splitlines()]


def test_every_route_of_a_node_reads_as_ip_prints_it(world: World) -> None:
    for netns in (world.node, world.bridged, world.ptp):
        assert [route.text for route in read(netns)] == printed(netns)


def test_routes_of_every_kind_read_as_ip_prints_them(bed: Bed) -> None:
    netns = bed.netns("routes")
    netns.batch(
        "link add eth0 type veth peer name far-eth0",
        "link set far-eth0 up",
        "link set eth0 up",
        "link add eth1 type veth peer name far-eth1",
        "link set far-eth1 up",
        "link set eth1 up",
        "addr add 10.0.0.1/24 dev eth0",
        "addr add 10.0.1.1/24 dev eth1",
        "addr add fd00::1/64 dev eth0 nodad",
        "addr add fd01::1/64 dev eth1 nodad",
        "route add default via 10.0.0.254 metric 100 proto dhcp src 10.0.0.1",
        "route add 10.1.0.0/16 via 10.0.0.2 mtu 1400 advmss 1360 table 100",
        "route add 10.2.0.0/16 via 10.0.0.2 mtu lock 1300 rtt 300ms rto_min 40ms quickack 1",
        "route add 10.3.0.0/16 nexthop via 10.0.0.3 weight 3 nexthop via 10.0.1.3 weight 2",
        "route add 10.4.0.0/16 via 10.9.9.9 dev eth0 onlink proto 66",
        "route add 10.5.0.0/16 via inet6 fe80::5 dev eth0",
        "route add blackhole 10.6.0.0/16",
        "route add unreachable 10.7.0.0/16 metric 7",
        "route add prohibit 10.8.0.0/16",
        "route add throw 10.9.0.0/16 table 100",
        "route add local 35.231.121.11 dev eth0 proto 66 table local",
        "route add 10.10.0.0/16 tos 0x10 dev eth0 realm 4/5",
        "route add 10.11.0.0/16 dev eth0 congctl reno initcwnd 20 features ecn window 9000",
        "route add 10.12.0.0/16 dev eth0 table 4000000000 scope site",
        "nexthop add id 7 via 10.0.0.7 dev eth0",
        "nexthop add id 8 via 10.0.1.8 dev eth1",
        "nexthop add id 9 group 7,3/8",
        "route add 10.13.0.0/16 nhid 7",
        "route add 10.14.0.0/16 nhid 9",
        "route add default via fd00::fe metric 512",
        "route add fd02::/64 from fd01::/64 via fd00::2",
        "route add fd03::/64 nexthop via fd00::3 weight 2 nexthop via fd01::3",
        "route add unreachable fd04::/64",
        "route add blackhole fd05::/64",
        "route add fd06::/64 via fd00::6 mtu 1300 pref high expires 10000",
        "route add fd07::/64 dev eth1 table 200 proto static",
    )
    netns.ip("link", "set", "eth1", "down")
    netns.ip("link", "set", "eth1", "up")
    routes = read(netns)
    assert [route.text for route in routes] == printed(netns)
    assert len(routes) > 40


def test_a_route_has_its_fields(bed: Bed) -> None:
    netns = bed.netns("fields")
    netns.batch(
        "link add eth0 type veth peer name far-eth0",
        "link set far-eth0 up",
        "link set eth0 up",
        "addr add 10.0.0.1/24 dev eth0",
        "route add 10.1.0.0/16 via 10.0.0.2 mtu 1400 table 1000 metric 5 proto 66 src 10.0.0.1",
        "route add 10.3.0.0/16 nexthop via 10.0.0.3 weight 3 nexthop via 10.0.0.4 onlink dev eth0",
        "route add prohibit default table 9",
    )
    (eth0,) = (link["ifindex"] for link in netns.json("ip", "-j", "link", "show", "eth0"))
    routes = {str(route.dst): route for route in read(netns)}
    assert routes["10.1.0.0/16"] == Route(
        family=4,
        table=1000,
        dst=ip_network("10.1.0.0/16"),
        type=RouteType.UNICAST,
        next_hops=(NextHop(oif=eth0, gateway=ip_address("10.0.0.2")),),
        priority=5,
        scope="global",
        protocol=66,
        prefsrc=ip_address("10.0.0.1"),
        mtu=1400,
        text="10.1.0.0/16 via 10.0.0.2 dev eth0 table 1000 proto 66 src 10.0.0.1 metric 5 mtu 1400",
    )
    assert routes["10.3.0.0/16"].next_hops == (
        NextHop(oif=eth0, gateway=ip_address("10.0.0.3"), weight=3),
        NextHop(oif=eth0, gateway=ip_address("10.0.0.4"), weight=1, flags=("onlink",)),
    )
    assert routes["0.0.0.0/0"].type is RouteType.PROHIBIT
    assert routes["0.0.0.0/0"].next_hops == ()


def test_what_is_read_again_has_the_names_of_now(bed: Bed) -> None:
    netns = bed.netns("again")
    no_ipv6 = "sysctl", "-q", "-w", "net.ipv6.conf.default.disable_ipv6=1"
    netns.run(*no_ipv6)  # its routes come a moment later
    netns.batch(
        "link add eth0 type veth peer name far",
        "link set eth0 up",
        "link set far up",
        "addr add 10.0.0.1/24 dev eth0",
        "route add 10.1.0.0/16 nexthop via 10.0.0.2 nexthop via 10.0.0.3",
        "route add unreachable 10.2.0.0/16",
    )
    first = read(netns)
    assert all(one is other for one, other in zip(read(netns), first, strict=True))
    netns.batch(
        "link set eth0 name moved",
        "route change 10.1.0.0/16 nexthop via 10.0.0.2 weight 2 nexthop via 10.0.0.4",
    )
    assert [route.text for route in read(netns)] == printed(netns)
    other = bed.netns("other")  # where the same number is another's
    other.run(*no_ipv6)
    other.batch("link add lan0 type veth peer name far0", "link set lan0 up", "link set far0 up")
    other.batch("addr add 10.0.0.1/24 dev lan0", "route add unreachable 10.2.0.0/16")
    assert [route.text for route in read(other)] == printed(other)
