"""Random nftables rule sets: base chains at random priorities, sets, maps, draws, nat.

Chains belong to one hook, as what a rule may do depends on the hooks that it is reached from.
Values come from the pools of `generate`, so that rules are hit.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.fixtures import Case
from tests.kernel.oracle.generate import ADDRESSES, INSIDE, NETS, Generator
from tests.kernel.oracle.generate_nft_actions import ACTIONS
from tests.kernel.oracle.generate_nft_conditions import CONDITIONS
from tests.kernel.oracle.nft_parts import (
    EVERYWHERE,
    NAT_HOOKS,
    addr_type,
    disjoint,
    network,
    pick_two,
)

__all__ = ["TABLE", "NftGenerator", "objects"]

TABLE = "gkrandom"


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
        return "inet" if self.inet else network(self.family)

    def lines(self) -> list[str]:
        """The table for ``nft -f``, one rule a line."""
        rng, f = self.rng, self.family
        self.inet = rng.random() < 0.4
        lines = [f"table {self.table_family} {TABLE} {{", *objects(rng, f)]
        for hook in EVERYWHERE:
            kinds = ["filter", rng.choice(("filter", "route")) if hook == "output" else "filter"]
            kinds += ["nat"] if hook in NAT_HOOKS else []
            for number, kind in enumerate(kinds):
                lines += self._chains(hook, kind, number)
            lines += [
                f"  map services-{hook} {{",
                f"    type {addr_type(f)} . inet_proto . inet_service : verdict",
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


def objects(rng: random.Random, f: int) -> list[str]:
    """Sets and maps of all kinds."""
    address = addr_type(f)
    hosts = ADDRESSES[f]
    nets = disjoint(rng, f)
    one, two, three = INSIDE[f]
    own = "10.142.0.8" if f == 4 else "fd00:142::8"
    wide = NETS[f][0]
    return [
        '  counter hits { }',
        f"  set hosts {{ type {address}; elements = {{ {pick_two(rng, hosts)} }} }}",
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
