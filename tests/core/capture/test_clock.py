"""How far clocks are apart, from what was before what."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gketrace.capture.clock import HERE, ClockBounds, observe
from gketrace.capture.segments import sightings
from tests.core.capture.network import ENTRY, INSIDE, MS, US, Network
from tests.core.capture.test_stitch import Talk

SECOND = 10**9


def test_both_directions_bound_the_offset() -> None:
    bounds = ClockBounds()
    bounds.before("a", 0, "b", 130)  # b is at most 130 ahead
    bounds.before("a", 0, "b", 500)
    bounds.before("b", 0, "a", -50)  # and at least 50
    clocks = bounds.clocks(reference="a")
    assert (clocks.offsets["b"].ahead_ns, clocks.offsets["b"].bound_ns) == (90, 40)
    assert clocks.corrected("b", 1000) == 910
    assert clocks.width("a", "b") == clocks.width("b", "a") == 40
    assert clocks.certain("a", 0, "b", 41)
    assert not clocks.certain("a", 0, "b", 40)
    assert clocks.certain("a", 0, "a", 1)
    assert clocks.text() == "clocks against a, ahead by (corrected): b: +90 ns ± 40 ns"


def test_one_direction_is_not_enough() -> None:
    bounds = ClockBounds()
    bounds.before("a", 0, "b", 130)
    clocks = bounds.clocks(("a", "b", "c"), "a")
    assert clocks.offsets["b"].bound_ns is None
    assert clocks.corrected("b", 7) == 7
    assert clocks.width("a", "c") is None
    assert not clocks.certain("a", 0, "c", SECOND)
    assert "b: not known" in clocks.text()


def test_bounds_add_up_along_a_chain() -> None:
    bounds = ClockBounds()
    for one, other, ahead in (("a", "b", 1000), ("b", "c", -300)):
        bounds.before(one, 0, other, ahead + 10)
        bounds.before(other, ahead, one, 10)
    clocks = bounds.clocks(reference="a")
    assert (clocks.offsets["c"].ahead_ns, clocks.offsets["c"].bound_ns) == (700, 20)


def test_wide_bounds_correct_no_more_than_they_must() -> None:
    bounds = ClockBounds()
    bounds.before(HERE, 0, "a", 80 * MS)
    bounds.before("a", 0, HERE, 2 * MS)
    bounds.before(HERE, 0, "b", 3 * SECOND + 80 * MS)
    bounds.before("b", 3 * SECOND, HERE, 2 * MS)
    clocks = bounds.clocks(reference=HERE)
    assert (clocks.offsets["a"].ahead_ns, clocks.offsets["a"].bound_ns) == (0, 80 * MS)
    assert clocks.offsets["b"].ahead_ns == 3 * SECOND - 2 * MS


def test_bounds_that_exclude_each_other_are_said() -> None:
    bounds = ClockBounds()
    bounds.before("a", 0, "b", -50)
    bounds.before("b", 0, "a", 40)
    clocks = bounds.clocks()
    assert "arrive before they are sent" in clocks.text()
    assert clocks.corrected("b", 7) == 7
    assert not clocks.certain("a", 0, "b", SECOND)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-SECOND, SECOND), min_size=3, max_size=3),
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, SECOND), st.integers(1, MS)),
        max_size=40,
    ),
)
def test_the_truth_is_within_the_bound(
    ahead: list[int], messages: list[tuple[int, int, int, int]]
) -> None:
    bounds = ClockBounds()
    for one, other, sent, delay in messages:
        bounds.before(str(one), sent + ahead[one], str(other), sent + delay + ahead[other])
    clocks = bounds.clocks("012", "0")
    assert not clocks.contradiction
    for node, offset in clocks.offsets.items():
        if offset.bound_ns is not None:
            truth = ahead[int(node)] - ahead[0]
            assert abs(offset.ahead_ns - truth) <= offset.bound_ns
    for one, other, sent, delay in messages:
        if all(clocks.offsets[str(node)].bound_ns is not None for node in (one, other)):
            first = clocks.corrected(str(one), sent + ahead[one])
            assert first <= clocks.corrected(str(other), sent + delay + ahead[other])


@pytest.mark.parametrize("ahead", [-3 * SECOND, -40 * US, 0, 17 * MS, 2 * SECOND])
def test_packets_that_both_nodes_saw(ahead: int) -> None:
    network = Network(skew={INSIDE: ahead})
    talk = Talk(network)
    talk.open()
    talk.exchange()
    packets, _ = network.sorted()
    bounds = ClockBounds()
    observe(bounds, sightings(packets)[0])
    offset = bounds.clocks(reference=ENTRY).offsets[INSIDE]
    assert offset.bound_ns is not None
    assert abs(offset.ahead_ns - ahead) <= offset.bound_ns <= 20 * US
