"""The program as a process: start-up, one-line errors, signals, pipes, colour."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gketrace.errors import GketraceError
from gketrace_cli import __version__
from gketrace_cli import app as application
from gketrace_cli.main import run
from tests.cli.stage import Stage

BIN = Path(sys.executable).parent


def gketrace(
    *words: str, program: str = "gketrace", **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / program), *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "80", **more},
        check=False,
    )


def test_help_fits_80_columns() -> None:
    done = gketrace("--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for command in ("pod", "service", "trace"):
        assert command in done.stdout


def test_help_loads_nothing_that_is_slow() -> None:
    """What makes it quick; how quick is no matter for a test that a busy machine can fail."""
    done = subprocess.run(
        [sys.executable, "-c", "from gketrace_cli.main import main; main()", "--help"],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "gketrace_cli.app" in loaded
    assert "Usage" in done.stdout
    slow = {"grpc", "google.protobuf", "kubernetes", "numpy", "yaml", "http.client"}
    assert not slow & loaded


@pytest.mark.parametrize("command", ["pod", "service", "trace"])
def test_each_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(application.app, [command, "--help"])
    assert result.exit_code == 0
    assert "--namespace" in result.stdout
    assert "For example:" in result.stdout


def test_version() -> None:
    assert gketrace("--version").stdout == f"gketrace {__version__}\n"


def test_no_command_shows_help_and_is_a_usage_error() -> None:
    done = gketrace()
    assert done.returncode == 2
    assert "Usage: gketrace" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["pod"],
        ["pod", "a", "b"],
        ["pod", "a", "--nonsense"],
        ["pod", "a", "-o", "xml"],
        ["pod", "a", "--timeout", "soon"],
        ["service", "a", "--via", "pigeon"],
        ["trace", "pod/a"],
        ["pod", "a", "--agent", "x"],
        ["pod", "a", "--agent", "x=y"],
        ["pod", "a", "--kubeconfig", "/nonexistent"],
    ],
)
def test_usage_errors_are_one_line(words: list[str]) -> None:
    done = gketrace(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_kubectl_plugin_is_the_same_program() -> None:
    done = gketrace("pod", program="kubectl-gketrace")
    assert done.returncode == 2
    assert "'kubectl gketrace pod --help'" in done.stderr


def test_a_bug_is_one_line_and_never_exit_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a\nb")

    made = typer.Typer()
    made.command()(broken)
    monkeypatch.setattr(application, "app", made)
    assert run(["--"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("internal error: ZeroDivisionError: a b (please report this")
    assert err.count("\n") == 1
    monkeypatch.setenv("GKETRACE_DEBUG", "1")
    run(["--"])
    assert "Traceback" in capsys.readouterr().err


def test_an_error_prints_its_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise GketraceError("it broke", hint="mend it")

    made = typer.Typer()
    made.command()(broken)
    monkeypatch.setattr(application, "app", made)
    assert run(["--"]) == 3
    assert capsys.readouterr().err == "error: it broke; mend it\n"


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (signal.SIGINT, ("pod", "a"), ""),
        (signal.SIGTERM, ("check",), ""),
        (signal.SIGHUP, ("bundle", "-A", "-o", "a.gkt"), ""),
        (
            signal.SIGINT,
            ("capture", "pod/a", "-w", "a.pcapng"),
            "gketrace: interrupted before a capture began: nothing was captured\n",
        ),
    ],
)
def test_ended_before_an_answer(
    tmp_path: Path, number: signal.Signals, words: tuple[str, ...], said: str
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(
            f"""
apiVersion: v1
kind: Config
current-context: c
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{silent.getsockname()[1]}"}}}}]
users: [{{name: u, user: {{token: t}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
"""
        )
        process = subprocess.Popen(
            # Under nohup these tests ignore SIGHUP, and so would the program.
            [
                *("env", "--default-signal", str(BIN / "gketrace"), *words),
                *("--kubeconfig", str(kubeconfig)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        connection, _ = silent.accept()  # it is asking, and nobody answers
        with connection:
            process.send_signal(number)
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
    assert (process.returncode, out, err) == (128 + number, "", said)
    assert not list(temporary.iterdir())
    assert sorted(tmp_path.iterdir()) == [kubeconfig, temporary]


def test_nothing_is_loaded_before_an_interrupt_is_quiet() -> None:
    """Until then Python prints a traceback for one, and it has loaded what it needs itself."""
    code = """if True:
        import _signal, os, sys
        before = set(sys.modules)
        from gketrace_cli import start
        ours = set(sys.modules) - before - {"__future__"}
        assert ours == {"gketrace_cli", "gketrace_cli.start"}, ours
        class Interrupted:
            def find_spec(self, name, path, target=None):
                if name == "gketrace_cli.main":
                    os.kill(os.getpid(), _signal.SIGINT)
        sys.meta_path.insert(0, Interrupted())
        start.main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_good_answer_loads_no_rules_and_no_walk(shared_stage: Stage) -> None:
    words = shared_stage.arguments("service", "web-nodeport", "--via", "clusterip")
    done = gketrace(*words, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "gketrace.findings.detect" in loaded
    assert not {one for one in loaded if one.startswith(("gketrace.simulate", "gketrace.ruleset."))}


def test_a_closed_pipe_is_quiet(shared_stage: Stage) -> None:
    words = shared_stage.arguments("service", "web-nodeport", "-o", "json")
    with subprocess.Popen(
        [str(BIN / "gketrace"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


def test_no_colour_and_no_progress_when_not_on_a_terminal(shared_stage: Stage) -> None:
    done = gketrace(*shared_stage.arguments("service", "hello-server", "--via", "clusterip"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\033" not in done.stdout


def test_a_terminal_without_unicode_gets_ascii(shared_stage: Stage) -> None:
    words = shared_stage.arguments("trace", "pod/web-0", "svc/hello-server")
    done = gketrace(*words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert " -> " in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        (">/dev/full", 3, "error: cannot write standard output: No space left on device\n"),
        (">&-", 3, "error: cannot write standard output: Bad file descriptor\n"),
        ("<&- >/dev/null", 0, ""),
        (">/dev/null 2>&-", 0, ""),
        (">&- 2>&-", 3, ""),
        (">/dev/full 2>/dev/full", 3, ""),
    ],
)
def test_streams_that_cannot_be_written(streams: str, code: int, said: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{BIN}/gketrace explain {streams}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("service", "\udcff"), "error: argument '\\udcff' is not UTF-8\n"),
        (("--kubeconfig", "a" * 5000, "status"), "File name too long\n"),
        (("-n", "\u00fcn\u00ef", "check"), "cannot be a namespace's name\n"),
        (("-n", "a\nb", "check"), "error: -n 'a\\nb' cannot be a namespace's name\n"),
        (("check", "--watch", "nan"), "error: --watch nan: no number that it can be\n"),
        (("check", "--watch", "1e300"), "error: --watch 1e+300: no number that it can be\n"),
        (("pod", "a", "--timeout", "nan"), "error: --timeout nan: no number that it can be\n"),
        (
            ("capture", "-s", "9" * 20),
            f"error: --snapshot-length {'9' * 20}: no number that it can be\n",
        ),
    ],
)
def test_words_that_can_be_nothing(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.endswith(said)
    assert err.count("\n") == 1
