"""Parse → render → iptables-restore accepts it, and the kernel then prints the same rules.

Over every fixture, and over random rule sets with every match and target that this kernel has; both
backends, both families.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gketrace.ruleset.iptables_save import parse_iptables_save
from gketrace.ruleset.render import render_ruleset
from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.generate import Generator, probe_kernel
from tests.kernel.oracle.random_sets import clean, prepare

WORLDS = Path(__file__).resolve().parents[1] / "data/worlds"
DUMPS = sorted(path for path in WORLDS.glob("*/node-*/ip*tables-save.txt") if path.stat().st_size)
EVERYTHING = sorted((WORLDS.parent / "rules").glob("*.txt"))
"""Every match and target."""
ACCOUNTS = ("ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts")
RANDOM_SETS = 12
"""For each backend and family."""


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed() as made:
        prepare(made)
        for account in ACCOUNTS:
            made.command(["nfacct", "add", account])
        made.command(["nfacct", "add", "gkt_x"])
        yield made


@pytest.fixture(scope="module")
def absent(bed: Bed) -> frozenset[str]:
    return probe_kernel(bed)


def tables(text: str) -> dict[str, list[str]]:
    """Table → its chains and rules, without counters, which packets may move meanwhile; without
    tables that hold nothing."""
    found: dict[str, list[str]] = {}
    rows: list[str] = []
    for line in re.sub(r"^\[\d+:\d+\] | \[\d+:\d+\]$", "", text, flags=re.M).splitlines():
        if line.startswith("*"):
            rows = found[line] = []
        elif line.startswith((":", "-A")):
            rows.append(line)
    empty = re.compile(r":[A-Z]+ ACCEPT").fullmatch
    return {table: rows for table, rows in found.items() if not all(map(empty, rows))}


def there_and_back(bed: Bed, text: str, backend: str, family: int) -> None:
    """`text` into the kernel, its dump through our model, and that into the kernel again."""
    tool = f"{'ip' if family == 4 else 'ip6'}tables-{backend}"
    try:
        bed.command([f"{tool}-restore", "-c"], text=text)
        printed = bed.command([f"{tool}-save", "-c"])
        parsed = parse_iptables_save(
            printed.encode(), source=tool, backend=f"iptables-{backend}", family=family
        )
        rendered = "\n".join(render_ruleset(parsed, counters=True)) + "\n"
        bed.command([f"{tool}-restore", "--test", "-c"], text=rendered)
        clean(bed, f"{tool}-restore")
        bed.command([f"{tool}-restore", "-c"], text=rendered)
        assert tables(bed.command([f"{tool}-save", "-c"])) == tables(printed)
    finally:
        clean(bed, f"{tool}-restore")


@pytest.mark.parametrize(
    "path", DUMPS, ids=lambda p: f"{p.parents[1].name}/{p.parent.name}/{p.name}"
)
def test_every_dump(bed: Bed, path: Path) -> None:
    backend = "legacy" if "legacy" in path.parents[1].name else "nft"
    there_and_back(bed, path.read_text(), backend, 6 if path.name.startswith("ip6") else 4)


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.stem)
def test_every_match_and_target(bed: Bed, path: Path) -> None:
    tool, backend = path.stem.split("-")
    family = 6 if tool == "ip6tables" else 4
    inet = "inet6" if family == 6 else "inet"
    bed.command(["ipset", "create", "gkts", "hash:ip,port", "family", inet])
    try:
        there_and_back(bed, path.read_text(), backend, family)
    finally:
        # A rule's reference to a set is dropped a moment after the rule.
        deadline = time.monotonic() + 10
        while True:
            try:
                bed.command(["ipset", "destroy", "gkts"])
                break
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("backend", ["legacy", "nft"])
def test_random_rule_sets(bed: Bed, absent: frozenset[str], backend: str, family: int) -> None:
    accepted = 0
    tool = f"{'ip' if family == 4 else 'ip6'}tables-{backend}-restore"
    for number in range(RANDOM_SETS):
        maker = Generator(
            rng=random.Random(f"roundtrip/{number}"),
            family=family,
            backend=backend,
            absent=absent,
            mac=bed.peer_mac("eth0"),
        )
        text = maker.ruleset()
        try:
            bed.command([tool], text=text)
        except RuntimeError:
            clean(bed, tool)  # two parts that do not go together
            continue
        accepted += 1
        there_and_back(bed, text, backend, family)
    assert accepted > RANDOM_SETS // 2
