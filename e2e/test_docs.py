"""README and the tutorial show what really runs.

Each ``console`` block holds commands (``$ …``) and what they print.  The commands are run on the
lab and the output is compared piece by piece: pieces are parted by a line "…", and each must be
found in the real output, in order.  What differs from run to run (PIDs, namespaces, veth names,
ages, states of neighbours, ports that the kernel picks) is masked on both sides; how lines are
wrapped does not count.  ``$ echo $?`` shows the exit code of the command above it; a command
without one must give 0.

``GKETRACE_UPDATE_DOCS=1`` writes what is printed now into the pages: whole outputs, and pieces
whose first and last line are still printed.  Read the diff.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from e2e.netlab import Lab
from gketrace_agent.config import parse_arguments
from gketrace_cli.agents import PORT_NAME
from gketrace_cli.session import LABEL

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tutorial.md", "docs/capture.md", "docs/troubleshooting.md")
ELLIPSIS = "…"
BUILD = "export KUBECONFIG=$(e2e/lab up | tail -n 1)"
"""The one command that is not run: the fixture has done it."""

MASKS = (
    (r"^ {3}neighbour .* lladdr .*$\n", ""),  # there only while the kernel knows the address
    (r"\S+ is behind (?=veth)", ""),  # instead of the above
    (r"\bveth[0-9a-f]{8}\b", "VETH"),
    (r"\b(?!0a:58:|42:01:)[0-9a-f]{2}(?::[0-9a-f]{2}){5}\b", "MAC"),  # what the lab did not choose
    (r"\b(REACHABLE|STALE|DELAY|PROBE)\b", "STATE"),
    (r"\b(PID|pid|index)\s+\d+", r"\1 N"),
    (r"(?<=net:\[)\d+(?=\])", "INODE"),
    (r"\b40265\d{5}\b", "INODE"),  # PROC_DYNAMIC_FIRST and up
    (r"(?<=\bsandbox) +[0-9a-f]{12}", " ID"),
    (r"\b(learned|seen)\s+\d+\s+s\s+ago", r"\1 AGO"),
    (r"(?<=10\.142\.0\.6:)(?!31830|61234)\d{4,5}\b", "PORT"),  # masqueraded
    (r"\[\d+:\d+\]", "[COUNTERS]"),
    (r"^Live connections: .*$\n", ""),  # as many as the kernel still remembers
    (r"\b([sd]port)=(?!45678|31830|8080)\d+", r"\1=PORT"),
    (r"\b\d\d:\d\d:\d\d\.\d{6}\b", "TIME"),  # of packets
    (r"[-+]?\b[\d.]+ (?:ns|µs|ms)\b", "SPAN"),
    (r"(?<=\b203\.0\.113\.10[:.])\d{4,5}\b(?<!61234)(?<!45678)", "PORT"),
    (r"(?<=\b10\.142\.0\.7[:.])(?!31830)\d{4,5}\b", "PORT"),
    (r"\b(seq|ack|val|ecr) \d{2,}", r"\1 NUMBER"),
    (r"\b\d+(?= packets (?:captured|received))", "N"),
    (r"nsenter -t \d+", "nsenter -t N"),
)


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a page, and what the page shows of it."""

    page: str
    line: int
    text: str
    shown: tuple[str, ...]
    code: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands(page: str) -> list[Command]:
    """The commands of a page, in order."""
    found: list[tuple[int, str, list[str]]] = []
    inside = False
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if line.startswith("```"):
            inside = line == "```console"
        elif inside and line.startswith("$ "):
            found.append((number, line[2:], []))
        elif inside:
            found[-1][2].append(line)
    made: list[Command] = []
    for number, text, shown in found:
        if text == "echo $?":
            last = made.pop()
            made.append(Command(last.page, last.line, last.text, last.shown, int(shown[0])))
        else:
            made.append(Command(page, number, text, tuple(shown), 0))
    return made


def masked(lines: list[str]) -> str:
    """One line, with what is volatile masked."""
    text = "".join(f"{line}\n" for line in lines)
    for pattern, word in MASKS:
        text = re.sub(pattern, word, text, flags=re.M)
    return " ".join(text.split())


def pieces(shown: tuple[str, ...]) -> Iterator[str]:
    """What stands between the ellipses."""
    piece: list[str] = []
    for line in (*shown, ELLIPSIS):
        if line != ELLIPSIS:
            piece.append(line)
            continue
        if text := masked(piece):
            yield text
        piece = []


def difference(command: Command, code: int, output: str) -> str:
    """Empty: the page tells the truth."""
    if code != command.code:
        return f"{command}\nexit code {code}, the page says {command.code}:\n{output}"
    real, position = masked(output.splitlines()), 0
    if ELLIPSIS not in command.shown and real != masked(list(command.shown)):
        return f"{command}\nprints now:\n{output}"
    for piece in pieces(command.shown):
        where = real.find(piece, position)
        if where < 0:
            return f"{command}\ndoes not print (any more, or here):\n{piece}\nbut:\n{output}"
        position = where + len(piece)
    return ""


def renewed(shown: tuple[str, ...], output: str) -> list[str]:
    """What the page should show; pieces that are not found again stay as they are."""
    real = output.splitlines()
    if ELLIPSIS not in shown:
        return real
    made: list[str] = []
    position = 0
    for is_gap, piece in itertools.groupby(shown, lambda line: line == ELLIPSIS):
        old = list(piece)
        if not is_gap:
            first, last = masked(old[:1]), masked(old[-1:])
            later = range(position, len(real))
            begin = next((n for n in later if masked(real[n : n + 1]) == first), len(real))
            end = next((n for n in later if n >= begin and masked(real[n : n + 1]) == last), -1)
            if end >= begin:
                old, position = real[begin : end + 1], end + 1
        made += old
    return made


def renew(page: str, outputs: list[tuple[Command, str]]) -> None:
    """Writes the outputs into the page."""
    lines = (ROOT / page).read_text().splitlines()
    for command, output in reversed(outputs):
        start = command.line
        lines[start : start + len(command.shown)] = renewed(command.shown, output)
    (ROOT / page).write_text("".join(f"{line.rstrip()}\n" for line in lines))


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab of the page's own: what other tests have connected is not on it."""
    with Lab(name=f"docs{os.getpid()}") as own:
        yield own


@pytest.fixture
def environment(lab: Lab) -> dict[str, str]:
    """As the reader's shell has it."""
    # The kernel forgets neighbours and bridge entries, and the pages show them.
    for target, address in (
        ("client/203.0.113.10", "10.142.0.8:31830"),
        ("pod/web-1", "10.40.0.6:8080"),
    ):
        lab.exec(target, ["curl", "-sS", "-m", "5", f"http://{address}/"])
    return {
        **os.environ,
        "KUBECONFIG": str(lab.kubeconfig),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "80",
        "NO_COLOR": "1",
    }


@contextlib.contextmanager
def background(argv: str, env: dict[str, str]) -> Iterator[None]:
    """A command of a page that ends with ``&``: runs until the page ends."""
    process = subprocess.Popen(["sh", "-c", argv], cwd=ROOT, env=env, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)


def wait_for_connection(lab: Lab, port: int) -> None:
    """Until a page's connection from this source port is established."""
    until = time.monotonic() + 60
    argv = ["ss", "-Htn", "state", "established", "sport", "=", f":{port}"]
    while not lab.exec("client/203.0.113.10", argv).stdout.strip():
        assert time.monotonic() < until, f"nothing connects from port {port}"
        time.sleep(0.02)


@pytest.mark.parametrize("page", PAGES)
def test_page_shows_what_runs(page: str, lab: Lab, environment: dict[str, str]) -> None:
    found = []
    printed: dict[str, tuple[int, str]] = {}
    outputs: list[tuple[Command, str]] = []
    with contextlib.ExitStack() as running:
        for command in commands(page):
            if command.text == BUILD:
                continue
            line = command.text.replace("e2e/lab exec", f"e2e/lab exec --name {lab.name}")
            if line.endswith("&"):
                running.enter_context(background(line.removesuffix("&"), environment))
                port = re.search(r"--local-port (\d+)", line)
                if port is not None:  # else it connects again and again
                    wait_for_connection(lab, int(port[1]))
                continue
            if line not in printed:  # a page may show several pieces of one output
                done = subprocess.run(
                    shlex.split(line),
                    cwd=ROOT,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
                printed[line] = done.returncode, done.stdout + done.stderr
            found.append(difference(command, *printed[line]))
            outputs.append((command, printed[line][1]))
    if os.environ.get("GKETRACE_UPDATE_DOCS"):
        renew(page, outputs)
        return
    assert len(found) > (10 if page == "docs/tutorial.md" else 0)
    wrong = [text for text in found if text]
    assert not wrong, "\n\n".join(wrong)


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def test_the_cli_finds_the_daemonset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Label, port name and port of deploy/daemonset.yaml are those that the CLI looks for, and
    the agent takes its arguments."""
    # As every container has them.
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.43.240.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    documents = yaml.safe_load_all((ROOT / "deploy" / "daemonset.yaml").read_text())
    (daemonset,) = (one for one in documents if one["kind"] == "DaemonSet")
    template = daemonset["spec"]["template"]
    name, value = LABEL.split("=")
    assert template["metadata"]["labels"][name] == value
    (container,) = template["spec"]["containers"]
    config = parse_arguments(container["args"])
    ports = {port["name"]: port for port in container["ports"]}
    port = ports[PORT_NAME]
    assert config.metrics is not None
    assert config.metrics.port == ports["metrics"]["containerPort"]
    assert [(a.host, a.port) for a in config.listen if not a.path] == [
        ("127.0.0.1", port["containerPort"])
    ]
