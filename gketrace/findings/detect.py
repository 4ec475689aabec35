"""The detectors, in the order of the registry, and `find`, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from gketrace.findings import listeners, proxy, services
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
    (("GKT-117",), proxy.affinity),
)
"""(codes, detector)."""


def find(world: World, *, ignore: Sequence[str] = ()) -> tuple[Finding, ...]:
    """All that is to be said of `world`, grouped by cause, the worst first.

    `ignore`: codes that are left out.
    """
    found: list[Finding] = []
    for codes, detector in DETECTORS:
        if not set(codes) <= set(ignore):
            found += (one for one in detector(world) if one.code not in ignore)
    return grouped(found)
