"""iptables-nft's rules read by netlink are, byte for byte, what iptables-nft-save -c prints.

Over every fixture, every match and target, random rule sets, and rules typed with odd options; both
families.  What is not known is left out and named, never guessed.
"""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket
from gketrace_agent.kernel.nfnetlink import nft_tables
from gketrace_agent.kernel.nft_rules import NftText, nft_chains, nft_text
from gketrace_agent.kernel.nft_rules.dump import RuleDump, head_of
from gketrace_agent.kernel.nft_rules.rule import RuleReader
from gketrace_agent.kernel.nft_rules.sets import SetNames, ask_for_name
from gketrace_agent.kernel.nft_rules.words import NotRendered
from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.generate import Generator, probe_kernel
from tests.kernel.oracle.random_sets import prepare

DATA = Path(__file__).resolve().parents[1] / "data"
DUMPS = sorted(
    path
    for path in DATA.glob("worlds/*-iptables-nft/node-*/ip*tables-save.txt")
    if path.stat().st_size
)
ACCOUNTS = ("ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts", "gkt_x")
RANDOM_SETS = 6
"""For each family."""
PATIENCE = 20.0
"""Seconds."""
UNKNOWN = {
    4: "ah cluster connlabel cpu dccp devgroup ipcomp osf policy realm time "
    "ECN HMARK IDLETIMER RATEEST SYNPROXY",
    6: "ah cluster connlabel cpu dccp devgroup dst eui64 frag hbh ipcomp ipv6header mh policy rt "
    "srh time DNPT IDLETIMER RATEEST SNPT SYNPROXY",
}
"""Matches and targets that are left to iptables-nft-save."""
LIMITATIONS = Path(__file__).resolve().parents[2] / "docs/limitations.md"


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed() as made:
        prepare(made)
        for account in ACCOUNTS:
            made.command(["nfacct", "add", account])
        yield made


@pytest.fixture(scope="module")
def absent(bed: Bed) -> frozenset[str]:
    return probe_kernel(bed)


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
    deadline = time.monotonic() + PATIENCE
    while True:
        found = read(bed, family)
        assert found.left == ()
        if found.text.decode() == saved(bed, family):
            return found.text.decode()
        if time.monotonic() > deadline:
            assert found.text.decode().splitlines() == saved(bed, family).splitlines()
        # The kernel's own packets (neighbour discovery) may have moved a counter in between.


@pytest.mark.parametrize(
    "path", DUMPS, ids=lambda p: f"{p.parents[1].name}/{p.parent.name}/{p.name}"
)
def test_every_dump(empty: Bed, path: Path) -> None:
    family = 6 if path.name.startswith("ip6") else 4
    tool = "iptables-nft-restore" if family == 4 else "ip6tables-nft-restore"
    empty.command([tool, "-c"], text=path.read_text())
    assert "-A KUBE-SERVICES" in assert_same(empty, family)


@pytest.mark.parametrize("family", [4, 6])
def test_every_match_and_target(empty: Bed, family: int) -> None:
    """Rule by rule: each is the same line, or is one of those that are named as not known."""
    tool, inet = ("iptables", "inet") if family == 4 else ("ip6tables", "inet6")
    empty.command(["ipset", "create", f"gkts{family}", "hash:ip,port", "family", inet])
    rules = (DATA / "rules" / f"{tool}-nft.txt").read_text().replace("gkts", f"gkts{family}")
    empty.command([f"{tool}-nft-restore"], text=rules)
    wanted: dict[tuple[str, str], list[str]] = {}
    for line in saved(empty, family).splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif found := re.match(r"\[\d+:\d+\] -A (\S+)", line):
            wanted.setdefault((table, found[1]), []).append(without_counters(line))
    lines, unknown = empty.in_dut(lambda: read_each(family))
    assert set(lines) == set(wanted)
    for chain, said in lines.items():
        for ours, theirs in zip(said, wanted[chain], strict=True):
            assert ours in (None, theirs)
    named = set(re.findall(r"`(\w+)`", LIMITATIONS.read_text().partition("over netlink")[2]))
    assert unknown == {*UNKNOWN[family].split(), "hashlimit with flags 0x31"}
    assert set(UNKNOWN[family].split()) <= named


def without_counters(line: str) -> str:
    """Those of rules that the kernel's own packets may meet."""
    return line.partition("] ")[2]


def read_each(family: int) -> tuple[dict[tuple[str, str], list[str | None]], set[str]]:
    """(table, chain) → its rules' lines, None for those that are not known; what is not."""
    lines: dict[tuple[str, str], list[str | None]] = {}
    unknown: set[str] = set()
    netfilter = NetlinkSocket(NETLINK_NETFILTER)
    reader = RuleReader(family, SetNames(lambda index: ask_for_name(netfilter, index)))
    with RuleDump(socket.AF_INET if family == 4 else socket.AF_INET6) as dump:
        for table, chains in nft_chains(netfilter, family).items():
            for chain in chains:
                head = head_of(table, chain.name)
                for body in dump.rules(head):
                    said: str | None = None
                    try:
                        said = without_counters(reader.line(body[4 + len(head) :], chain.name))
                    except NotRendered as reason:
                        name = re.fullmatch(r"(?:match|target) (\S+) of revision \d", str(reason))
                        unknown.add(name[1] if name else str(reason))
                    lines.setdefault((table, chain.name), []).append(said)
    netfilter.close()
    return lines, unknown


@pytest.mark.parametrize("family", [4, 6])
def test_random_rule_sets(empty: Bed, absent: frozenset[str], family: int) -> None:
    tool = "iptables-nft-restore" if family == 4 else "ip6tables-nft-restore"
    accepted = 0
    for number in range(RANDOM_SETS):
        maker = Generator(
            rng=random.Random(f"nft-rules/{number}"),
            family=family,
            backend="nft",
            absent=absent,
            mac=empty.peer_mac("eth0"),
        )
        try:
            empty.command([tool], text=maker.ruleset())
        except RuntimeError:
            empty.command(["nft", "flush", "ruleset"])  # two parts that do not go together
            continue
        accepted += 1
        assert_same(empty, family)
    assert accepted > RANDOM_SETS // 2


ODD = """\
*filter
:INPUT DROP [7:700]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [18446744073709551615:18446744073709551615]
:odd.chain~name - [0:0]
:empty - [0:0]
:C1 - [0:0]
[1:2] -A FORWARD ! -s ADDRESS ! -d NETWORK ! -i eth0 ! -o eth+ ! -p tcp -j C1
[18446744073709551615:3] -A INPUT -i a-name-of-fiftn -g odd.chain~name
-A INPUT -i + -j C1
-A INPUT ! -i + -j C1
-A FORWARD ! -o + -j C1
-A INPUT -s ADDRESS/ODDMASK -j C1
-A INPUT ! -d ADDRESS/ODDMASK -j C1
-A INPUT -p tcp -m tcp ! --sport 1000:2000 ! --dport 0:99 -j RETURN
-A INPUT -p tcp -m tcp --sport 0:5 --dport 65535 -j RETURN
-A INPUT -p tcp -m tcp --sport 7 --dport 8 -j RETURN
-A INPUT -p tcp -m tcp ! --sport 7 ! --dport 8 -j RETURN
-A INPUT -p tcp -m tcp ! --sport 7 --dport 8 -j RETURN
-A INPUT -p udp -m udp --sport 0 --dport 0:65535 -j RETURN
-A INPUT -p udp -m udp -j RETURN
-A INPUT -p tcp -m tcp
-A INPUT -p 255
-A INPUT -p 2
-A INPUT
-A C1 -m comment --comment "with \\"quotes\\", \\\\, $ and %s %% 100%"
-A C1 -m comment --comment "grüße ☃"
-A C1 -m comment --comment "LONG"
-A C1 -m mark ! --mark 0x0/0x0 -m mark --mark 0x1 -m comment --comment a -m mark --mark 0x2/0x3
-A C1 -m limit --limit 1/day -m limit --limit 7/hour --limit-burst 9 -m limit --limit 10000/sec
-A C1 -j NFLOG --nflog-prefix "it's"
-A C1 -j NFLOG --nflog-group 65535 --nflog-size 0
COMMIT
*security
:INPUT ACCEPT [0:0]
COMMIT
"""
SPECIAL = {
    4: {"ADDRESS": "10.1.2.3", "NETWORK": "10.1.2.0/23", "ODDMASK": "255.0.255.1"},
    6: {"ADDRESS": "fd00::1:2", "NETWORK": "fd00::/63", "ODDMASK": "ffff:0:ffff::1"},
}


@pytest.mark.parametrize("family", [4, 6])
def test_odd_options(empty: Bed, family: int) -> None:
    tool = "iptables-nft" if family == 4 else "ip6tables-nft"
    text = ODD.replace("LONG", "x" * 250)
    for word, value in SPECIAL[family].items():
        text = text.replace(word, value)
    empty.command([f"{tool}-restore", "-c"], text=text)
    if family == 4:
        empty.command(["iptables-nft", "-A", "C1", "-f", "-j", "DROP"])
        empty.command(["iptables-nft", "-A", "C1", "!", "-f", "-j", "DROP"])
    printed = assert_same(empty, family)
    assert "grüße ☃" in printed
    assert " -i a-name-of-fiftn " in printed


def test_no_tables_are_no_text(empty: Bed) -> None:
    assert assert_same(empty, 4) == ""
    empty.command(["iptables-nft", "-t", "mangle", "-N", "KUBE-KUBELET-CANARY"])
    assert assert_same(empty, 6) == ""
    assert ":KUBE-KUBELET-CANARY - [0:0]" in assert_same(empty, 4)
    empty.command(["nft", "add table ip raw; add table ip mine"])
    assert "*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n" in assert_same(empty, 4)


def test_comments_of_nft_itself(empty: Bed) -> None:
    empty.command(["iptables-nft", "-A", "INPUT", "-p", "tcp", "--dport", "80", "-j", "ACCEPT"])
    rule = "add rule ip filter INPUT meta l4proto 6 counter drop comment \"by 'nft'\""
    empty.command(["nft", rule])
    assert "-p tcp -m comment --comment \"by \\'nft\\'\" -j DROP" in assert_same(empty)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("ip saddr { 10.0.0.1, 10.0.0.2 } counter drop", "expression lookup"),
        ("ct state new counter accept", "expression ct"),
        ("meta mark set 0x1", "meta key 3 set"),
        ("ip saddr 10.0.0.1 ip saddr 10.0.0.2 accept", "two tests for -s"),
        ("ip saddr >= 10.0.0.1 accept", "comparison 5"),
        ("ip ttl 5 accept", "test of the IP header at 8"),
        ("tcp dport 1-9 tcp dport != 5 accept", "two tests for --dport"),
        ("udp length 5 accept", "test of the transport header at 4"),
        ("ether saddr 02:00:00:00:00:01 accept", "test of meta key 8"),
        ("counter counter accept", "counter of another kind"),
        ("log group 2 counter accept", "expression counter behind the target"),
        ("limit rate over 5/second accept", "limit of another kind"),
        ("limit rate 5 bytes/second accept", "limit of another kind"),
        ('log prefix "x"', "log of another kind"),
        ("continue", "verdict -1"),
        ("tcp flags & (syn | ack) == syn meta l4proto 17 accept", "two tests for -p"),
    ],
)
def test_what_is_not_known_is_named(empty: Bed, rule: str, reason: str) -> None:
    """... and the other tables are read all the same."""
    empty.command(["iptables-nft", "-A", "INPUT", "-j", "ACCEPT"])
    empty.command(["iptables-nft", "-t", "mangle", "-A", "INPUT", "-j", "ACCEPT"])
    empty.command(["nft", f"add rule ip filter INPUT {rule}"])
    found = read(empty, 4)
    (left,) = found.left
    assert (left.table, left.reason) == ("filter", f"rule 2 of INPUT: {reason}")
    assert found.text.startswith(b"*mangle\n")
    assert found.text.count(b"*") == 1


@pytest.mark.parametrize(
    "chain",
    [
        "mine { type filter hook input priority 0; }",
        "INPUT { type filter hook input priority 1; }",
        "FORWARD { type filter hook output priority 0; }",
        "OUTPUT { type route hook output priority 0; }",
    ],
)
def test_base_chains_of_others_are_named(empty: Bed, chain: str) -> None:
    empty.command(["nft", f"add table ip filter; add chain ip filter {chain}"])
    (left,) = read(empty, 4).left
    assert left.table == "filter"
    assert left.reason == f"base chain {chain.split()[0]} is not one of iptables"
