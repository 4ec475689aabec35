from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from gketrace.errors import ExhaustedError, TimeoutExceeded, UnavailableError
from gketrace_agent.kernel.process import Completed, collect, find_program, run, start
from tests.agent.observe.bed import Bed
from tests.agent.observe.conftest import bed as bed  # a fixture


def test_output_status_and_errors_are_told() -> None:
    done = run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout=10, limit=1000)
    assert (done.stdout, done.stderr, done.returncode, done.ok) == (b"out\n", "err\n", 3, False)
    assert done.failure() == "sh exited with status 3: err"
    done = run(["sh", "-c", "kill -SEGV $$"], timeout=10, limit=1000)
    assert done.failure() == "sh was killed by signal 11"


def test_a_reader_is_given_all_of_it_and_some_while_it_runs(tmp_path: Path) -> None:
    told = tmp_path / "told"
    pieces: list[bytes] = []

    def read(piece: bytes) -> None:
        pieces.append(piece)
        told.touch()

    # It goes on only when it has been read.
    script = f"head -c 200000 /dev/zero; until [ -e {told} ]; do sleep 0.01; done; echo end"
    (done,) = collect([start(["sh", "-c", script], limit=1 << 20, read=read)], timeout=30)
    assert isinstance(done, Completed), done
    assert b"".join(pieces) == done.stdout
    assert len(done.stdout) == 200_004


def test_a_process_over_its_time_is_killed_and_reaped() -> None:
    child = start(["sleep", "60"], limit=1000)
    began = time.monotonic()
    (result,) = collect([child], timeout=0.1)
    assert isinstance(result, TimeoutExceeded)
    assert time.monotonic() - began < 30  # it would sleep for 60
    assert child.process.returncode == -9
    assert not Path(f"/proc/{child.process.pid}").exists()


def test_a_process_that_closes_its_output_and_stays_is_killed() -> None:
    (result,) = collect([start(["sh", "-c", "exec >&- 2>&-; sleep 60"], limit=1000)], timeout=0.2)
    assert isinstance(result, TimeoutExceeded)


def test_a_process_over_its_output_is_killed() -> None:
    child = start(["yes"], limit=100_000)
    with pytest.raises(ExhaustedError, match="yes wrote more than 100000 bytes"):
        raise next(iter(collect([child], timeout=10)))  # type: ignore[misc]
    assert child.process.returncode == -signal.SIGXFSZ
    just_enough = run(["head", "-c", "1000", "/dev/zero"], timeout=10, limit=1000)
    assert (len(just_enough.stdout), just_enough.returncode) == (1000, 0)


def test_much_on_stderr_is_cut() -> None:
    done = run(["sh", "-c", "yes | head -c 1000000 >&2; echo end"], timeout=10, limit=1000)
    assert (done.stdout, len(done.stderr)) == (b"end\n", 1 << 16)


def test_large_outputs_come_whole_and_side_by_side(tmp_path: Path) -> None:
    # Each ends when all have written theirs.
    script = (
        f"head -c 5000000 /dev/zero; touch {tmp_path}/$$; "
        f"until [ $(ls {tmp_path} | wc -l) = 4 ]; do sleep 0.01; done"
    )
    argv = ["sh", "-c", script]
    results = collect([start(argv, limit=1 << 24) for _ in range(4)], timeout=60)
    assert [len(r.stdout) for r in results if isinstance(r, Completed)] == [5_000_000] * 4


def test_what_is_not_there_cannot_run() -> None:
    with pytest.raises(UnavailableError, match="gko-none"):
        run(["/gko-none"], timeout=1, limit=1)
    assert find_program("gko-none", "sh") in ("/usr/bin/sh", "/bin/sh")
    assert find_program("gko-none") is None


def test_a_child_is_in_the_threads_namespace(bed: Bed) -> None:
    netns = bed.netns("child")
    done = netns.inside(lambda: run(["readlink", "/proc/self/ns/net"], timeout=10, limit=100))
    assert done.stdout.decode().strip() == f"net:[{netns.handle.inode}]"


def test_the_stack_of_a_child_may_grow() -> None:
    done = run(["cat", "/proc/self/limits"], timeout=10, limit=10_000)
    (line,) = (line for line in done.stdout.decode().splitlines() if "stack" in line)
    soft = line.split()[3]
    assert soft == "unlimited" or int(soft) >= 512 << 20
