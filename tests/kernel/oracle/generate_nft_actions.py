"""What random nftables rules do."""

from __future__ import annotations

import random

from tests.kernel.oracle.generate import INSIDE
from tests.kernel.oracle.nft_parts import NftPart, disjoint, network

__all__ = ["ACTIONS"]


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
            f"dnat {l3} to {l3} saddr map {{ {disjoint(rng, family).split(', ')[0]} : {one} }}",
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
        f"{network(f)} daddr vmap {{ {disjoint(r, f).replace(', ', ' : jump @CHAIN@, ')} : goto @CHAIN@ }}",
        f"{network(f)} daddr . meta l4proto . th dport vmap @services-{h}",
        "meta l4proto . th dport vmap { tcp . 80 : jump @CHAIN@, udp . 53 : goto @CHAIN@, tcp . 8000-8100 : drop }",
        "fib daddr type vmap { local : jump @CHAIN@, unicast : continue }",
    ))),
    NftPart("numgen vmap", lambda r, f, h: r.choice((
        "numgen random mod 3 vmap { 0 : goto @CHAIN@, 1 : jump @CHAIN@, 2 : continue }",
        "numgen random mod 10 vmap { 0-4 : jump @CHAIN@, 5-8 : return }",
    ))),
    NftPart("jhash vmap", lambda r, f, h: f"jhash {network(f)} saddr mod 2 vmap {{ 0 : drop, 1 : continue }}", kinds=("filter", "route")),
    NftPart("dscp set", lambda r, f, h: f"{network(f)} dscp set {r.choice(('cs1', 'ef', '0x04'))}", kinds=("filter", "route")),
    NftPart("ttl set", lambda r, f, h: "ip ttl set 50" if f == 4 else "ip6 hoplimit set 50", ("input", "output"), ("filter", "route")),
    NftPart("set add", lambda r, f, h: f"{r.choice(('add', 'update', 'delete'))} @seen {{ {network(f)} saddr }}"),
    NftPart("set limit", lambda r, f, h: f"add @meters {{ {network(f)} saddr limit rate 1000/second }} drop", kinds=("filter", "route"), is_open=True),
    NftPart("notrack", lambda r, f, h: "notrack", ("prerouting", "output"), ("filter",), before=-200),
    NftPart("ct zone set", lambda r, f, h: "ct zone set 5", ("prerouting", "output"), ("filter",), before=-200),
    NftPart("tcp option set", lambda r, f, h: "tcp flags syn tcp option maxseg size set 1300", ("forward", "output", "postrouting"), ("filter",)),
    NftPart("dnat", _dnat, ("prerouting", "output"), ("nat",)),
    NftPart("snat", _snat, ("postrouting", "input"), ("nat",)),
    NftPart("masquerade", lambda r, f, h: r.choice(("masquerade", "masquerade fully-random", "masquerade random", "meta l4proto { tcp, udp } masquerade to :40000-41000")), ("postrouting",), ("nat",)),
    NftPart("redirect", lambda r, f, h: r.choice(("redirect", "meta l4proto tcp redirect to :8080", "meta l4proto { tcp, udp } redirect to :8080-8090", "meta l4proto tcp redirect to :tcp dport map { 80 : 8080 }")), ("prerouting", "output"), ("nat",)),
    NftPart("tproxy", lambda r, f, h: f"meta l4proto tcp tproxy {network(f)} to :9999 drop", ("prerouting",), ("filter",), is_open=True),
    NftPart("queue", lambda r, f, h: "queue flags bypass to 7", kinds=("filter",), is_open=True),
)  # fmt: skip
