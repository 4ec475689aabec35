"""The detectors, in the order of the registry, and `find`, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from gketrace.findings import (
    balancers,
    flows,
    kinds,
    links,
    listeners,
    masquerade,
    proxy,
    routes,
    services,
    tables,
    ways,
)
from gketrace.findings.grouping import grouped
from gketrace.findings.model import Finding
from gketrace.findings.world import World

__all__ = ["DETECTORS", "Detector", "find"]

Detector = Callable[[World], Iterable[Finding]]

DETECTORS: Final[tuple[tuple[tuple[str, ...], Detector], ...]] = (
    (("GKT-101", "GKT-102"), services.no_endpoints),
    (("GKT-103", "GKT-104"), services.local_policies),
    (("GKT-105", "GKT-106"), listeners.listeners),
    (("GKT-107",), services.named_ports),
    (("GKT-108",), services.source_ranges),
    (("GKT-109",), services.port_clashes),
    (("GKT-110", "GKT-111", "GKT-112"), proxy.drift),
    (("GKT-113", "GKT-118"), proxy.canaries),
    (("GKT-114", "GKT-116"), proxy.health),
    (("GKT-115",), proxy.backends),
    (("GKT-116",), balancers.health_checks),
    (("GKT-117",), proxy.affinity),
    (("GKT-201", "GKT-202"), flows.stale),
    (("GKT-203",), flows.older_than_rules),
    (("GKT-204", "GKT-205"), tables.room),
    (("GKT-206",), tables.losses),
    (("GKT-207",), tables.ports),
    (("GKT-208",), flows.one_sided),
    (("GKT-209",), tables.invalid),
    (("GKT-210",), flows.unreplied),
    (("GKT-301", "GKT-302", "GKT-303", "GKT-304", "GKT-321"), ways.failing_ways),
    (("GKT-305", "GKT-306", "GKT-308"), routes.routes),
    (("GKT-305", "GKT-306"), routes.pod_routes),
    (("GKT-309",), routes.stale_routes),
    (("GKT-310",), routes.local_routes),
    (("GKT-311",), links.duplicates),
    (("GKT-312",), links.neighbours),
    (("GKT-313",), links.links_down),
    (("GKT-314",), links.bridge_switches),
    (("GKT-315",), links.hairpin),
    (("GKT-316", "GKT-317"), links.mtus),
    (("GKT-318",), masquerade.missing),
    (("GKT-319",), masquerade.too_wide),
    (("GKT-320",), masquerade.node_local_dns),
    (("GKT-322",), kinds.pod_rules),
    (("GKT-323",), kinds.data_planes),
    (("GKT-324",), kinds.sandboxes),
    (("GKT-325",), kinds.host_network),
)
"""(the codes that it is the first to give, detector); `ways` gives codes of others, too."""


def find(world: World, *, ignore: Sequence[str] = ()) -> tuple[Finding, ...]:
    """All that is to be said of `world`, grouped by cause, the worst first.

    `ignore`: codes that are left out.
    """
    found: list[Finding] = []
    for _, detector in DETECTORS:
        found += (one for one in detector(world) if one.code not in ignore)
    return grouped(found)
