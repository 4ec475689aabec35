"""Two chains of one priority: the kernel takes one order or the other, the walk shows both.

In `nft_later` nftables' chain is registered after iptables' table, and so runs first; in the other
bed it is the other way round.
"""

from __future__ import annotations

import random

from gketrace.simulate.walk import walk
from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.generate import Generator
from tests.kernel.oracle.run import rig, run_cases

DROPS_MARKED = """*filter
-A FORWARD -p udp -m mark --mark 0x1 -j DROP
-A INPUT -p udp -m mark --mark 0x1 -j DROP
COMMIT
"""
MARKS = """table ip marks {
  chain forward { type filter hook forward priority 0; meta l4proto udp meta mark set 0x1; }
  chain input { type filter hook input priority 0; meta l4proto udp meta mark set 0x1; }
}
"""
CASES = 20


def ends(*, nft_later: bool) -> dict[str, int]:
    """How often each end came, after each packet was judged; the walk must show the kernel's."""
    with Bed() as bed:
        steps = [
            lambda: bed.command(["iptables-legacy-restore"], text=DROPS_MARKED),
            lambda: bed.command(["nft", "-f", "-"], text=MARKS),
        ]
        for step in steps if nft_later else reversed(steps):
            step()
        maker = Generator(rng=random.Random(7), family=4, backend="legacy")
        udp = (case for case in maker.cases(bed) if case.packet.protocol == 17 and case.ingress)
        with rig(bed, walk, legacy=True) as machine:
            tally = run_cases(machine, "equal priorities", udp, CASES)
    assert (len(tally.disagreements), tally.unknown, tally.lost) == (0, 0, 0), [
        *map(str, tally.disagreements[:2]),
        *map(str, tally.unknowns[:2]),
    ]
    return dict(tally.ends)


def test_the_later_registered_chain_runs_first() -> None:
    nft_first, legacy_first = ends(nft_later=True), ends(nft_later=False)
    assert set(nft_first) == {"gone"}
    assert legacy_first["sent"] + legacy_first["local"] > CASES / 2
