from __future__ import annotations

import socket
import time

from gketrace_agent.observe.fdb import observe_fdb
from tests.agent.observe.bed import wait_until
from tests.agent.observe.conftest import World


def test_fdb_is_that_of_bridge(world: World) -> None:
    node = world.node
    node.run(
        "bridge", "fdb", "replace", "02:00:00:00:00:77", "dev", "vethbridged", "master", "static"
    )
    names = {link["ifindex"]: link["ifname"] for link in node.json("ip", "-j", "link")}
    mine = [
        (
            one.mac,
            names[one.ifindex],
            names.get(one.master) if one.master else None,
            one.vlan,
            {flag for flag in one.flags if flag in ("self", "master", "extern_learn")},
            next((flag for flag in one.flags if flag in ("permanent", "static", "stale")), ""),
        )
        for one in node.read(observe_fdb)
    ]
    theirs = [
        (
            one["mac"],
            one["ifname"],
            one.get("master"),
            one.get("vlan"),
            {flag for flag in one.get("flags", ()) if flag in ("self", "master", "extern_learn")},
            one.get("state", ""),
        )
        for one in node.json("bridge", "-j", "-d", "fdb")
    ]
    assert sorted(mine, key=repr) == sorted(theirs, key=repr)
    assert any(entry[5] == "static" for entry in mine)


def test_a_learned_address_has_an_age(world: World) -> None:
    def speak() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("10.40.0.1", 9))

    # The world's bridge forgets in a second.
    world.node.ip("link", "set", "cbr0", "type", "bridge", "ageing_time", "30000")
    before = time.monotonic()
    world.bridged.inside(speak)
    (mac,) = (link["address"] for link in world.bridged.json("ip", "-j", "link", "show", "eth0"))

    def learned() -> list[float]:
        return [
            one.updated
            for one in world.node.read(observe_fdb)
            if one.mac == mac
            and not {"permanent", "self"} & set(one.flags)
            and one.updated is not None
        ]

    wait_until(lambda: bool(learned()))
    first = learned()[0]
    assert 0 <= first <= time.monotonic() - before + 0.05
    wait_until(lambda: learned()[0] >= first + 0.2)

    def agree() -> bool:
        """Ours before and after: the pod may say something of its own in between."""
        earlier = learned()[0]
        (shown,) = (
            one
            for one in world.node.json("bridge", "-j", "-s", "fdb")
            if one["mac"] == mac and not one.get("state") and "self" not in one.get("flags", ())
        )
        # bridge(8) prints whole seconds.
        return int(earlier) <= int(shown["updated"]) <= learned()[0]

    wait_until(agree)
