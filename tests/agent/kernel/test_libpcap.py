"""Long filters: the same program, in a process that can be ended."""

from __future__ import annotations

import pytest

from gketrace.errors import UsageError
from gketrace_agent.kernel import libpcap
from gketrace_agent.kernel.libpcap import FilterCompiler

HOSTS = " or ".join(f"host 10.0.{number}.1" for number in range(60))


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
