"""Short form of ``python -m tests.kernel.routes``: the routing look-up against RTM_GETROUTE."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from gketrace.simulate.fib.input4 import _Check
from gketrace.simulate.fib.rules import RuleTable
from gketrace.simulate.state import Ternary
from gketrace.snapshot import NextHop, PolicyRule
from tests.kernel import routes

pytestmark = pytest.mark.timeout(180)

FIB = "gketrace.simulate.fib"


@pytest.mark.parametrize("family", [4, 6])
def test_random_look_ups_agree_with_the_kernel(family: int) -> None:
    result = routes.run(500, seed=20, families=(family,))
    assert result.examples == []
    assert result.disagreements == 0
    assert result.cases == 500
    # What is not known is what the kernel does not show, and that is rare.
    assert result.unknown < 0.1 * result.cases


def _upside_down(real: Callable[..., None]) -> Callable[..., None]:
    return lambda index, key: real(index, lambda value: tuple(-part for part in key(value)))


def _without(field: str, value: object) -> Callable[..., Callable[..., Ternary]]:
    """A rule's selector is overlooked."""

    def fault(real: Callable[..., Ternary]) -> Callable[..., Ternary]:
        def match(table: RuleTable, rule: PolicyRule, flow: object) -> Ternary:
            return real(table, replace(rule, **{field: value}), flow)

        return match

    return fault


def _dead_is_alive(real: Callable[..., bool]) -> Callable[..., bool]:
    return lambda tables, hop, *rest: real(tables, NextHop(oif=hop.oif, gateway=hop.gateway), *rest)


FAULTS: dict[str, tuple[int, str, Callable[..., object]]] = {
    "metric and TOS the wrong way round": (4, f"{FIB}.table.PrefixIndex.sort", _upside_down),
    "IPv6 metric the wrong way round": (6, f"{FIB}.table.PrefixIndex.sort", _upside_down),
    "invert overlooked": (4, f"{FIB}.rules.RuleTable.match", _without("invert", False)),
    "mark overlooked": (4, f"{FIB}.rules.RuleTable.match", _without("fwmark", None)),
    "mask overlooked": (6, f"{FIB}.rules.RuleTable.match", _without("fwmask", 0xFFFFFFFF)),
    "from overlooked": (6, f"{FIB}.rules.RuleTable.match", _without("src", None)),
    "to overlooked": (4, f"{FIB}.rules.RuleTable.match", _without("dst", None)),
    "iif overlooked": (4, f"{FIB}.rules.RuleTable.match", _without("iif", "")),
    "oif overlooked": (6, f"{FIB}.rules.RuleTable.match", _without("oif", "")),
    "TOS of a rule overlooked": (4, f"{FIB}.rules.RuleTable.match", _without("tos", 0)),
    "ipproto overlooked": (4, f"{FIB}.rules.RuleTable.match", _without("ip_protocol", None)),
    "dport overlooked": (6, f"{FIB}.rules.RuleTable.match", _without("dport", None)),
    "sport overlooked": (4, f"{FIB}.rules.RuleTable.match", _without("sport", None)),
    "uidrange overlooked": (4, f"{FIB}.rules.RuleTable.match", _without("uid_range", None)),
    "nothing suppressed": (
        4,
        f"{FIB}.ipv4.Ipv4Tables._kept",
        lambda real: lambda _tables, _rule, hit: hit,
    ),
    "dead next hops used": (4, f"{FIB}.ipv4.Ipv4Tables._good", _dead_is_alive),
    "IPv6 dead next hops used": (6, f"{FIB}.ipv6.Ipv6Tables._alive", lambda real: lambda *_: True),
    "sources never checked": (4, f"{FIB}.input4._validate", lambda real: lambda *_: _Check()),
    "any source taken for one's own": (
        4,
        f"{FIB}.ipv4.Ipv4Tables.owner",
        lambda real: lambda tables, _: tables.view.links[0],
    ),
    "next hop ignored in source selection": (
        4,
        f"{FIB}.ipv4.select_address",
        lambda real: lambda view, device, dst, scope: real(view, device, 0, scope),
    ),
    "scope ignored in source selection": (
        4,
        f"{FIB}.ipv4.select_address",
        lambda real: lambda view, device, dst, scope: real(view, device, dst, 255),
    ),
    "labels ignored in source selection": (6, f"{FIB}.saddr6._label", lambda real: lambda _: 0),
    "strict interfaces overlooked": (6, f"{FIB}.path6.needs_strict", lambda real: lambda _: False),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: the kernel does not give a faulty look-up's answers."""
    family, target, fault = FAULTS[name]
    module, _, attribute = target.rpartition(".")
    owner: object = _resolve(module)
    monkeypatch.setattr(owner, attribute, fault(getattr(owner, attribute)))
    result = routes.Result()
    for world in range(40):
        routes.judge(_asked(family, world), result)
        if result.disagreements:
            return
    pytest.fail(f"{result.cases} cases agreed with a faulty look-up")


@cache
def _asked(family: int, world: int) -> routes.Asked:
    """The kernel's answers are the same for each fault."""
    return routes.ask_kernel(30, world, (family,))


def _resolve(dotted: str) -> object:
    import importlib

    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert routes.main(["--cases", "50", "--seed", "4", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["cases"] == 50
    assert figures["cases"] == (
        figures["agreements"] + figures["disagreements"] + figures["unknown"]
    )
