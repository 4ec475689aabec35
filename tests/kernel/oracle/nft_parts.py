"""What the conditions and actions of random nftables rules share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.kernel.oracle.generate import ADDRESSES

__all__ = [
    "EVERYWHERE",
    "INCOMING",
    "NAT_HOOKS",
    "OUTGOING",
    "NftPart",
    "Write",
    "addr_type",
    "disjoint",
    "host",
    "network",
    "maybe_not",
    "pick_two",
]

INCOMING = ("prerouting", "input", "forward")
OUTGOING = ("forward", "output", "postrouting")
EVERYWHERE = ("prerouting", "input", "forward", "output", "postrouting")
NAT_HOOKS = ("prerouting", "input", "output", "postrouting")


Write = Callable[[random.Random, int, str], str]
"""(random, family, hook) → text."""


@dataclass(frozen=True, slots=True)
class NftPart:
    """One condition or action that the generator knows to write."""

    name: str
    write: Write
    hooks: tuple[str, ...] = EVERYWHERE
    kinds: tuple[str, ...] = ("filter", "route", "nat")
    """Types of base chains."""
    before: int = 1000
    """Only at priorities below this."""
    is_open: bool = False
    """Its answer is not known to anybody but the kernel."""


def network(family: int) -> str:
    return "ip" if family == 4 else "ip6"


def addr_type(family: int) -> str:
    return "ipv4_addr" if family == 4 else "ipv6_addr"


def maybe_not(rng: random.Random) -> str:
    return rng.choice(("", "", "!= "))


def host(rng: random.Random, family: int) -> str:
    return rng.choice(ADDRESSES[family])


def pick_two(rng: random.Random, items: tuple[str, ...]) -> str:
    return ", ".join(rng.sample(items, 2))


def disjoint(rng: random.Random, family: int) -> str:
    nets = ("10.40.0.0/24", "203.0.113.0/24") if family == 4 else ("fd00:40::/64", "2001:db8::/64")
    hosts = ("8.8.8.8", "10.50.0.1") if family == 4 else ("fd00:50::1", "fd00:142::6")
    return f"{rng.choice(nets)}, {rng.choice(hosts)}"
