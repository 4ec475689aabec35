"""The command line → `Config`."""

from __future__ import annotations

from pathlib import Path

import pytest

from gketrace.errors import UsageError
from gketrace_agent.config import Listen, parse_arguments


def test_defaults() -> None:
    config = parse_arguments(["serve", "--node-name", "n1"])
    assert config.node == "n1"
    assert [str(a) for a in config.listen] == ["unix:///run/gketrace/agent.sock"]
    assert config.runtime_sockets is None
    assert config.paths.proc == Path("/proc")


def test_everything() -> None:
    config = parse_arguments(
        "serve --listen unix:///tmp/a.sock --listen tcp://[::]:9410 --insecure --proc /host/proc "
        "--runtime-endpoint unix:///run/x.sock --max-concurrent-calls 3".split()
    )
    assert config.listen == (Listen(path=Path("/tmp/a.sock")), Listen(host="::", port=9410))
    assert config.listen[1].grpc == "[::]:9410"
    assert config.paths.proc == Path("/host/proc")
    assert config.runtime_sockets == (Path("/run/x.sock"),)
    assert config.limits.concurrent_calls == 3


def test_no_runtime() -> None:
    assert parse_arguments(["serve", "--runtime-endpoint", "none"]).runtime_sockets == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: command"),
        ("fly", "invalid choice: 'fly'"),
        ("serve --listen tcp://0.0.0.0:9410", "without TLS and without access control"),
        ("serve --listen 0.0.0.0:9410", "cannot listen on '0.0.0.0:9410'"),
        ("serve --listen unix://relative", "cannot listen on"),
        ("serve --listen tcp://h:70000 --insecure", "cannot listen on"),
        (f"serve --listen unix:///{'x' * 120}", "longer than the 107 bytes"),
        ("serve --runtime-endpoint /run/x.sock", "no such runtime endpoint"),
        ("serve --max-concurrent-calls 0", "0 is not a positive number"),
        ("serve --max-concurrent-calls many", "invalid _positive value: 'many'"),
    ],
)
def test_what_is_refused(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arguments(line.split())
    assert message in str(caught.value)
