"""A run over the kube-proxy dumps."""

from __future__ import annotations

import random

from gketrace.simulate.walk import walk
from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.fixtures import worlds
from tests.kernel.oracle.record import Record
from tests.kernel.oracle.run import Tally, rig, run_cases

__all__ = ["run_fixtures", "summary"]


def run_fixtures(
    count: int,
    seed: int,
    wanted: str = "",
    *,
    quiet: bool = True,
    records: list[Record] | None = None,
) -> Tally:
    """The dumps whose name contains `wanted`, `count` cases shared out among them."""
    chosen = [world for world in worlds() if wanted in world.name]
    total = Tally()
    for index, world in enumerate(chosen):
        share = count // len(chosen) + (index < count % len(chosen))
        rng = random.Random(f"{seed}/{world.name}")
        with Bed(node=world.node) as bed:
            world.restore(bed)
            with rig(bed, walk, legacy=world.backend == "legacy", records=records) as machine:
                tally = run_cases(machine, world.name, world.cases(rng), share)
        if not quiet:
            print(f"{world.name}: {summary(tally)}")
        total.add(tally)
    return total


def summary(tally: Tally) -> str:
    return (
        f"{tally.cases} cases, {tally.agreements} agreements, {len(tally.disagreements)} "
        f"disagreements, {tally.unknown} unknown, {tally.lost} lost; {dict(tally.ends)}"
    )
