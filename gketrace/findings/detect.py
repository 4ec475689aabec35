"""The detectors, in the order of the registry, and `find`, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from importlib import import_module
from typing import Any, Final, TypeAlias

from gketrace.findings.grouping import grouped
from gketrace.findings.model import Finding
from gketrace.findings.world import World
from gketrace.snapshot import Unavailable

__all__ = ["DETECTORS", "Detector", "Needs", "find", "load"]

Detector: TypeAlias = Callable[[World], Iterable[Finding]]


class Needs(Enum):
    """What a detector cannot do without.

    Where a world has none of it, the detector's module is not even loaded: a good part of what a
    short answer takes is loading.
    """

    OBJECTS = "Kubernetes objects"
    BROKEN_WAYS = "traced ways that end before their target"
    STRAIGHT_WAYS = "traced ways to addresses that no Service has"
    CONNECTIONS = "a node's connections"
    NAMESPACES = "a node's or pod's links, routes, rules, sockets or counters"


_BROKEN: Final = (Needs.BROKEN_WAYS,)
_READ: Final = (Needs.NAMESPACES,)
_TRACKED: Final = (Needs.CONNECTIONS,)
_OBJECTS: Final = (Needs.OBJECTS,)

DETECTORS: Final[tuple[tuple[tuple[str, ...], tuple[Needs, ...], str], ...]] = (
    (("GKT-101", "GKT-102"), _OBJECTS, "services.no_endpoints"),
    (("GKT-103", "GKT-104"), _OBJECTS, "services.local_policies"),
    (("GKT-105", "GKT-106"), _READ, "listeners.listeners"),
    (("GKT-107",), _OBJECTS, "services.named_ports"),
    (("GKT-108",), _OBJECTS, "services.source_ranges"),
    (("GKT-109",), _OBJECTS, "services.port_clashes"),
    (("GKT-110", "GKT-111", "GKT-112"), _READ, "proxy.drift"),
    (("GKT-113", "GKT-118"), _READ, "proxy.canaries"),
    (("GKT-114", "GKT-116"), _READ, "proxy.health"),
    (("GKT-115",), _READ, "proxy.backends"),
    (("GKT-116",), _BROKEN, "balancers.health_checks"),
    (("GKT-117",), _READ, "proxy.affinity"),
    (("GKT-119", "GKT-201", "GKT-202"), _BROKEN, "astray.astray"),
    (("GKT-201", "GKT-202"), _TRACKED, "flows.stale"),
    (("GKT-203",), _TRACKED, "flows.older_than_rules"),
    (("GKT-204", "GKT-205"), _READ, "tables.room"),
    (("GKT-206",), _READ, "tables.losses"),
    (("GKT-207",), _TRACKED, "tables.ports"),
    (("GKT-208",), _TRACKED, "flows.one_sided"),
    (("GKT-209",), _READ, "tables.invalid"),
    (("GKT-210",), _TRACKED, "flows.unreplied"),
    (("GKT-301", "GKT-302", "GKT-303", "GKT-304", "GKT-321"), _BROKEN, "ways.failing_ways"),
    (("GKT-305", "GKT-306", "GKT-308"), _READ, "routes.routes"),
    (("GKT-305", "GKT-306"), _READ, "routes.pod_routes"),
    (("GKT-309",), _READ, "routes.stale_routes"),
    (("GKT-310",), _READ, "routes.local_routes"),
    (("GKT-311",), _READ, "links.duplicates"),
    (("GKT-312",), _READ, "links.neighbours"),
    (("GKT-313",), _READ, "links.links_down"),
    (("GKT-314",), _READ, "links.bridge_switches"),
    (("GKT-315",), _READ, "links.hairpin"),
    (("GKT-316", "GKT-317"), _READ, "links.mtus"),
    (("GKT-318",), (Needs.NAMESPACES, Needs.STRAIGHT_WAYS), "masquerade.missing"),
    (("GKT-319",), (Needs.STRAIGHT_WAYS,), "masquerade.too_wide"),
    (("GKT-320",), _READ, "masquerade.node_local_dns"),
    (("GKT-322",), _READ, "kinds.pod_rules"),
    (("GKT-323",), _READ, "kinds.data_planes"),
    (("GKT-324",), _READ, "kinds.sandboxes"),
    (("GKT-325",), _OBJECTS, "kinds.host_network"),
)
"""(the codes that it is the first to give, what it needs one of, module and function); `ways` gives
codes of others, too."""


def find(world: World, *, ignore: Sequence[str] = ()) -> tuple[Finding, ...]:
    """All that is to be said of `world`, grouped by cause, the worst first.

    `ignore`: codes that are left out.
    """
    there = _there(world)
    found: list[Finding] = []
    for _, needs, name in DETECTORS:
        if there.intersection(needs):
            found += (one for one in load(name)(world) if one.code not in ignore)
    return grouped(found)


def load(name: str) -> Detector:
    """The detector of that module and function."""
    module, _, function = name.partition(".")
    detector: Any = getattr(import_module(f"gketrace.findings.{module}"), function)
    return detector  # type: ignore[no-any-return]


def _there(world: World) -> set[Needs]:
    """What `world` has."""
    found = {Needs.OBJECTS}
    if any(way.standing == "broken" for way in world.ways):
        found.add(Needs.BROKEN_WAYS)
    if any(way.path.front_door in ("Address", "Pod") for way in world.ways):
        found.add(Needs.STRAIGHT_WAYS)
    sights = world.sights.values()
    if not all(isinstance(sight.entries, Unavailable) for sight in sights):
        found.add(Needs.CONNECTIONS)
    if not all(sight.is_blind for sight in sights):
        found.add(Needs.NAMESPACES)
    return found
