"""iptables-nft's rules read by netlink are, byte for byte, what iptables-nft-save -c prints.

Over every fixture, every match and target, random rule sets, and rules typed with odd options; both
families.  What is not known is left out and named, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket
from gketrace_agent.kernel.nfnetlink import nft_tables
from gketrace_agent.kernel.nft_rules import NftText, nft_chains, nft_text
from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.random_sets import prepare

DATA = Path(__file__).resolve().parents[1] / "data"
DUMPS = sorted(
    path
    for path in DATA.glob("worlds/*-iptables-nft/node-*/ip*tables-save.txt")
    if path.stat().st_size
)
ACCOUNTS = ("ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts", "gkt_x")
RANDOM_SETS = 15
"""For each family."""


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(prefix="gknr") as made:
        prepare(made)
        for account in ACCOUNTS:
            made.command(["nfacct", "add", account])
        yield made


@pytest.fixture
def empty(bed: Bed) -> Iterator[Bed]:
    yield bed
    bed.command(["nft", "flush", "ruleset"])


def read(bed: Bed, family: int) -> NftText:
    def inside() -> NftText:
        netfilter = NetlinkSocket(NETLINK_NETFILTER)
        try:
            kind = "ip" if family == 4 else "ip6"
            names = {table.name for table in nft_tables(netfilter) if table.family == kind}
            return nft_text(netfilter, family, names, nft_chains(netfilter, family))
        finally:
            netfilter.close()

    return bed.in_dut(inside)


def saved(bed: Bed, family: int) -> str:
    """What iptables-nft-save prints, without the times."""
    tool = "iptables-nft-save" if family == 4 else "ip6tables-nft-save"
    text = bed.command([tool, "-c"])
    return re.sub(r"^# (?:Generated|Completed) .*\n", "", text, flags=re.M)


def assert_same(bed: Bed, family: int = 4) -> str:
    found = read(bed, family)
    assert found.left == ()
    text = found.text.decode("latin-1").encode("latin-1").decode()
    assert text.splitlines() == saved(bed, family).splitlines()
    assert text == saved(bed, family)
    return text


def tables(text: str) -> dict[str, str]:
    return {
        part.partition("\n")[0]: part for part in re.findall(r"^\*.*?^COMMIT\n", text, re.M | re.S)
    }


@pytest.mark.parametrize(
    "path", DUMPS, ids=lambda p: f"{p.parents[1].name}/{p.parent.name}/{p.name}"
)
def test_every_dump(empty: Bed, path: Path) -> None:
    family = 6 if path.name.startswith("ip6") else 4
    tool = "iptables-nft-restore" if family == 4 else "ip6tables-nft-restore"
    empty.command([tool, "-c"], text=path.read_text())
    assert "-A KUBE-SERVICES" in assert_same(empty, family)
