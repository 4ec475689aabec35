"""What random nftables rules test."""

from __future__ import annotations

import random
import re

from tests.kernel.oracle.generate import ADDRESSES, NETS, PORTS
from tests.kernel.oracle.nft_parts import (
    INCOMING,
    OUTGOING,
    NftPart,
    Write,
    disjoint,
    host,
    maybe_not,
    network,
    pick_two,
)

__all__ = ["CONDITIONS", "NFT_OPEN"]

NFT_OPEN = re.compile(
    r"\b(?:limit|quota|numgen inc|jhash|symhash|skuid|skgid|ct count|meta random|pkttype|cpu"
    r"|meta priority|socket|rt (?:ip6? )?nexthop|ip id|udp length|expiration)\b"
)
"""Rules whose answer rests on what no snapshot shows."""


def _address(side: str) -> Write:
    def write(rng: random.Random, family: int, _: str) -> str:
        value = rng.choice(
            (
                host(rng, family),
                rng.choice(NETS[family]),
                "{ " + pick_two(rng, ADDRESSES[family]) + " }",
                "{ " + disjoint(rng, family) + " }",
                "@hosts",
                "@nets",
            )
        )
        return f"{network(family)} {side} {maybe_not(rng)}{value}"

    return write


def _range(rng: random.Random, family: int, _: str) -> str:
    if family == 4:
        low, high = rng.choice((("10.0.0.0", "10.40.0.9"), ("10.142.0.6", "10.142.0.8")))
    else:
        low, high = rng.choice((("fd00::", "fd00:40::9"), ("fd00:142::6", "fd00:142::8")))
    return f"{network(family)} {rng.choice(('saddr', 'daddr'))} {maybe_not(rng)}{low}-{high}"


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
    sides = [s for s, hooks in (("iif", INCOMING), ("oif", OUTGOING)) if hook in hooks]
    side = rng.choice(sides)
    return rng.choice(
        (
            f'{side}name {maybe_not(rng)}"{rng.choice(("eth0", "eth1", "cbr0", "lo", "none"))}"',
            f'{side}name {maybe_not(rng)}"eth*"',
            f'{side}name {maybe_not(rng)}{{ "eth0", "cbr0" }}',
            f"{side}name @ifaces",
            f'{side} {maybe_not(rng)}"{rng.choice(("eth0", "lo", "cbr0"))}"',
        )
    )


def _no_iface(rng: random.Random, _: int, hook: str) -> str:
    """Interfaces that there are none of on this hook."""
    side = "oifname" if hook in ("prerouting", "input") else "iifname"
    return f'{side} {rng.choice(("", "!= "))}"{rng.choice(("eth0", "eth*"))}"'


def _concat(rng: random.Random, family: int, _: str) -> str:
    l3 = network(family)
    return rng.choice(
        (
            f"{l3} daddr . meta l4proto . th dport @services",
            f"{l3} saddr . {l3} daddr . meta l4proto . th dport != @pairs",
            "meta l4proto . th dport { tcp . 80, udp . 53, tcp . 8000-9000 }",
            f"meta l4proto {{ tcp, udp, sctp }} {l3} saddr . th dport @netports",
            f"{l3} saddr . meta mark {{ {host(rng, family)} . 0x1, {host(rng, family)} . 0x0 }}",
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
    l3 = network(family)
    return rng.choice(
        (
            f"ct original {l3} saddr {rng.choice(NETS[family])}",
            f"ct reply {l3} daddr != {rng.choice(NETS[family])}",
            f"ct original {l3} daddr {host(rng, family)}",
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
    NftPart("interface type", lambda r, f, h: f"meta {'iif' if h in INCOMING else 'oif'}type {r.choice(('ether', 'loopback', '!= ether'))}"),
    NftPart("interface kind", lambda r, f, h: f"meta {'iif' if h in INCOMING else 'oif'}kind " + r.choice(('"veth"', '"bridge"'))),
    NftPart("interface group", lambda r, f, h: "iifgroup 0", INCOMING),
    NftPart("ether", lambda r, f, h: r.choice(("ether saddr @MAC@", "ether saddr != @MAC@", "ether type ip", "ether type ip6")), INCOMING),
    NftPart("concatenation", _concat),
    NftPart("fib type", _fib),
    NftPart("fib oif", lambda r, f, h: "fib saddr . iif oif " + r.choice(("exists", "missing")), ("prerouting",)),
    NftPart("numgen random", lambda r, f, h: r.choice(("numgen random mod 3 0", "numgen random mod 4 < 2", "numgen random mod 2 != 0"))),
    NftPart("dynamic set", lambda r, f, h: f"{network(f)} saddr {maybe_not(r)}@seen"),
    NftPart("numgen inc", lambda r, f, h: "numgen inc mod 2 0", is_open=True),
    NftPart("jhash", lambda r, f, h: f"jhash {network(f)} saddr mod 2 0", is_open=True),
    NftPart("symhash", lambda r, f, h: "symhash mod 2 1", is_open=True),
    NftPart("limit", lambda r, f, h: "limit rate 1000/second", is_open=True),
    NftPart("quota", lambda r, f, h: "quota over 1 mbytes", is_open=True),
    NftPart("ct count", lambda r, f, h: "ct state new ct count over 1000", kinds=("filter", "route"), is_open=True),
    NftPart("owner", lambda r, f, h: f"meta skuid {r.choice(('0', '!= 0', '1000'))}", ("output", "postrouting"), is_open=True),
    NftPart("pkttype", lambda r, f, h: "meta pkttype host", INCOMING, is_open=True),
    NftPart("random", lambda r, f, h: "meta random > 1000", is_open=True),
    NftPart("socket", lambda r, f, h: "socket transparent 1", ("prerouting", "input"), is_open=True),
)  # fmt: skip
