from __future__ import annotations

from gketrace_agent.observe.sysctls import NAMES, observe_sysctls
from tests.agent.observe.conftest import World


def test_sysctls_are_those_of_the_namespace(world: World) -> None:
    world.node.run("sysctl", "-q", "net.ipv4.ip_forward=1")
    world.ptp.run("sysctl", "-q", "net.ipv4.ip_forward=0")
    world.node.run("sysctl", "-q", "net.ipv4.ip_local_port_range=20000 30000")
    for netns in (world.node, world.ptp):
        mine = netns.read(observe_sysctls)
        names = sorted(mine)
        values = netns.run("sysctl", "-n", *names).splitlines()
        theirs = dict(zip(names, (" ".join(value.split()) for value in values), strict=True))
        theirs.pop("net.netfilter.nf_conntrack_count")
        mine.pop("net.netfilter.nf_conntrack_count")
        assert mine == theirs
    assert world.node.read(observe_sysctls)["net.ipv4.ip_forward"] == "1"
    assert world.node.read(observe_sysctls)["net.ipv4.ip_local_port_range"] == "20000 30000"
    assert world.ptp.read(observe_sysctls)["net.ipv4.ip_forward"] == "0"


def test_a_name_that_is_not_there_is_absent(world: World) -> None:
    mine = world.node.read(observe_sysctls)
    absent = set(NAMES) - set(mine)
    for name in absent:
        assert world.node.run("sysctl", "-n", name, check=False) == ""
    assert "net.ipv4.vs.conntrack" in NAMES
