"""Random nftables rule sets: base chains at random priorities, sets, maps, draws, nat.

Chains belong to one hook, as what a rule may do depends on the hooks that it is reached from.
Values come from the pools of `generate`, so that rules are hit.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.fixtures import Case
from tests.kernel.oracle.generate import ADDRESSES, INSIDE, NETS, PORTS, Generator

__all__ = [
    "ACTIONS",
    "CONDITIONS",
    "NFT_OPEN",
    "TABLE",
    "NftGenerator",
    "NftPart",
    "probe_nft",
    "restore",
]

TABLE = "gkrandom"
_IN = ("prerouting", "input", "forward")
_OUT = ("forward", "output", "postrouting")
_ALL = ("prerouting", "input", "forward", "output", "postrouting")
_PRIORITIES = (
    -310,
    -299,
    -210,
    -199,
    -160,
    -149,
    -110,
    -99,
    -50,
    -1,
    1,
    10,
    49,
    60,
    99,
    110,
    149,
    160,
)
_NAT_HOOKS = ("prerouting", "input", "output", "postrouting")
NFT_OPEN = re.compile(
    r"\b(?:limit|quota|numgen inc|jhash|symhash|skuid|skgid|ct count|meta random|pkttype|cpu"
    r"|meta priority|socket|rt (?:ip6? )?nexthop|ip id|udp length|expiration)\b"
)
"""Rules whose answer rests on what no snapshot shows."""

Write = Callable[[random.Random, int, str], str]
"""(random, family, hook) → text."""


@dataclass(frozen=True, slots=True)
class NftPart:
    """One condition or action that the generator knows to write."""

    name: str
    write: Write
    hooks: tuple[str, ...] = _ALL
    kinds: tuple[str, ...] = ("filter", "route", "nat")
    """Types of base chains."""
    before: int = 1000
    """Only at priorities below this."""
    is_open: bool = False
    """Its answer is not known to anybody but the kernel."""


def _l3(family: int) -> str:
    return "ip" if family == 4 else "ip6"


def _addr_type(family: int) -> str:
    return "ipv4_addr" if family == 4 else "ipv6_addr"


def _not(rng: random.Random) -> str:
    return rng.choice(("", "", "!= "))


def _host(rng: random.Random, family: int) -> str:
    return rng.choice(ADDRESSES[family])


def _two(rng: random.Random, items: tuple[str, ...]) -> str:
    return ", ".join(rng.sample(items, 2))


def _address(side: str) -> Write:
    def write(rng: random.Random, family: int, _: str) -> str:
        value = rng.choice(
            (
                _host(rng, family),
                rng.choice(NETS[family]),
                "{ " + _two(rng, ADDRESSES[family]) + " }",
                "{ " + _disjoint(rng, family) + " }",
                "@hosts",
                "@nets",
            )
        )
        return f"{_l3(family)} {side} {_not(rng)}{value}"

    return write


def _disjoint(rng: random.Random, family: int) -> str:
    nets = ("10.40.0.0/24", "203.0.113.0/24") if family == 4 else ("fd00:40::/64", "2001:db8::/64")
    hosts = ("8.8.8.8", "10.50.0.1") if family == 4 else ("fd00:50::1", "fd00:142::6")
    return f"{rng.choice(nets)}, {rng.choice(hosts)}"


def _range(rng: random.Random, family: int, _: str) -> str:
    if family == 4:
        low, high = rng.choice((("10.0.0.0", "10.40.0.9"), ("10.142.0.6", "10.142.0.8")))
    else:
        low, high = rng.choice((("fd00::", "fd00:40::9"), ("fd00:142::6", "fd00:142::8")))
    return f"{_l3(family)} {rng.choice(('saddr', 'daddr'))} {_not(rng)}{low}-{high}"


def _masked(rng: random.Random, family: int, _: str) -> str:
    if family == 4:
        return (
            f"ip daddr & 0.0.0.255 {rng.choice(('==', '!='))} {rng.choice(('0.0.0.10', '0.0.0.6'))}"
        )
    return f"ip6 daddr & ::ffff {rng.choice(('==', '!='))} {rng.choice(('::10', '::6'))}"


def _port_value(rng: random.Random) -> str:
    return rng.choice(
        (
            str(rng.choice(PORTS)),
            "1-1023",
            "> 1023",
            "<= 443",
            "{ 80, 443, 8000-9000 }",
            "!= { 53, 80 }",
            f"!= {rng.choice(PORTS)}",
            "!= 80-8080",
            "@ports",
        )
    )


def _l4(protocol: str) -> Write:
    def write(rng: random.Random, _: int, __: str) -> str:
        return f"{protocol} {rng.choice(('dport', 'dport', 'sport'))} {_port_value(rng)}"

    return write


def _flags(rng: random.Random, _: int, __: str) -> str:
    return "tcp flags " + rng.choice(
        ("syn", "== syn", "!= syn", "! syn", "& (fin|syn|rst|ack) == syn", "& (syn|ack) != 0",
         "{ syn, ack }", "syn,rst", "& (syn|ack) == (syn|ack)")
    )  # fmt: skip


def _ct_state(rng: random.Random, _: int, __: str) -> str:
    return "ct state " + rng.choice(
        ("new", "established", "established,related", "invalid", "untracked", "! new",
         "!= established", "{ new, untracked }", "new,established")
    )  # fmt: skip


def _mark_test(rng: random.Random, _: int, __: str) -> str:
    kind = rng.choice(("meta mark", "meta mark", "ct mark"))
    return f"{kind} " + rng.choice(
        ("0x1", "!= 0x1", "& 0x4000 == 0x4000", "& 0x3 != 0x0", "1-5", "{ 0x1, 0x2, 0x4000 }",
         "< 0x10", ">= 2", "& 0xff == 0x5", "@marks")
    )  # fmt: skip


def _iface(rng: random.Random, _: int, hook: str) -> str:
    sides = [s for s, hooks in (("iif", _IN), ("oif", _OUT)) if hook in hooks]
    side = rng.choice(sides)
    return rng.choice(
        (
            f'{side}name {_not(rng)}"{rng.choice(("eth0", "eth1", "cbr0", "lo", "none"))}"',
            f'{side}name {_not(rng)}"eth*"',
            f'{side}name {_not(rng)}{{ "eth0", "cbr0" }}',
            f"{side}name @ifaces",
            f'{side} {_not(rng)}"{rng.choice(("eth0", "lo", "cbr0"))}"',
        )
    )


def _no_iface(rng: random.Random, _: int, hook: str) -> str:
    """Interfaces that there are none of on this hook."""
    side = "oifname" if hook in ("prerouting", "input") else "iifname"
    return f'{side} {rng.choice(("", "!= "))}"{rng.choice(("eth0", "eth*"))}"'


def _concat(rng: random.Random, family: int, _: str) -> str:
    l3 = _l3(family)
    return rng.choice(
        (
            f"{l3} daddr . meta l4proto . th dport @services",
            f"{l3} saddr . {l3} daddr . meta l4proto . th dport != @pairs",
            "meta l4proto . th dport { tcp . 80, udp . 53, tcp . 8000-9000 }",
            f"meta l4proto {{ tcp, udp, sctp }} {l3} saddr . th dport @netports",
            f"{l3} saddr . meta mark {{ {_host(rng, family)} . 0x1, {_host(rng, family)} . 0x0 }}",
            "meta l4proto . ct state { tcp . new, udp . established }",
        )
    )


def _fib(rng: random.Random, _: int, hook: str) -> str:
    side = rng.choice(("saddr", "daddr"))
    value = rng.choice(("local", "unicast", "!= local", "{ local, broadcast, multicast }"))
    limit = (
        " . iif"
        if side == "daddr" and hook in ("prerouting", "input") and rng.random() < 0.3
        else ""
    )
    return f"fib {side}{limit} type {value}"


def _icmp(rng: random.Random, family: int, _: str) -> str:
    if family == 4:
        return rng.choice(("icmp type echo-request", "icmp type { echo-reply, echo-request }",
                           "icmp type != echo-request", "icmp code 0"))  # fmt: skip
    return rng.choice(("icmpv6 type echo-request", "icmpv6 type { echo-reply, nd-neighbor-solicit }",
                       "icmpv6 type != echo-request", "icmpv6 code 0"))  # fmt: skip


def _ct_tuple(rng: random.Random, family: int, _: str) -> str:
    l3 = _l3(family)
    return rng.choice(
        (
            f"ct original {l3} saddr {rng.choice(NETS[family])}",
            f"ct reply {l3} daddr != {rng.choice(NETS[family])}",
            f"ct original {l3} daddr {_host(rng, family)}",
            f"ct original proto-dst {rng.choice(PORTS)}",
            "ct direction original",
            "ct direction reply",
            f"ct l3proto {'ipv4' if family == 4 else 'ipv6'}",
            "ct status dnat", "ct status ! dnat", "ct status confirmed,assured",
            "ct status seen-reply", "ct zone 0", "ct zone 5",
        )
    )  # fmt: skip


def _header(rng: random.Random, family: int, _: str) -> str:
    common = ["meta length > 45", "meta length 40-60", "meta length { 28, 40, 44, 60 }"]
    common += ["meta nfproto ipv4", "meta nfproto ipv6", "meta protocol ip", "meta protocol != ip6"]
    if family == 4:
        common += ["ip ttl 64", "ip ttl < 64", "ip ttl != 63", "ip dscp ef", "ip dscp { cs0, 0x04 }",
                   "ip dscp != cs0", "ip ecn not-ect", "ip length < 50", "ip protocol tcp",
                   "ip protocol != { tcp, udp }", "ip version 4", "ip frag-off & 0x1fff != 0",
                   "ip option rr missing"]  # fmt: skip
    else:
        common += ["ip6 hoplimit 64", "ip6 hoplimit < 64", "ip6 dscp ef", "ip6 dscp != cs0",
                   "ip6 nexthdr tcp", "ip6 nexthdr { udp, ipv6-icmp }", "ip6 length < 20",
                   "exthdr frag missing"]  # fmt: skip
    return rng.choice(common)


CONDITIONS: tuple[NftPart, ...] = (
    NftPart("saddr", _address("saddr")),
    NftPart("daddr", _address("daddr")),
    NftPart("address range", _range),
    NftPart("address mask", _masked),
    NftPart("l4proto", lambda r, f, h: f"meta l4proto {r.choice(('tcp', 'udp', '!= tcp', '{ tcp, udp }', '47', 'icmp'))}"),
    NftPart("tcp port", _l4("tcp")),
    NftPart("udp port", _l4("udp")),
    NftPart("sctp port", _l4("sctp")),
    NftPart("th port", lambda r, f, h: f"meta l4proto {{ tcp, udp, sctp }} th dport {_port_value(r)}"),
    NftPart("tcp flags", _flags),
    NftPart("tcp option", lambda r, f, h: "tcp option " + r.choice(("maxseg exists", "timestamp missing", "sack-permitted exists"))),
    NftPart("icmp", _icmp),
    NftPart("header", _header),
    NftPart("mark", _mark_test),
    NftPart("ct state", _ct_state),
    NftPart("ct tuple", _ct_tuple),
    NftPart("interface", _iface),
    NftPart("no interface", _no_iface, ("prerouting", "input", "output", "postrouting")),
    NftPart("interface type", lambda r, f, h: f"meta {'iif' if h in _IN else 'oif'}type {r.choice(('ether', 'loopback', '!= ether'))}"),
    NftPart("interface kind", lambda r, f, h: f"meta {'iif' if h in _IN else 'oif'}kind " + r.choice(('"veth"', '"bridge"'))),
    NftPart("interface group", lambda r, f, h: "iifgroup 0", _IN),
    NftPart("ether", lambda r, f, h: r.choice(("ether saddr @MAC@", "ether saddr != @MAC@", "ether type ip", "ether type ip6")), _IN),
    NftPart("concatenation", _concat),
    NftPart("fib type", _fib),
    NftPart("fib oif", lambda r, f, h: "fib saddr . iif oif " + r.choice(("exists", "missing")), ("prerouting",)),
    NftPart("numgen random", lambda r, f, h: r.choice(("numgen random mod 3 0", "numgen random mod 4 < 2", "numgen random mod 2 != 0"))),
    NftPart("dynamic set", lambda r, f, h: f"{_l3(f)} saddr {_not(r)}@seen"),
    NftPart("numgen inc", lambda r, f, h: "numgen inc mod 2 0", is_open=True),
    NftPart("jhash", lambda r, f, h: f"jhash {_l3(f)} saddr mod 2 0", is_open=True),
    NftPart("symhash", lambda r, f, h: "symhash mod 2 1", is_open=True),
    NftPart("limit", lambda r, f, h: "limit rate 1000/second", is_open=True),
    NftPart("quota", lambda r, f, h: "quota over 1 mbytes", is_open=True),
    NftPart("ct count", lambda r, f, h: "ct state new ct count over 1000", kinds=("filter", "route"), is_open=True),
    NftPart("owner", lambda r, f, h: f"meta skuid {r.choice(('0', '!= 0', '1000'))}", ("output", "postrouting"), is_open=True),
    NftPart("pkttype", lambda r, f, h: "meta pkttype host", _IN, is_open=True),
    NftPart("random", lambda r, f, h: "meta random > 1000", is_open=True),
    NftPart("socket", lambda r, f, h: "socket transparent 1", ("prerouting", "input"), is_open=True),
)  # fmt: skip


def _mark_set(rng: random.Random, _: int, __: str) -> str:
    return "meta mark set " + rng.choice(
        ("0x1", "0x4000", "meta mark | 0x4000", "meta mark ^ 0x4000", "meta mark & 0xffffbfff",
         "meta mark & 0xffff0000 | 0x12", "ct mark", "ct mark & 0xff", "meta mark << 1",
         "tcp dport map @portmarks", "tcp dport map { 80 : 0x1, 443 : 0x2, 1000-9000 : 0x3 }",
         "numgen random mod 3", "numgen random mod 2 map { 0 : 0x1, 1 : 0x5 }")
    )  # fmt: skip


def _ct_mark_set(rng: random.Random, _: int, __: str) -> str:
    return "ct mark set " + rng.choice(
        ("0x1", "meta mark", "ct mark | 0x2", "meta mark & 0xf", "ct mark & 0xfffffff0 | 0x5")
    )


def _to(rng: random.Random, family: int, port: bool) -> str:
    host = rng.choice(INSIDE[family])
    if not port:
        return host
    return f"{host}:8080" if family == 4 else f"[{host}]:8080"


def _dnat(rng: random.Random, family: int, _: str) -> str:
    l3 = "ip" if family == 4 else "ip6"
    one, two, three = INSIDE[family]
    return rng.choice(
        (
            f"dnat {l3} to {_to(rng, family, False)}",
            f"meta l4proto tcp dnat {l3} to {_to(rng, family, True)}",
            f"meta l4proto {{ tcp, udp }} dnat {l3} to {_to(rng, family, True)}",
            f"meta l4proto tcp dnat {l3} to {_to(rng, family, True)} {rng.choice(('persistent', 'random'))}",
            f"meta l4proto tcp dnat {l3} to numgen random mod 3 map {{ 0 : {one} . 8080, 1 : {two} . 8080, 2 : {three} . 80 }}",
            f"meta l4proto udp dnat {l3} to numgen random mod 2 map {{ 0 : {one} . 5353, 1 : {two} . 53 }}",
            f"dnat {l3} to {l3} daddr map @dnats",
            f"meta l4proto tcp dnat {l3} to {l3} daddr . th dport map @dnatports",
            f"dnat {l3} to {l3} saddr map {{ {_disjoint(rng, family).split(', ')[0]} : {one} }}",
            f"dnat {l3} to {one}-{two}" if family == 4 else f"dnat {l3} to {one}",
            f"meta l4proto tcp dnat {l3} to {one if family == 4 else f'[{one}]'}:tcp dport map {{ 80 : 8080, 443 : 8443 }}",
        )
    )  # fmt: skip


def _snat(rng: random.Random, family: int, _: str) -> str:
    l3 = "ip" if family == 4 else "ip6"
    own = "10.142.0.8" if family == 4 else "fd00:142::8"
    place = own if family == 4 else f"[{own}]"
    return rng.choice(
        (
            f"snat {l3} to {own}",
            f"snat {l3} to {own} {rng.choice(('random', 'fully-random', 'persistent'))}",
            f"meta l4proto tcp snat {l3} to {place}:40000-40100",
            f"snat {l3} to {l3} saddr map @snats",
        )
    )


_REJECTS = {
    4: ("reject", "reject with icmp host-prohibited", "reject with tcp reset", "reject with icmp net-unreachable"),
    6: ("reject", "reject with icmpv6 no-route", "reject with tcp reset", "reject with icmpv6 admin-prohibited"),
}  # fmt: skip

ACTIONS: tuple[NftPart, ...] = (
    NftPart("accept", lambda r, f, h: "accept"),
    NftPart("drop", lambda r, f, h: "drop"),
    NftPart("reject", lambda r, f, h: r.choice(_REJECTS[f]), ("input", "forward", "output"), ("filter",)),
    NftPart("return", lambda r, f, h: "return"),
    NftPart("continue", lambda r, f, h: "continue"),
    NftPart("counter", lambda r, f, h: "counter"),
    NftPart("named counter", lambda r, f, h: 'counter name "hits"'),
    NftPart("log", lambda r, f, h: 'log prefix "gk" group 9'),
    NftPart("mark set", _mark_set),
    NftPart("ct mark set", _ct_mark_set),
    NftPart("jump", lambda r, f, h: "jump @CHAIN@"),
    NftPart("goto", lambda r, f, h: "goto @CHAIN@"),
    NftPart("vmap", lambda r, f, h: r.choice((
        "tcp dport vmap { 80 : jump @CHAIN@, 443 : drop, 8000-9000 : accept }",
        "meta l4proto vmap { tcp : jump @CHAIN@, udp : goto @CHAIN@, 132 : continue }",
        "ct state vmap { new : jump @CHAIN@, established : accept, untracked : return }",
        "meta mark vmap { 0x0 : jump @CHAIN@, 0x1 : return, 0x4000-0x4fff : continue }",
        f"{_l3(f)} daddr vmap {{ {_disjoint(r, f).replace(', ', ' : jump @CHAIN@, ')} : goto @CHAIN@ }}",
        f"{_l3(f)} daddr . meta l4proto . th dport vmap @services-{h}",
        "meta l4proto . th dport vmap { tcp . 80 : jump @CHAIN@, udp . 53 : goto @CHAIN@, tcp . 8000-8100 : drop }",
        "fib daddr type vmap { local : jump @CHAIN@, unicast : continue }",
    ))),
    NftPart("numgen vmap", lambda r, f, h: r.choice((
        "numgen random mod 3 vmap { 0 : goto @CHAIN@, 1 : jump @CHAIN@, 2 : continue }",
        "numgen random mod 10 vmap { 0-4 : jump @CHAIN@, 5-8 : return }",
    ))),
    NftPart("jhash vmap", lambda r, f, h: f"jhash {_l3(f)} saddr mod 2 vmap {{ 0 : drop, 1 : continue }}", kinds=("filter", "route")),
    NftPart("dscp set", lambda r, f, h: f"{_l3(f)} dscp set {r.choice(('cs1', 'ef', '0x04'))}", kinds=("filter", "route")),
    NftPart("ttl set", lambda r, f, h: "ip ttl set 50" if f == 4 else "ip6 hoplimit set 50", ("input", "output"), ("filter", "route")),
    NftPart("set add", lambda r, f, h: f"{r.choice(('add', 'update', 'delete'))} @seen {{ {_l3(f)} saddr }}"),
    NftPart("set limit", lambda r, f, h: f"add @meters {{ {_l3(f)} saddr limit rate 1000/second }} drop", kinds=("filter", "route"), is_open=True),
    NftPart("notrack", lambda r, f, h: "notrack", ("prerouting", "output"), ("filter",), before=-200),
    NftPart("ct zone set", lambda r, f, h: "ct zone set 5", ("prerouting", "output"), ("filter",), before=-200),
    NftPart("tcp option set", lambda r, f, h: "tcp flags syn tcp option maxseg size set 1300", ("forward", "output", "postrouting"), ("filter",)),
    NftPart("dnat", _dnat, ("prerouting", "output"), ("nat",)),
    NftPart("snat", _snat, ("postrouting", "input"), ("nat",)),
    NftPart("masquerade", lambda r, f, h: r.choice(("masquerade", "masquerade fully-random", "masquerade random", "meta l4proto { tcp, udp } masquerade to :40000-41000")), ("postrouting",), ("nat",)),
    NftPart("redirect", lambda r, f, h: r.choice(("redirect", "meta l4proto tcp redirect to :8080", "meta l4proto { tcp, udp } redirect to :8080-8090", "meta l4proto tcp redirect to :tcp dport map { 80 : 8080 }")), ("prerouting", "output"), ("nat",)),
    NftPart("tproxy", lambda r, f, h: f"meta l4proto tcp tproxy {_l3(f)} to :9999 drop", ("prerouting",), ("filter",), is_open=True),
    NftPart("queue", lambda r, f, h: "queue flags bypass to 7", kinds=("filter",), is_open=True),
)  # fmt: skip

_DECIDES = frozenset(("drop", "mark set", "reject"))
"""Actions after which one sees whether an open condition was met."""


@dataclass(slots=True, kw_only=True)
class NftGenerator:
    """Writes one table."""

    rng: random.Random
    family: int
    absent: frozenset[str] = frozenset()
    mac: str = ""
    coverage: Counter[str] = field(default_factory=Counter)
    inet: bool = False

    @property
    def table_family(self) -> str:
        return "inet" if self.inet else _l3(self.family)

    def lines(self) -> list[str]:
        """The table for ``nft -f``, one rule a line."""
        rng, f = self.rng, self.family
        self.inet = rng.random() < 0.4
        lines = [f"table {self.table_family} {TABLE} {{", *_objects(rng, f)]
        for hook in _ALL:
            kinds = ["filter", rng.choice(("filter", "route")) if hook == "output" else "filter"]
            kinds += ["nat"] if hook in _NAT_HOOKS else []
            for number, kind in enumerate(kinds):
                lines += self._chains(hook, kind, number)
            lines += [
                f"  map services-{hook} {{",
                f"    type {_addr_type(f)} . inet_proto . inet_service : verdict",
                "    elements = { "
                + ", ".join(
                    f'{_host_at(f, i)} . {p} . {port} : {verdict}'
                    for i, (p, port, verdict) in enumerate(
                        (("tcp", 80, f"goto {hook}-0-1"), ("udp", 53, f"jump {hook}-0-2"),
                         ("tcp", 8080, "drop"), ("tcp", 443, f"jump {hook}-0-2"))
                    )
                )
                + " }",
                "  }",
            ]  # fmt: skip
        return [*lines, "}"]

    def _chains(self, hook: str, kind: str, number: int) -> list[str]:
        rng = self.rng
        pool = [p for p in _PRIORITIES if kind != "nat" or p > -200]
        priority = rng.choice(pool)
        policy = "drop" if kind != "nat" and rng.random() < 0.05 else "accept"
        sign = f"type {kind} hook {hook} priority {priority}; policy {policy};"
        found: list[str] = []
        for level in range(3, -1, -1):
            name = f"{hook}-{number}-{level - 1}" if level else f"{hook}-{number}"
            found.append(f"  chain {name} {{")
            if not level:
                found.append(f"    {sign}")
            for _ in range(rng.randrange(1, 5)):
                found.append("    " + self._rule(hook, kind, priority, number, level))
            found.append("  }")
        return found

    def _rule(self, hook: str, kind: str, priority: int, number: int, level: int) -> str:
        rng = self.rng
        usable = [
            part
            for part in ACTIONS
            if hook in part.hooks
            and kind in part.kinds
            and priority < part.before
            and part.name not in self.absent
            and (level < 3 or part.name not in ("jump", "goto", "vmap", "numgen vmap"))
        ]
        if kind == "nat" and rng.random() < 0.4:
            usable = [part for part in usable if part.kinds == ("nat",)]
        action = rng.choice(usable)
        words: list[str] = []
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
            part = rng.choice(
                [p for p in CONDITIONS if hook in p.hooks and kind in p.kinds
                 and p.name not in self.absent]
            )  # fmt: skip
            if part.is_open and action.name not in _DECIDES:
                continue
            words.append(part.write(rng, self.family, hook).replace("@MAC@", self.mac))
            self.coverage[f"nft {part.name}"] += 1
        text = action.write(rng, self.family, hook)
        while "@CHAIN@" in text:
            text = text.replace("@CHAIN@", f"{hook}-{number}-{rng.randrange(level, 3)}", 1)
        self.coverage[f"nft {action.name}"] += 1
        return " ".join([*words, text])

    def cases(self, bed: Bed) -> Iterator[Case]:
        maker = Generator(rng=self.rng, family=self.family, backend="nft")
        return maker.cases(bed)


def _host_at(family: int, index: int) -> str:
    return ADDRESSES[family][index * 2 % len(ADDRESSES[family])]


def _objects(rng: random.Random, f: int) -> list[str]:
    """Sets and maps of all kinds."""
    address = _addr_type(f)
    hosts = ADDRESSES[f]
    nets = _disjoint(rng, f)
    one, two, three = INSIDE[f]
    own = "10.142.0.8" if f == 4 else "fd00:142::8"
    wide = NETS[f][0]
    return [
        '  counter hits { }',
        f"  set hosts {{ type {address}; elements = {{ {_two(rng, hosts)} }} }}",
        f"  set nets {{ type {address}; flags interval; elements = {{ {nets} }} }}",
        "  set ports { type inet_service; flags interval; elements = { 53, 80-443, 8000-9000 } }",
        "  set marks { type mark; elements = { 0x1, 0x4000 } }",
        '  set ifaces { type ifname; elements = { "eth0", "cbr0" } }',
        f"  set services {{ type {address} . inet_proto . inet_service; elements = {{ "
        + ", ".join(f"{h} . {p} . {port}" for h, p, port in zip(
            rng.sample(hosts, 4), ("tcp", "udp", "tcp", "sctp"), (80, 53, 8080, 443), strict=True))
        + " } }",
        f"  set pairs {{ type {address} . {address} . inet_proto . inet_service; elements = {{ "
        f"{hosts[0]} . {hosts[2]} . tcp . 8080, {hosts[5]} . {hosts[0]} . tcp . 80 }} }}",
        f"  set netports {{ type {address} . inet_service; flags interval; elements = {{ "
        f"{wide} . 80-443, {nets.split(', ')[1]} . 8080 }} }}",
        f"  set seen {{ type {address}; flags dynamic,timeout; timeout 10m; size 1024; }}",
        f"  set meters {{ type {address}; flags dynamic; size 1024; }}",
        "  map portmarks { type inet_service : mark; elements = { 80 : 0x1, 8080 : 0x2 } }",
        f"  map dnats {{ type {address} : {address}; elements = {{ {hosts[7]} : {one}, {hosts[0]} : {two} }} }}",
        f"  map dnatports {{ type {address} . inet_service : {address} . inet_service; elements = {{ "
        f"{hosts[7]} . 80 : {one} . 8080, {hosts[0]} . 443 : {three} . 80 }} }}",
        f"  map snats {{ type {address} : {address}; flags interval; elements = {{ {wide} : {own} }} }}",
    ]  # fmt: skip


_RULE = re.compile(r"    (?!type |elements )")
_LINE = re.compile(r"/dev/stdin:(\d+):")


def restore(bed: Bed, lines: list[str]) -> list[str]:
    """Loads the table; rules that the kernel or nft refuses are taken out and returned."""
    lines, refused = list(lines), []
    while True:
        try:
            bed.command(["nft", "-f", "/dev/stdin"], text="\n".join(lines) + "\n")
        except RuntimeError as error:
            bad = {int(n) - 1 for n in _LINE.findall(str(error))}
            rules = sorted(n for n in bad if _RULE.match(lines[n]))
            if not rules:
                raise
            # One bad rule makes nft complain of others behind it: only the first is sure.
            refused.append(lines.pop(rules[0]).strip())
            continue
        return refused


def probe_nft(bed: Bed) -> frozenset[str]:
    """Names of the parts that this kernel or nft lacks, found by trying each."""
    absent: set[str] = set()
    rng = random.Random(1)
    for part in (*CONDITIONS, *ACTIONS):
        kind = part.kinds[0]
        hook = next(h for h in part.hooks if kind != "nat" or h in _NAT_HOOKS)
        text = part.write(rng, 4, hook).replace("@MAC@", "02:00:00:00:00:01")
        text = text.replace("@CHAIN@", "other")
        lines = [f"table ip {TABLE} {{", *_objects(rng, 4)]
        lines += [
            f"  map services-{hook} {{ type ipv4_addr . inet_proto . inet_service : verdict; }}"
        ]
        lines += ["  chain other { }", "  chain base {"]
        priority = -300 if part.before < 0 else 0
        lines += [f"    type {kind} hook {hook} priority {priority};", f"    {text}", "  }", "}"]
        try:
            bed.command(["nft", "-f", "/dev/stdin"], text="\n".join(lines) + "\n")
        except RuntimeError:
            absent.add(part.name)
            continue
        bed.command(["nft", "delete", "table", "ip", TABLE])
    return frozenset(absent)
