from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gketrace.errors import UnavailableError
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.snapshot import Unavailable
from gketrace_agent.kernel.process import Completed
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.observe import iptables_nft
from gketrace_agent.observe.iptables import (
    LEGACY,
    NFT,
    DumpCache,
    IptablesDump,
    IptablesDumps,
    Programs,
    start_iptables,
)
from tests.agent.observe.bed import Bed, Netns, wait_until


def read(
    netns: Netns,
    programs: Programs | None = None,
    cache: DumpCache | None = None,
    fresh: bool = False,
) -> IptablesDumps:
    def observe(reader: KernelReader) -> IptablesDumps:
        started = start_iptables(reader, programs or Programs(), cache=cache, fresh=fresh)
        dumps = started.finish()
        started.release((dumps, None))
        return dumps

    return netns.read(observe)


def lines(text: bytes | str) -> list[str]:
    """Without comments, which hold the time."""
    decoded = text if isinstance(text, str) else text.decode()
    return [line for line in decoded.splitlines() if not line.startswith("#")]


def which(dumps: IptablesDumps) -> list[tuple[str, int]]:
    assert not any(isinstance(dump, Unavailable) for dump in dumps.dumps), dumps
    return [(d.backend, d.family) for d in dumps.dumps if isinstance(d, IptablesDump)]


def test_a_namespace_without_rules_has_none_and_gets_none(bed: Bed) -> None:
    netns = bed.netns("empty")
    dumps = read(netns)
    assert dumps.dumps == ()
    assert not dumps.both
    for name in ("ip_tables_names", "ip6_tables_names"):
        assert netns.run("cat", f"/proc/net/{name}") == "", "reading made a table"


@pytest.mark.parametrize(("backend", "word"), [(LEGACY, "legacy"), (NFT, "nft")])
def test_the_dump_is_what_the_save_command_prints(bed: Bed, backend: str, word: str) -> None:
    netns = bed.netns("rules")
    netns.run(f"iptables-{word}", "-A", "INPUT", "-p", "tcp", "--dport", "80", "-j", "DROP")
    netns.run(f"iptables-{word}", "-t", "nat", "-N", "KUBE-SERVICES")
    netns.run(f"ip6tables-{word}", "-t", "mangle", "-P", "FORWARD", "DROP")
    dumps = read(netns)
    assert which(dumps) == [(backend, 4), (backend, 6)]
    assert dumps.primary == backend
    assert dumps.consistent
    assert not dumps.both
    v4, v6 = dumps.of(backend)
    assert lines(v4.text) == lines(netns.run(f"iptables-{word}-save", "-c"))
    assert lines(v6.text) == lines(netns.run(f"ip6tables-{word}-save", "-c"))
    assert v4.holds_rules
    assert v6.holds_rules, "a policy of DROP is a rule"
    assert (v4.generation is None) == (backend == LEGACY)
    ruleset = v4.ruleset()
    assert not isinstance(ruleset, Unavailable)
    assert (ruleset.backend, ruleset.family) == (backend, 4)


def test_rules_in_both_backends_are_said(bed: Bed) -> None:
    netns = bed.netns("both")
    netns.run("iptables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    netns.run("iptables-nft", "-A", "INPUT", "-j", "ACCEPT")
    dumps = read(netns)
    assert which(dumps) == [(LEGACY, 4), (NFT, 4)]
    assert dumps.both
    netns.run("iptables-nft", "-F", "INPUT")
    assert not read(netns).both, "an empty table holds no rules"


@pytest.mark.parametrize(
    ("hinted", "expected"), [("legacy", LEGACY), ("nft", NFT), ("nothing", NFT)]
)
def test_the_primary_backend_is_where_the_hint_is(bed: Bed, hinted: str, expected: str) -> None:
    netns = bed.netns("hint")
    for word in ("legacy", "nft"):
        netns.run(f"iptables-{word}", "-A", "INPUT", "-j", "ACCEPT")
    if hinted != "nothing":
        netns.run(f"iptables-{hinted}", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
    assert read(netns).primary == expected


def test_legacy_alone_without_a_hint_is_primary(bed: Bed) -> None:
    netns = bed.netns("old")
    netns.run("iptables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    assert read(netns).primary == LEGACY


@pytest.mark.parametrize(
    ("programs", "words"),
    [
        (
            Programs(legacy=("gko-no-such-program",), python_iptables=False),
            "none of gko-no-such-program is installed",
        ),
        (Programs(legacy=("false",)), "false exited with status 1"),
        (Programs(legacy=("true",)), "printed nothing"),
        (Programs(limit=10), "wrote more than 10 bytes"),
    ],
    ids=["missing", "fails", "silent", "long"],
)
def test_a_dump_that_fails_is_not_no_rules(bed: Bed, programs: Programs, words: str) -> None:
    netns = bed.netns("fails")
    netns.run("iptables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    (dump,) = read(netns, programs).dumps
    assert isinstance(dump, Unavailable)
    assert words in dump.reason
    assert "legacy" in dump.reason


def test_a_table_that_iptables_cannot_show_is_said(bed: Bed) -> None:
    netns = bed.netns("native")
    netns.run(
        "nft",
        "add table ip filter; add chain ip filter mine { type filter hook input priority 5; }",
    )
    netns.run("nft", "add rule ip filter mine ip saddr { 10.0.0.1, 10.0.0.2 } counter drop")
    (dump,) = read(netns).dumps
    assert isinstance(dump, Unavailable), dump
    assert "filter" in dump.reason


SEVERAL = """\
*mangle
-A PREROUTING -p tcp -m tcp --dport 80 -j MARK --set-xmark 0x1/0x1
COMMIT
*filter
-A INPUT -m cpu --cpu 1 -j ACCEPT
COMMIT
*nat
-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.40.0.6:8080
COMMIT
"""


@pytest.mark.parametrize("here", [0, 5000], ids=["child", "here"])
@pytest.mark.parametrize("more", ["", "*raw\n-A OUTPUT -m cpu --cpu 0\nCOMMIT\n"])
def test_a_table_with_a_match_that_is_not_known_comes_from_the_save_command(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, here: int, more: str
) -> None:
    """... and only that one: it is said which, and why."""
    monkeypatch.setattr(iptables_nft, "_HERE", here)
    netns = bed.netns("mixed")
    netns.run("iptables-nft-restore", stdin=SEVERAL + more)
    (dump,) = read(netns).dumps
    assert isinstance(dump, IptablesDump), dump
    assert sorted(lines(dump.text)) == sorted(lines(netns.run("iptables-nft-save", "-c")))
    assert dump.source.startswith("nf_tables by netlink, as iptables-nft-save -c, and /")
    assert ("iptables-nft-save -c -t filter for " in dump.source) == (not more)
    assert "table filter: rule 1 of INPUT: match cpu of revision 0" in dump.source
    assert ("table raw: rule 1 of OUTPUT" in dump.source) == bool(more)
    ruleset = dump.ruleset()
    assert isinstance(ruleset, IptablesRuleset)
    assert set(ruleset.tables) == {"mangle", "nat", "filter"} | ({"raw"} if more else set())


def test_a_large_set_is_read_by_a_process_of_its_own(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iptables_nft, "_HERE", 0)
    netns = bed.netns("large")
    netns.run("iptables-nft-restore", stdin=SEVERAL.replace("-m cpu --cpu 1", "-i eth0"))
    missing = Programs(nft_backend=("gko-none",), nft_backend6=("gko-none",))
    (dump,) = read(netns, missing).dumps
    assert isinstance(dump, IptablesDump), dump
    assert lines(dump.text) == lines(netns.run("iptables-nft-save", "-c"))
    assert dump.source == "nf_tables by netlink, as iptables-nft-save -c"


def test_without_the_save_command_an_unknown_match_is_said(bed: Bed) -> None:
    netns = bed.netns("unknown")
    netns.run("iptables-nft", "-A", "INPUT", "-m", "cpu", "--cpu", "1")
    (dump,) = read(netns, Programs(nft_backend=("gko-none",))).dumps
    assert isinstance(dump, Unavailable)
    assert "none of gko-none is installed" in dump.reason
    assert "table filter: rule 1 of INPUT: match cpu of revision 0" in dump.reason


def test_the_save_command_can_be_asked_for(bed: Bed) -> None:
    netns = bed.netns("asked")
    netns.run("iptables-nft", "-A", "INPUT", "-p", "tcp", "--dport", "80", "-j", "DROP")
    (asked,) = read(netns, Programs(netlink=False)).dumps
    (dump,) = read(netns).dumps
    assert isinstance(asked, IptablesDump)
    assert isinstance(dump, IptablesDump)
    assert asked.source.endswith("bin/iptables-nft-save -c")
    assert lines(asked.text) == lines(dump.text)


@pytest.mark.parametrize("here", [0, 20000], ids=["child", "here"])
def test_rules_that_change_while_they_are_read_are_read_again(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, here: int
) -> None:
    monkeypatch.setattr(iptables_nft, "_HERE", here)
    netns = bed.netns("changing")
    netns.run("iptables-nft", "-A", "INPUT", "-j", "ACCEPT")

    def observe(reader: KernelReader) -> IptablesDumps:
        started = start_iptables(reader, Programs())
        subprocess.run(["iptables-nft", "-A", "INPUT", "-j", "DROP"], check=True)
        return started.finish()

    dumps = netns.read(observe)
    (dump,) = dumps.dumps
    assert dumps.consistent
    assert isinstance(dump, IptablesDump)
    assert b"-A INPUT -j DROP\n" in dump.text


@pytest.mark.parametrize("error", [UnavailableError("no answer"), ValueError("broken")])
def test_when_netlink_fails_the_save_command_reads_all(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(iptables_nft, "nft_chains", fail)
    netns = bed.netns("failing")
    netns.run("iptables-nft-restore", stdin=SEVERAL)
    (dump,) = read(netns).dumps
    assert isinstance(dump, IptablesDump), dump
    assert lines(dump.text) == lines(netns.run("iptables-nft-save", "-c"))
    for table in ("filter", "mangle", "nat"):
        assert f"table {table}: {error}" in dump.source


def test_a_reader_that_dies_leaves_all_to_the_save_command() -> None:
    died = Completed(argv=("python",), returncode=-9, stdout=b"*nat\n", stderr="", seconds=1.0)
    found = iptables_nft.child_text(died, {"nat", "filter"})
    assert found.text == b""
    assert iptables_nft.reasons(found) == (
        "table filter: python was killed by signal 9; table nat: python was killed by signal 9"
    )


def test_tables_of_nftables_itself_are_not_iptables(bed: Bed) -> None:
    netns = bed.netns("kubeproxy")
    netns.run("nft", "add table ip kube-proxy; add table inet filter")
    assert read(netns).dumps == ()


def test_the_cache_holds_as_long_as_the_rules(bed: Bed) -> None:
    netns, other = bed.netns("cached"), bed.netns("other")
    cache = DumpCache()
    for one in (netns, other):
        one.run("iptables-nft", "-A", "INPUT", "-j", "ACCEPT")
    (first,) = read(netns, cache=cache).dumps
    assert read(netns, cache=cache).dumps == (first,)
    (elsewhere,) = read(other, cache=cache).dumps
    assert elsewhere is not first
    (fresh,) = read(netns, cache=cache, fresh=True).dumps
    assert fresh is not first
    netns.run("iptables-nft", "-A", "INPUT", "-j", "DROP")
    (changed,) = read(netns, cache=cache).dumps
    assert isinstance(changed, IptablesDump)
    assert b"-j DROP" in changed.text
    assert read(netns, cache=cache).dumps == (changed,)


def test_the_cache_forgets_over_its_bound(bed: Bed) -> None:
    cache = DumpCache(most_bytes=1)
    netns = bed.netns("cached")
    netns.run("iptables-nft", "-A", "INPUT", "-j", "ACCEPT")
    (first,) = read(netns, cache=cache).dumps
    assert read(netns, cache=cache).dumps != (first,)


def test_a_burst_of_calls_reads_once(bed: Bed) -> None:
    netns = bed.netns("burst")
    netns.run("iptables-nft", "-A", "INPUT", "-j", "ACCEPT")
    cache = DumpCache()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: read(netns, cache=cache).dumps, range(8)))
    assert {id(dump) for (dump,) in results} == {id(results[0][0])}


def test_legacy_is_read_again_each_time(bed: Bed) -> None:
    cache = DumpCache()
    netns = bed.netns("cached")
    netns.run("iptables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    (first,) = read(netns, cache=cache).dumps
    (second,) = read(netns, cache=cache).dumps
    assert first is not second


RULES = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
[3:252] -A INPUT ! -s 10.0.0.0/8 -d 10.1.2.3/32 ! -i eth+ -p tcp -m tcp -j DROP
-A INPUT ! -p icmp -j KUBE-SERVICES
-A INPUT -s 10.0.0.0/255.0.0.255 -f -g KUBE-SERVICES
-A INPUT -p tcp -m tcp --dport 80:90 ! --tcp-flags SYN,ACK SYN -j REJECT --reject-with tcp-reset
-A INPUT -p udp -m multiport --dports 53,5353 -m comment --comment "with \\"quotes\\" and $" -j LOG
-A INPUT -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-X --rsource
-A INPUT -m statistic --mode random --probability 0.33333333349 -j RETURN
-A OUTPUT -o eth0 -m mark --mark 0x4000/0x4000 -j MARK --set-xmark 0x4000/0x0
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -m conntrack --ctstate RELATED,ESTABLISHED
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.40.0.6:8080
-A POSTROUTING -j MASQUERADE --random-fully
COMMIT
"""


def test_python_iptables_reads_what_the_save_command_does(bed: Bed) -> None:
    netns = bed.netns("iptc")
    netns.run("iptables-legacy-restore", "-c", stdin=RULES)
    netns.run(
        "ip6tables-legacy", "-A", "INPUT", "-s", "fd00::/64", "!", "-d", "fd01::1", "-j", "DROP"
    )
    missing = Programs(legacy=("gko-none",), legacy6=("gko-none",))
    dumps = read(netns, missing)
    assert which(dumps) == [(LEGACY, 4), (LEGACY, 6)]
    v4, v6 = dumps.of(LEGACY)
    assert "iptc_reader" in v4.source
    assert lines(v4.text) == lines(netns.run("iptables-legacy-save", "-c"))
    assert lines(v6.text) == lines(netns.run("ip6tables-legacy-save", "-c"))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_burst_of_readings_of_legacy_makes_few_dumps(
    bed: Bed, tmp_path: Path, fresh: bool
) -> None:
    """One after the other, as each takes memory, and never one that began before it was asked."""
    netns = bed.netns("burst")
    netns.run("iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "80", "-j", "DROP")
    log, program, go = tmp_path / "log", tmp_path / "save", tmp_path / "go"
    program.write_text(
        f"#!/bin/sh\necho begin >> {log}\nuntil [ -e {go} ]; do sleep 0.01; done\n"
        f'iptables-legacy-save "$@"\necho end >> {log}\n'
    )
    program.chmod(0o755)
    programs, cache = Programs(legacy=(str(program),)), DumpCache()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(read, netns, programs, cache, fresh) for _ in range(8)]
        wait_until(lambda: sum(turn.waiting for turn in [*cache._turns.values()]) == 7)
        go.touch()
        found = [one.result() for one in asked]
    said = log.read_text().split()
    assert said == ["begin", "end"] * (len(said) // 2), "two at a time"
    assert 1 <= len(said) // 2 <= 3
    for dumps in found:
        assert b"--dport 80" in dumps.of(LEGACY)[0].text
    netns.run("iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "81", "-j", "DROP")
    assert b"--dport 81" in read(netns, programs, cache, fresh).of(LEGACY)[0].text
    assert not cache._turns, "nothing is kept when nobody waits"


@pytest.mark.parametrize(("backend", "word"), [(LEGACY, "legacy"), (NFT, "nft")])
@pytest.mark.parametrize("netlink", [True, False])
def test_a_line_break_in_a_comment_makes_no_rules(
    bed: Bed, backend: str, word: str, netlink: bool
) -> None:
    netns = bed.netns("comment")
    forged = "one\nCOMMIT\n*filter\n-A FORWARD -j DROP\n-A FORWARD -m comment --comment"
    comment = ("-m", "comment", "--comment", forged)
    netns.run(f"iptables-{word}", "-t", "nat", "-A", "OUTPUT", *comment, "-j", "RETURN")
    netns.run(f"iptables-{word}", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    (dump,) = read(netns, Programs(netlink=netlink)).of(backend)
    ruleset = dump.ruleset()
    assert not isinstance(ruleset, Unavailable)
    assert ruleset.tables == ("nat",)
    chain = ruleset.chain("nat", "OUTPUT")
    assert chain is not None
    assert [rule.text for rule in chain] == [
        '-A OUTPUT -m comment --comment "{}" -j RETURN'.format(forged.replace("\n", r"\n"))
    ]
