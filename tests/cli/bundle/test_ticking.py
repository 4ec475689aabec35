"""Counters are a difference where a finding rests on them, and nowhere else."""

from __future__ import annotations

from gketrace.findings.detect import find
from gketrace.findings.world import TableState
from gketrace_cli.bundle.ticking import ticking
from tests.core.findings.worlds import Bench, beyond

INVALID = "-A KUBE-FORWARD -m conntrack --ctstate INVALID "


def test_the_counter_of_the_rule_that_drops() -> None:
    bench = Bench()
    before = bench.world(trace=False)
    bench.rules("2jdh", lambda text: text.replace(f"[0:0] {INVALID}", f"[130:5200] {INVALID}"))
    after = bench.world(trace=False)
    findings = beyond(find(after))
    assert [one.code for one in findings] == ["GKT-209"]
    (one,) = ticking(before, after, findings)
    assert (one.part.noun, one.part.node, one.kind) == ("rulesets", "2jdh", "changed")
    assert one.name.startswith(INVALID)
    assert (one.before, one.after) == ("0 packets", "130 packets")
    assert ticking(after, after, findings) == ()


def test_only_the_counter_that_is_cited() -> None:
    bench = Bench()
    bench.tables["m69d"] = (TableState(entries=1, limit=100, counters={"found": 7}),) * 2
    before = bench.world(trace=False)
    bench.tables["m69d"] = (
        TableState(entries=1, limit=100, counters={"found": 900, "insert_failed": 40}),
        TableState(entries=1, limit=100, counters={"found": 930, "insert_failed": 43}),
    )
    after = bench.world(trace=False)
    findings = beyond(find(after))
    assert [one.code for one in findings] == ["GKT-206"]
    (one,) = ticking(before, after, findings)
    assert (one.part.noun, one.part.node) == ("conntrack", "m69d")
    assert one.name == "/proc/net/stat/nf_conntrack: insert_failed"
    assert (one.before, one.after) == ("0", "40")
