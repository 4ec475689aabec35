from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from gketrace.errors import GoneError
from gketrace.ruleset.nft import NftRuleset
from gketrace.snapshot import Unavailable
from gketrace.trace import NetnsKind, NetnsRef
from gketrace_agent.observe.iptables import Programs
from gketrace_agent.observe.nftables import NftablesDump
from gketrace_agent.observe.snapshot import NOUNS, Namespace, Observation, Observer
from gketrace_agent.observe.view import LiveNodeView
from tests.agent.observe.bed import Bed, wait_until
from tests.agent.observe.conftest import World
from tests.agent.pods import gained, open_files


def test_a_snapshot_has_everything_and_nothing_missing(world: World) -> None:
    with Observer().observe(world.node.namespace()) as observation:
        snapshot = observation.snapshot
    assert snapshot.missing == ()
    assert observation.failures == {}
    for noun in NOUNS:
        assert not isinstance(getattr(snapshot, noun), Unavailable), noun
    assert snapshot.netns == world.node.ref()
    assert {*NOUNS, "total"} == set(observation.seconds)
    assert not isinstance(snapshot.sysctls, Unavailable)
    assert "net.ipv4.conf.eth0.rp_filter" in snapshot.sysctls
    assert "net.ipv4.conf.all.rp_filter" in snapshot.sysctls


def test_only_what_is_asked_for_is_read(world: World) -> None:
    observation = Observer().observe(
        world.node.namespace(), only=frozenset({"routes", "addresses"})
    )
    snapshot = observation.snapshot
    read = {noun for noun in NOUNS if not isinstance(getattr(snapshot, noun), Unavailable)}
    assert read - {"rulesets"} == {"routes", "addresses"}
    assert snapshot.rulesets == (Unavailable(reason="not asked for"),)
    assert snapshot.missing == ()
    assert not isinstance(snapshot.routes, Unavailable)
    assert any("dev eth0" in route.text for route in snapshot.routes), "with interfaces' names"
    with pytest.raises(ValueError, match="no such nouns: nonsense"):
        Observer().observe(world.node.namespace(), only=frozenset({"nonsense"}))


def test_one_failure_is_one_missing(bed: Bed) -> None:
    netns = bed.netns("partial")
    netns.run("iptables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    netns.run("ip6tables-nft", "-A", "INPUT", "-j", "ACCEPT")
    netns.run("ipset", "create", "some", "hash:ip")
    observer = Observer(programs=Programs(legacy=("false",), ipset=("gko-none",)))
    with observer.observe(netns.namespace()) as observation:
        snapshot = observation.snapshot
    legacy, nft = snapshot.rulesets
    assert isinstance(legacy, Unavailable)
    assert not isinstance(nft, Unavailable)
    assert isinstance(snapshot.ipsets, Unavailable)
    assert {missing.what for missing in snapshot.missing} == {"rulesets", "ipsets"}
    assert {(missing.node, missing.netns) for missing in snapshot.missing} == {("node", "host")}
    assert not isinstance(snapshot.routes, Unavailable)


def test_nftables_tables_are_read_and_are_not_no_rules(bed: Bed) -> None:
    netns = bed.netns("nft")
    netns.run("nft", "add table ip kube-proxy; add chain ip kube-proxy services")
    netns.run("iptables-nft", "-A", "INPUT", "-j", "ACCEPT")
    with Observer().observe(netns.namespace()) as observation:
        dump = observation.nftables
        rulesets = observation.snapshot.rulesets
    assert isinstance(dump, NftablesDump)
    ((table, text),) = dump.tables
    assert str(table) == "ip kube-proxy"
    assert isinstance(text, bytes)
    assert text.startswith(b'{"nftables":')
    assert b'"services"' in text
    assert len(rulesets) == 2


def test_a_burst_of_readings_of_nftables_runs_nft_seldom(bed: Bed, tmp_path: Path) -> None:
    """One after the other, as each takes memory; those who waited share what was read and indexed,
    and it is never older than their question."""
    netns = bed.netns("nft")
    netns.run("nft", "add table ip kube-proxy; add chain ip kube-proxy services")
    log, program, go = tmp_path / "log", tmp_path / "nft", tmp_path / "go"
    program.write_text(
        f"#!/bin/sh\necho begin >> {log}\nuntil [ -e {go} ]; do sleep 0.01; done\n"
        f'nft "$@"\necho end >> {log}\n'
    )
    program.chmod(0o755)
    observer = Observer(programs=Programs(nft=(str(program),)))

    def read() -> tuple[object, ...]:
        with observer.observe(netns.namespace(), only=frozenset({"rulesets"})) as observation:
            return observation.snapshot.rulesets

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(read) for _ in range(8)]
        wait_until(lambda: sum(turn.waiting for turn in [*observer.dumps._turns.values()]) == 7)
        go.touch()
        found = [one.result() for one in asked]
    said = log.read_text().split()
    assert said == ["begin", "end"] * (len(said) // 2), "two at a time"
    assert 1 <= len(said) // 2 <= 3
    assert len({id(rulesets[0]) for rulesets in found}) == len(said) // 2
    netns.run("nft", "add chain ip kube-proxy later")
    (ruleset,) = read()
    assert isinstance(ruleset, NftRuleset)
    assert set(ruleset.chain_names) == {"services", "later"}
    assert not observer.dumps._turns, "nothing is kept when nobody waits"


def test_a_reading_that_gets_no_turn_is_refused(bed: Bed) -> None:
    """To read beside the others would take as much memory once more."""
    netns = bed.netns("nft")
    netns.run("nft", "add table ip kube-proxy")
    observer = Observer(programs=Programs(timeout=0.1))
    turn, waited = observer.dumps.wait(netns.read(lambda one: one.netfilter.netns_cookie) or 0, 1)
    assert turn is not None
    assert not waited
    with observer.observe(netns.namespace()) as observation:
        (ruleset,) = observation.snapshot.rulesets
    assert isinstance(ruleset, Unavailable)
    assert ruleset.reason == "other calls have been reading the same rules for 0.1 s; try again"
    observer.dumps.end(turn, 0.0, None)
    with Observer(dumps=observer.dumps).observe(netns.namespace()) as observation:
        (ruleset,) = observation.snapshot.rulesets
    assert isinstance(ruleset, NftRuleset)


def test_the_missing_nft_program_is_said(bed: Bed) -> None:
    netns = bed.netns("nft")
    netns.run("nft", "add table ip kube-proxy")
    observer = Observer(programs=Programs(nft=("gko-none",)))
    with observer.observe(netns.namespace()) as observation:
        (ruleset,) = observation.snapshot.rulesets
    assert isinstance(ruleset, Unavailable)
    assert "ip kube-proxy" in ruleset.reason
    assert "gko-none" in ruleset.reason


def test_a_closed_namespace_cannot_be_observed(bed: Bed) -> None:
    netns = bed.netns("closed")
    namespace = netns.namespace()
    netns.handle.close()
    with pytest.raises(GoneError):
        Observer().observe(namespace)


def test_a_view_observes_once_for_each_namespace(world: World) -> None:
    seen: list[Observation] = []
    namespaces = (
        world.node.namespace(),
        world.bridged.pod("default/bridged"),
        world.ptp.pod("default/ptp"),
    )
    with LiveNodeView("node", Observer(), namespaces, observed=seen.append) as view:
        host = view.snapshot(NetnsRef(node="node"))
        assert not isinstance(host, Unavailable)
        assert view.snapshot(world.node.ref()) is host
        pod = view.snapshot(NetnsRef(node="node", kind=NetnsKind.POD, pod="default/ptp"))
        assert not isinstance(pod, Unavailable)
        assert pod.netns == world.ptp.pod("default/ptp").ref
        assert [one.snapshot for one in seen] == [host, pod]
        assert not isinstance(host.links, Unavailable)
        peers = {link.name: link.peer for link in host.links}
        peer = peers["vethptp"]
        assert peer is not None
        assert peer.netns is not None
        assert view.snapshot(peer.netns) is pod, "a peer's reference leads to its snapshot"
        for stranger in (
            NetnsRef(node="other"),
            NetnsRef(node="node", inode=1),
            NetnsRef(node="node", kind=NetnsKind.POD, pod="default/none"),
        ):
            assert isinstance(view.snapshot(stranger), Unavailable)
        assert view.missing == ()


def held() -> Counter[str]:
    """Descriptors, threads and child processes."""
    gc.collect()
    found = open_files()
    found.update(f"{thread.name} {thread.ident}" for thread in threading.enumerate())
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children") as file:
            found.update(f"child {pid}" for pid in file.read().split())
    return found


def test_two_hundred_snapshots_leak_nothing(bed: Bed) -> None:
    netns = bed.netns("leaks")
    netns.run("iptables-legacy", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW")
    netns.run("iptables-nft", "-A", "INPUT", "-j", "ACCEPT")
    netns.run("nft", "add table ip kube-proxy")
    observer = Observer()
    namespace: Namespace = netns.namespace()
    home = os.stat("/proc/thread-self/ns/net").st_ino
    observer.observe(namespace).close()
    before = held()
    for number in range(200):
        with observer.observe(namespace, fresh=number % 2 == 0) as observation:
            assert len(observation.snapshot.rulesets) == 3
    assert gained(before, held()) == []
    assert os.stat("/proc/thread-self/ns/net").st_ino == home
