"""Faults that this kernel or this machine cannot have, put into what was read of a lab.

nf_conntrack_max belongs to the machine and not to a namespace, so a table cannot be filled without
harm to others; the race behind insert_failed cannot be had on demand; Dataplane V2 and gVisor are
not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from e2e.scenarios.model import Scenario
from e2e.scenarios.stage import Stage
from gketrace.findings.world import Sight, TableState, World
from gketrace.snapshot import Unavailable

__all__ = ["SCENARIOS"]


def _nothing(stage: Stage) -> None:
    """Nothing is done to the lab."""


def _sight(world: World, change: Callable[[Sight], Sight]) -> World:
    """One node's sight changed."""
    node = next(name for name in world.sights if name.endswith("m69d"))
    return replace(world, sights={**world.sights, node: change(world.sights[node])})


def _table(entries: int, limit: int, **counters: int) -> Callable[[World], World]:
    state = TableState(entries=entries, limit=limit, counters=counters)
    return lambda world: _sight(world, lambda one: replace(one, table=state, table_later=state))


def _rising(world: World) -> World:
    before = TableState(entries=100, limit=262144, counters={"insert_failed": 40})
    after = TableState(entries=100, limit=262144, counters={"insert_failed": 43})
    return _sight(world, lambda one: replace(one, table=before, table_later=after))


def _dataplane(world: World) -> World:
    return _sight(
        world,
        lambda one: replace(
            one,
            plane="dataplane-v2",
            plane_reason="cilium_host is there",
            host=replace(one.host, rulesets=()),
        ),
    )


def _gvisor(world: World) -> World:
    why = Unavailable(reason="the pod runs in gVisor, whose sockets the kernel does not see")

    def change(one: Sight) -> Sight:
        pods = dict(one.pods)
        shot = pods["default/web-1"]
        assert not isinstance(shot, Unavailable)
        pods["default/web-1"] = replace(shot, sockets=why)
        return replace(one, pods=pods, handlers={"default/web-1": "gvisor"})

    return _sight(world, change)


SCENARIOS: Final = (
    Scenario(
        code="GKT-204",
        title="the table 95 % full",
        fault=_nothing,
        alter=_table(249_000, 262_144),
        proof=("nf_conntrack_count = 249000", "nf_conntrack_max = 262144"),
    ),
    Scenario(
        code="GKT-205",
        title="the table full, entries dropped",
        fault=_nothing,
        alter=_table(262_144, 262_144, drop=512, early_drop=31),
        proof=("nf_conntrack_count = 262144", "drop 512"),
    ),
    Scenario(
        code="GKT-206",
        title="insert_failed rises",
        fault=_nothing,
        alter=_rising,
        proof=("insert_failed 40", "rose by 3"),
    ),
    Scenario(
        code="GKT-323",
        title="a node with Dataplane V2",
        fault=_nothing,
        alter=_dataplane,
        proof=("cilium_host",),
    ),
    Scenario(
        code="GKT-324",
        title="a pod in gVisor",
        fault=_nothing,
        alter=_gvisor,
        proof=("runtime handler gvisor",),
    ),
)
