"""The routing look-up against the kernel's: random namespaces, random RTM_GETROUTE queries.

    python -m tests.kernel.routes --cases 50000 --seed 1 --json

The last line is one JSON object.  A case agrees when the kernel's answer (type, interface,
gateway, source, table; or the error) is among the decisions of `Fib`; UNKNOWN decisions are
counted apart and are never agreements.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from random import Random

from gketrace.packet import Packet
from gketrace.simulate.fib.ipv6 import Ipv6Tables
from gketrace.simulate.fib.path6 import needs_strict
from gketrace.simulate.fib.rules import Flow
from gketrace.simulate.fib.view import NetView, NotKnown
from gketrace.simulate.routing import Fib, RouteDecision, RouteKind
from gketrace.snapshot import IPNetwork, NetnsSnapshot
from tests.kernel.routes_netlink import Answer, Query, RouteSocket
from tests.kernel.routes_world import MARKS, PORTS, UIDS, World, in_new_netns, read_snapshot

PER_WORLD = 250


@dataclass(slots=True)
class Result:
    """What a run found."""

    cases: int = 0
    agreements: int = 0
    disagreements: int = 0
    unknown: int = 0
    worlds: int = 0
    alternatives: int = 0
    """Agreements where the simulator named more than one possible answer."""
    kinds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    simulated_seconds: float = 0.0

    def summary(self) -> dict[str, object]:
        return {
            "cases": self.cases,
            "agreements": self.agreements,
            "disagreements": self.disagreements,
            "unknown": self.unknown,
            "alternatives": self.alternatives,
            "worlds": self.worlds,
            "microseconds_per_lookup": round(1e6 * self.simulated_seconds / max(1, self.cases), 1),
            "kinds": dict(sorted(self.kinds.items())),
            "unknown_reasons": dict(self.reasons.most_common()),
        }


@dataclass(frozen=True, slots=True)
class Asked:
    """What the kernel of one random namespace said."""

    label: str
    snapshot: NetnsSnapshot
    queries: list[Query]
    answers: list[Answer]


def run(cases: int, seed: int, families: tuple[int, ...] = (4, 6)) -> Result:
    """Runs `cases` queries in as many random namespaces as that takes."""
    result = Result()
    while result.cases < cases:
        judge(ask_kernel(seed, result.worlds, families, cases - result.cases), result)
    return result


def ask_kernel(seed: int, number: int, families: tuple[int, ...], most: int = PER_WORLD) -> Asked:
    """Builds the namespace of this number, and asks it `PER_WORLD` queries, or `most`."""
    random = Random(f"{seed}/{number}")
    wanted = min(PER_WORLD, most)

    def build_and_ask() -> Asked:
        world = World(random)
        world.build()
        state = random.getstate()
        # A link's carrier may be told of late: linkwatch_schedule_work (net/core/link_watch.c) lets
        # a second pass between such events, of all namespaces of the machine together.
        for _ in range(20):
            random.setstate(state)
            snapshot = read_snapshot()
            queries = [
                query(random, world, snapshot, random.choice(families)) for _ in range(wanted)
            ]
            kernel = RouteSocket()
            try:
                answers = kernel.ask(queries)
            finally:
                kernel.close()
            if _routing(read_snapshot()) == _routing(snapshot):
                return Asked(f"seed {seed} world {number}", snapshot, queries, answers)
        raise RuntimeError(f"seed {seed} world {number} does not come to rest")

    return in_new_netns(build_and_ask)


def _routing(snapshot: NetnsSnapshot) -> tuple[object, ...]:
    """What the answers rest on, without what ticks."""
    return snapshot.links, snapshot.addresses, snapshot.routes, snapshot.rules


def judge(asked: Asked, result: Result) -> None:
    """Compares the look-up's answers over what was read there with the kernel's."""
    snapshot, queries = asked.snapshot, asked.queries
    fib = Fib(snapshot)
    tables6 = Ipv6Tables(NetView(snapshot))
    names = {link.ifindex: link.name for link in snapshot.links}  # type: ignore[union-attr]
    started = time.perf_counter()
    told = [ask(fib, tables6, q, names) for q in queries]
    result.simulated_seconds += time.perf_counter() - started
    result.worlds += 1
    plain = tables_shown(snapshot)
    for q, answer, decisions in zip(queries, asked.answers, told, strict=True):
        result.cases += 1
        result.kinds[f"ipv{q.family} {'in' if q.iif else 'out'} {answer.error or answer.type}"] += 1
        unknown = [d for d in decisions if d.kind is RouteKind.UNKNOWN]
        if unknown:
            result.unknown += 1
            result.reasons[f"ipv{q.family}: " + unknown[0].detail[:60]] += 1
        elif any(same(d, q, answer, names, plain) for d in decisions):
            result.agreements += 1
            result.alternatives += len(decisions) > 1
        else:
            result.disagreements += 1
            if len(result.examples) < 20:
                lines = "\n  ".join(map(describe, decisions))
                result.examples.append(f"{asked.label}\n  {q}\n  kernel {answer}\n  {lines}")


def tables_shown(snapshot: NetnsSnapshot) -> bool:
    """Whether the kernel tells local from main: it keeps both in one trie until rules change."""
    return len([r for r in snapshot.rules if r.family == 4]) != 3  # type: ignore[union-attr]


def ask(
    fib: Fib, tables6: Ipv6Tables, q: Query, names: dict[int, str]
) -> tuple[RouteDecision, ...]:
    if not q.iif:
        return fib.output(
            q.dst,
            src=q.src,
            oif=names.get(q.oif, f"if{q.oif}") if q.oif else "",
            mark=q.mark,
            tos=q.tos,
            protocol=q.protocol,
            sport=q.sport,
            dport=q.dport,
            uid=q.uid,
        )
    if q.family == 4:
        return fib.input(
            Packet(
                src=q.src or IPv4Address(0),
                dst=q.dst,
                protocol=q.protocol,
                sport=q.sport,
                dport=q.dport,
                mark=q.mark,
                dscp=q.tos >> 2,
            ),
            names[q.iif],
        )
    return ask_input6(tables6, q, names)


def ask_input6(tables: Ipv6Tables, q: Query, names: dict[int, str]) -> tuple[RouteDecision, ...]:
    """RTM_GETROUTE with iif looks a received packet up, and leaves out what `Fib.input` checks
    before and after (ip6_rcv_core, ip6_forward): hence this goes one layer below.
    """
    flow = Flow(
        family=6,
        dst=int(q.dst),
        src=int(q.src) if q.src else 0,
        iif=names[q.iif],
        mark=q.mark,
        tos=q.tos & 0xFC,
        protocol=q.protocol,
        sport=q.sport,
        dport=q.dport,
        uid=q.uid,
    )
    found: list[RouteDecision] = []
    try:
        for outcome in tables.lookup(flow, names[q.iif], strict=needs_strict(flow.dst)):
            hit = outcome.hit
            if hit is None or hit.error or hit.route is None:
                error = hit.error if hit is not None else "ENETUNREACH"
                found.append(RouteDecision(kind=RouteKind.NO_ROUTE, errno=error))
                continue
            for choice in tables.choices(hit, names[q.iif]):
                local = tables.over_loopback(choice.route)
                found.append(
                    RouteDecision(
                        kind=RouteKind.LOCAL if local else RouteKind.FORWARD,
                        interface="lo" if local else tables.view.device(choice.hop).name,
                        next_hop=choice.hop.gateway,
                        route=choice.route,
                    )
                )
    except NotKnown as reason:
        return (RouteDecision(kind=RouteKind.UNKNOWN, detail=str(reason)),)
    return tuple(found)


def same(
    decision: RouteDecision, q: Query, answer: Answer, names: dict[int, str], shown: bool
) -> bool:
    """Whether a decision is the kernel's answer."""
    if answer.error:
        return decision.errno == answer.error
    if decision.errno or kind_name(decision, q) != plain_type(q, answer):
        return False
    interface = decision.interface
    if q.iif and decision.kind in (RouteKind.LOCAL, RouteKind.BROADCAST):
        interface = "lo"
    if interface != names.get(answer.oif) or decision.next_hop != answer.gateway:
        return False
    if not q.src and not q.iif and decision.source != answer.prefsrc:
        return False
    if decision.route is None or (q.family == 4 and not shown):
        return True
    return decision.route.table == answer.table


def plain_type(q: Query, answer: Answer) -> str:
    """The kernel's type; for IPv4 multicast it may be the one of an earlier answer.

    A next hop caches one rtable for all destinations behind it, with the type of the first.
    """
    if q.family == 4 and q.dst.is_multicast and answer.type == "unicast":
        return "multicast"
    return answer.type


def kind_name(decision: RouteDecision, q: Query) -> str:
    forwarded = bool(q.iif) and decision.kind is RouteKind.FORWARD
    if decision.route is not None and (q.family == 6 or forwarded):
        return decision.route.type.value
    return {
        RouteKind.LOCAL: "local",
        RouteKind.BROADCAST: "broadcast",
        RouteKind.MULTICAST: "multicast",
    }.get(decision.kind, "unicast")


def describe(decision: RouteDecision) -> str:
    parts = (
        decision.kind.value,
        decision.errno,
        decision.interface,
        decision.next_hop,
        decision.source,
        decision.route.text if decision.route else "",
        decision.rule.text if decision.rule else "",
        decision.because,
        decision.detail,
    )
    return " | ".join(str(part) for part in parts if part)


def query(random: Random, world: World, snapshot: NetnsSnapshot, family: int) -> Query:
    devices = [link.ifindex for link in snapshot.links]  # type: ignore[union-attr]
    own = [owner[1] for owner in (world.own4 if family == 4 else world.own6)]
    dst = destination(random, snapshot, family, own)
    # Which groups are joined is not in a snapshot, so received multicast is not asked about.
    received = random.random() < 0.4 and not dst.is_multicast
    iif = random.choice(devices) if received else 0
    near = [
        route.dst
        for route in snapshot.routes  # type: ignore[union-attr]
        if route.family == family and any(hop.oif == iif for hop in route.next_hops)
    ]
    src: IPv4Address | IPv6Address | None = None
    if received and near and random.random() < 0.7:
        src = host(random, random.choice(near))
    elif received:
        src = destination(random, snapshot, family, own)
    elif random.random() < 0.35 and own:
        src = random.choice(own)
    elif random.random() < 0.05:
        src = destination(random, snapshot, family, own)
    if src is not None and not int(src):
        src = None
    protocol = random.choice((6, 17, 17, 58 if family == 6 else 1))
    ports = protocol in (6, 17)
    return Query(
        family=family,
        dst=dst,
        src=src,
        iif=iif,
        oif=random.choice(devices) if not received and random.random() < 0.2 else 0,
        mark=random.choice(MARKS),
        tos=random.choice((0, 0, 0, 0x10, 0x08, 0x40, 0xB8)),
        protocol=protocol,
        sport=random.choice(PORTS) if ports else 0,
        dport=random.choice(PORTS) if ports else 0,
        uid=0xFFFFFFFF if received and family == 6 else random.choice(UIDS) if not received else 0,
    )


def destination(
    random: Random,
    snapshot: NetnsSnapshot,
    family: int,
    own: list[IPv4Address] | list[IPv6Address],
) -> IPv4Address | IPv6Address:
    choice = random.random()
    if choice < 0.15 and own:
        return random.choice(own)
    mine = [r for r in snapshot.routes if r.family == family]  # type: ignore[union-attr]
    made = [r for r in mine if r.protocol != 2]
    if choice < 0.5 and made:
        return host(random, random.choice(made).dst)
    if choice < 0.75 and mine:
        return host(random, random.choice(mine).dst)
    if family == 4:
        if choice < 0.85:
            return IPv4Address(
                random.choice(
                    ("127.0.0.1", "127.1.2.3", "255.255.255.255", "224.0.0.5", "239.1.2.3",
                     "0.1.2.3", "192.0.2.1", "240.0.0.1")
                )
            )  # fmt: skip
        return IPv4Address(10 << 24 | random.randint(0, 6) << 16 | random.randint(0, 0x1FF))
    if choice < 0.85:
        return IPv6Address(
            random.choice(("::1", "ff02::1", "ff05::2", "fe80::1", "2001:db8:ffff::1", "fec0::1"))
        )
    base = random.choice((0xFD00 << 112, 0x20010DB8 << 96))
    return IPv6Address(base | random.randint(0, 6) << 64 | random.randint(0, 0x1FF))


def host(random: Random, net: IPNetwork) -> IPv4Address | IPv6Address:
    last = min(net.num_addresses - 1, 1 << 20)
    return net[random.choice((0, min(1, last), last, random.randint(0, last), last // 2))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--family", type=int, choices=(4, 6))
    parser.add_argument("--json", action="store_true", help="only the figures")
    options = parser.parse_args(arguments)
    result = run(options.cases, options.seed, (options.family,) if options.family else (4, 6))
    if not options.json:
        for example in result.examples:
            print(example)
    print(json.dumps(result.summary()))
    return 1 if result.disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
