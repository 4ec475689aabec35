"""Masks keep what a check asks for from outside, and all else's order of prefixes."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from gketrace_cli.bundle.masks import Masks


@pytest.mark.parametrize(
    "text",
    ["8.8.8.8", "8.8.8.0/24", "35.191.0.0/16", "35.191.0.1", "130.211.0.0/22", "209.85.204.0/22"],
)
def test_what_probes_come_from_is_kept(text: str) -> None:
    assert Masks(b"one").text(f"-A INPUT -s {text} -j DROP") == f"-A INPUT -s {text} -j DROP"


@pytest.mark.parametrize("text", ["35.191.7.7", "35.190.0.1", "8.8.4.4", "130.211.1.1"])
def test_neighbours_share_as_many_bits_as_before(text: str) -> None:
    masks = [Masks(bytes([key])) for key in range(32)]
    assert {str(one.address(ip_address(text))) for one in masks} != {text}
    for other in ("35.191.0.1", "8.8.8.8", "35.231.121.11", text):
        before = int(ip_address(text)) ^ int(ip_address(other))
        for one in masks:
            after = int(one.address(ip_address(text))) ^ int(one.address(ip_address(other)))
            assert before.bit_length() == after.bit_length()
