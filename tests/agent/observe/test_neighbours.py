from __future__ import annotations

from gketrace_agent.observe.neighbours import observe_neighbours
from tests.agent.observe.conftest import World


def test_neighbours_are_those_of_ip(world: World) -> None:
    node = world.node
    node.batch(
        "neigh replace 10.142.0.99 lladdr 02:00:00:00:00:99 nud permanent dev eth0",
        "neigh replace 10.142.0.98 lladdr 02:00:00:00:00:98 nud stale dev eth0",
        "neigh replace 10.142.0.97 nud failed dev eth0",
        "neigh replace fd00:142::97 lladdr 02:00:00:00:00:97 nud reachable router dev eth0",
    )
    names = {link["ifname"]: link["ifindex"] for link in node.json("ip", "-j", "link")}
    theirs = {
        (names[one["dev"]], one["dst"]): (
            one.get("lladdr", ""),
            one["state"],
            "router" in one,
        )
        for one in node.json("ip", "-j", "neigh", "show", "nud", "all")
    }
    mine = {
        (one.ifindex, str(one.address)): (one.mac, [one.state], one.router)
        for one in node.read(observe_neighbours)
    }
    for key, (mac, state, router) in theirs.items():
        # ip hides the link address of NOARP entries whose link has none.
        assert mine[key][1:] == (state, router)
        assert mac in ("", mine[key][0])
    assert mine.keys() == theirs.keys()
    assert mine[names["eth0"], "10.142.0.97"] == ("", ["FAILED"], False)
    assert mine[names["eth0"], "fd00:142::97"] == ("02:00:00:00:00:97", ["REACHABLE"], True)
