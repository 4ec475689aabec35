from __future__ import annotations

import pytest

from gketrace_agent.observe.addresses import observe_addresses
from tests.agent.observe.conftest import World

_FLAG_KEYS = ("secondary", "tentative", "deprecated", "nodad", "noprefixroute", "dadfailed")


@pytest.mark.parametrize("who", ["node", "bridged", "ptp"])
def test_addresses_are_those_of_ip(world: World, who: str) -> None:
    netns = getattr(world, who)
    mine = {
        (one.ifindex, str(one.address), one.prefixlen): (
            one.scope,
            one.label,
            str(one.peer) if one.peer else None,
            {flag for flag in one.flags if flag in _FLAG_KEYS},
            "permanent" in one.flags,
        )
        for one in netns.read(observe_addresses)
    }
    theirs = {
        (link["ifindex"], info["local"], info["prefixlen"]): (
            info["scope"],
            info.get("label", ""),
            info.get("address"),
            {flag for flag in _FLAG_KEYS if info.get(flag)},
            not info.get("dynamic", False),
        )
        for link in netns.json("ip", "-j", "addr")
        for info in link.get("addr_info", ())
    }
    assert mine == theirs
    assert len(mine) > 2
