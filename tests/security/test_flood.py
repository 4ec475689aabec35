"""The short form of ``python -m tests.security.flood``: less of it, and no clock to be held to."""

from __future__ import annotations

import random

import pytest

from tests.security.crowd import MIXED
from tests.security.flood import flood
from tests.security.http2 import MALFORMED, PREFACE, SETTINGS, frame, request


def test_a_good_client_is_answered_in_a_crowd() -> None:
    result = flood([MIXED], connections=120, seconds=1.0)
    (found,) = result["kinds"]
    assert found["failed"] == {}
    assert found["calls"] >= 2
    assert found["crowd"]["connections"] >= 120
    missed = {name: goal for name, goal in result["goals"].items() if not goal["met"]}
    missed.pop("worst_seconds", None)  # the machine's, when others use it
    assert not missed, result


@pytest.mark.parametrize("make", MALFORMED, ids=lambda make: make.__name__.strip("_"))
def test_what_is_sent_is_what_it_says(make: object) -> None:
    """The same each time, and not more than a connection's first window of nonsense."""
    token = ("authorization", "Bearer x")
    one, again = (make(random.Random(7), token) for _ in range(2))  # type: ignore[operator]
    assert one == again
    assert 0 < len(one) < 1 << 20


def test_frames() -> None:
    """RFC 9113, 4.1: length, type, flags, stream."""
    assert frame(4, 0, 0, b"") == SETTINGS == bytes(9)[:3] + b"\x04\x00" + bytes(4)
    assert frame(6, 1, 3, b"12345678")[:9] == b"\x00\x00\x08\x06\x01\x00\x00\x00\x03"
    assert PREFACE.startswith(b"PRI * HTTP/2.0")
    assert b"/gketrace.v1alpha1.Agent/Walk" in request(1, "Walk")
