"""Many pods' namespaces are opened at once, and known ones again without a search."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gketrace.trace import NetnsKind
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.resolve.directory import PodDirectory
from gketrace_agent.resolve.model import PodRef
from gketrace_agent.resolve.resolver import Resolver
from gketrace_agent.resolve.scan import CgroupScan
from tests.agent.pods import FakePod, container_id, fake_pod, gained, netns_inode, open_files

WEB = container_id()
NEXT = container_id()


class CountingResolver(Resolver):
    scans = 0

    def scan(self) -> CgroupScan:
        self.scans += 1
        return super().scan()


@pytest.fixture
def resolver() -> Iterator[CountingResolver]:
    made = CountingResolver(HostPaths(), "node-a", runtime_sockets=())
    yield made
    made.close()


@pytest.fixture
def directory(resolver: CountingResolver) -> PodDirectory:
    return PodDirectory(HostPaths(), resolver)


@pytest.fixture
def web() -> Iterator[FakePod]:
    with fake_pod() as made:
        yield made


def test_one_scan_for_all_and_none_the_next_time(
    directory: PodDirectory, resolver: CountingResolver, web: FakePod
) -> None:
    with fake_pod() as other:
        pids = [pod.add(WEB, own_netns=True) for pod in (web, other)]
        refs = [PodRef(namespace="a", name=n, uid=p.uid) for n, p in (("w", web), ("o", other))]
        for _ in range(3):
            with directory.open(refs, timeout=5) as opened:
                assert [opened.namespaces[ref].handle.inode for ref in refs] == [
                    netns_inode(pid) for pid in pids
                ]
                assert opened.namespaces[refs[0]].ref.pod == "a/w"
        assert resolver.scans == 1


def test_a_restarted_container_is_found_again(
    directory: PodDirectory, resolver: CountingResolver, web: FakePod
) -> None:
    ref = PodRef(uid=web.uid)
    first = web.add(WEB, own_netns=True)
    directory.open([ref], timeout=5).__exit__()
    web.kill(first)
    second = web.add(NEXT, own_netns=True)
    with directory.open([ref], timeout=5) as opened:
        assert opened.namespaces[ref].handle.inode == netns_inode(second)
    assert resolver.scans == 2


def test_absent_ones_say_why_and_are_not_searched_at_once_again(
    directory: PodDirectory, resolver: CountingResolver
) -> None:
    ref = PodRef(uid="11111111-2222-3333-4444-555555555555")
    for _ in range(2):
        with directory.open([ref], timeout=5) as opened:
            assert opened.namespaces == {}
            assert "no process in its cgroup" in opened.absent[ref]
    assert resolver.scans == 1


def test_a_pod_of_the_host_network(directory: PodDirectory, web: FakePod) -> None:
    web.add(WEB)
    ref = PodRef(uid=web.uid)
    with directory.open([ref], timeout=5) as opened:
        found = opened.namespaces[ref]
        assert found.ref.kind is NetnsKind.HOST
        assert found.handle.inode == netns_inode(os.getpid())


def test_nothing_is_held_after_the_call(directory: PodDirectory, web: FakePod) -> None:
    web.add(WEB, own_netns=True)
    before = open_files()
    for _ in range(3):
        directory.open([PodRef(uid=web.uid)], timeout=5).__exit__()
    assert gained(before, open_files()) == []
