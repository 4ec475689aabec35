"""Long filters: the same program, in a process that can be ended."""

from __future__ import annotations

import ctypes
import struct
from itertools import product
from typing import Any

import pytest

from gketrace.errors import UsageError
from gketrace_agent.kernel import libpcap
from gketrace_agent.kernel.libpcap import FilterCompiler

HOSTS = " or ".join(f"host 10.0.{number}.1" for number in range(60))


NOBODY = f"host {'x' * 64}"
"""No name server is asked for so long a label."""


@pytest.mark.parametrize("interface", ["lo", "any"])
def test_a_long_filter_makes_the_same_program(
    interface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FilterCompiler(interface, 128) as compiler:
        apart = compiler.compile(HOSTS)
        monkeypatch.setattr(libpcap, "_SHORT", len(HOSTS))
        assert compiler.compile(HOSTS) == apart
    assert apart.instructions > 100


def test_a_long_filter_is_refused_in_libpcaps_words() -> None:
    with FilterCompiler("lo", 128) as compiler, pytest.raises(UsageError) as caught:
        compiler.compile(f"{HOSTS} or )")
    assert caught.value.message.startswith("filter 'host 10.0.0.1 or ")
    assert "or )': " in caught.value.message
    assert "syntax error" in caught.value.message


def test_what_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = " or ".join(f"portrange {10 * number + 1}-{10 * number + 5}" for number in range(200))
    monkeypatch.setattr(libpcap, "_SECONDS", 1.0)
    with FilterCompiler("lo", 128) as compiler:
        with pytest.raises(UsageError, match="is too large: libpcap has not compiled it in 1 s"):
            compiler.compile(ranges)
        assert compiler.compile("tcp port 80").instructions


def test_a_name_is_looked_up_by_a_process_that_can_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FilterCompiler("lo", 128) as compiler:
        assert compiler.compile("host localhost").instructions
        with pytest.raises(UsageError, match=f"^filter '{NOBODY}': unknown host"):
            compiler.compile(NOBODY)
        monkeypatch.setattr(libpcap, "_SECONDS", 0.01)
        with pytest.raises(UsageError) as caught:
            compiler.compile("port 80 and (host web.invalid or db.invalid)")
        assert str(caught.value) == (
            "filter 'port 80 and (host web.invalid or db.invalid)': web.invalid and db.invalid "
            "could not be looked up in 0.01 s; name addresses and ports by their numbers"
        )
        assert compiler.compile("port http and host 10.0.0.1").instructions


OWN = "not (tcp port 22 or host 10.0.0.9)"
TYPED = "host 10.0.0.1 or port 80 or port 22"


@pytest.mark.parametrize("typed", [TYPED, f"{TYPED} or {HOSTS}"])
def test_our_own_filter_comes_first_whatever_was_asked_for(
    typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libpcap has it for both in one text; and what was asked for is compiled once."""
    asked: list[str] = []
    for name in ("instructions", "_compile_apart"):

        def spy(
            compiler: FilterCompiler, text: str, real: Any = getattr(FilterCompiler, name)
        ) -> Any:
            asked.append(text)
            return real(compiler, text)

        monkeypatch.setattr(FilterCompiler, name, spy)
    with FilterCompiler("lo", 128) as compiler:
        both = compiler.compile(typed, OWN)
        assert asked == [OWN, typed]
        whole = compiler.compile(f"{OWN} and ({typed})")
        assert compiler.compile("", OWN) == compiler.compile(OWN)
        with pytest.raises(UsageError, match="syntax error"):
            compiler.compile("port 80) or (port 22", OWN)
    taken = []
    for protocol, port, ends in product((6, 17), (22, 80, 443), product((1, 2, 9), (1, 2, 9))):
        frame = tcp_or_udp(protocol, port, *ends)
        found = [takes(program.code, frame) for program in (both, whole)]
        assert found[0] == found[1], (protocol, port, ends)
        taken += found
    assert set(taken) == {True, False}


def tcp_or_udp(protocol: int, port: int, source: int, target: int) -> bytes:
    ends = bytes([10, 0, 0, source, 10, 0, 0, target])
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, protocol, 0) + ends
    return bytes(12) + b"\x08\x00" + head + struct.pack("!HH16x", 50000, port)


def takes(code: bytes, frame: bytes) -> bool:
    """By libpcap's interpreter."""
    program = ctypes.create_string_buffer(code, len(code))
    made = libpcap._BpfProgram(len(code) // 8, ctypes.addressof(program))
    head = struct.pack("@llII", 0, 0, len(frame), len(frame))
    return bool(libpcap._load().pcap_offline_filter(ctypes.byref(made), head, frame))
