"""Files that the command line names: read to an end, whatever they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gketrace.errors import UsageError
from gketrace_cli import inputs
from gketrace_cli.agent_access import AgentAccess
from gketrace_cli.checking.whole import read_ignores
from gketrace_cli.inputs import read_input
from gketrace_cli.kubeconfig import load_settings


def ca(path: str) -> None:
    AgentAccess(cast(Any, None), namespace="", account=cast(Any, None), ca_file=Path(path)).ca()


def token(path: str) -> None:
    Path("config").write_text(
        "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}],"
        "clusters: [{name: k, cluster: {server: 'https://10.0.0.1'}}],"
        f"users: [{{name: u, user: {{tokenFile: {path}}}}}]}}"
    )
    load_settings(kubeconfig="config").credentials()


READERS = {
    "--agent-ca": ca,
    "ignore file": lambda path: read_ignores((), path),
    "kubeconfig": lambda path: load_settings(kubeconfig=path),
    "tokenFile": token,
}


@pytest.mark.parametrize("what", READERS)
def test_what_has_no_end_is_refused_in_one_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "_SECONDS", 0.05)
    read = cast(Callable[[str], object], READERS[what])
    large, fifo = tmp_path / "large", tmp_path / "fifo"
    with large.open("wb") as file:
        file.truncate(10 << 30)
    os.mkfifo(fifo)
    mute = os.open(fifo, os.O_RDWR)  # somebody has it open, and writes nothing
    for path, why in (
        (str(large), "it is larger than 16 MiB"),
        (str(fifo), "it has not ended in 0.05 s"),
        ("/dev/zero", "it is larger than 16 MiB"),
        ("/proc/self", "Is a directory"),
    ):
        with pytest.raises(UsageError) as caught:
            read(path)
        assert what in str(caught.value)
        assert str(caught.value).endswith(f"{path}: {why}")
    os.close(mute)
    with pytest.raises(UsageError, match="it has not ended"):
        read(str(fifo))


def test_a_pipe_that_ends_is_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"some")
    os.close(writing)
    assert read_input(f"/dev/fd/{reading}") == b"some"
    os.close(reading)
    assert read_input("/dev/null") == b""
