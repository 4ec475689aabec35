"""Subprocesses: fixed argument vectors, no shell, bounded in time, output and stack, always reaped.

A child inherits the network namespace of the thread that starts it.  subprocess uses vfork and
exec here (no preexec_fn, no cwd tricks), so nothing of this process runs in a child.

A child's output goes into a file in memory, not through a pipe: the tools write 4 KiB at a time, a
dump of a large node is 35 MB, and to be woken for each piece costs more than the dump itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import selectors
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Final

from gketrace.errors import ExhaustedError, TimeoutExceeded, UnavailableError
from gketrace_agent.kernel.capabilities import missing_capabilities

__all__ = ["Child", "Completed", "collect", "find_program", "run", "start"]

_SEARCH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""An agent started by hand as root often lacks the sbin directories."""
_ENVIRONMENT: Final = {"PATH": _SEARCH, "LC_ALL": "C", "LANG": "C"}
_STDERR: Final = 1 << 16
"""Bytes of stderr that are read at once, and all that is kept."""
_PIECE: Final = 1 << 20
"""Bytes of output that a reader is told at once, at most."""
_LEAST: Final = 1 << 15
"""Bytes for which a reader is told while the program still runs."""
_LOOK: Final = 0.001
"""Seconds between looks at the output of a program that is being read, in its first moments."""
_STACK: Final = 512 << 20
"""Bytes.  iptables-nft-save keeps arrays on the stack: the usual 8 MiB overflow at 10,000 services.
Only what is touched takes memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A subprocess that ended by itself within its bounds."""

    argv: tuple[str, ...]
    returncode: int
    """Negative: the signal that killed it."""
    stdout: bytes
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    def failure(self) -> str:
        """One sentence on how it failed: the program, how it ended, what it wrote to stderr, and
        which capability it lacked."""
        ended = (
            f"was killed by signal {-self.returncode}"
            if self.returncode < 0
            else f"exited with status {self.returncode}"
        )
        said = " ".join(self.stderr.split())[:300]
        hint = missing_capabilities(said)
        told = f": {said}" if said else ""
        return f"{os.path.basename(self.argv[0])} {ended}{told}{f'; {hint}' if hint else ''}"


class Child:
    """A subprocess under way; give it to `collect`."""

    __slots__ = ("_told", "argv", "limit", "output", "process", "read", "started", "stderr")

    def __init__(
        self,
        argv: tuple[str, ...],
        process: subprocess.Popen[bytes],
        output: int,
        limit: int,
        read: Callable[[bytes], None] | None,
    ) -> None:
        self.argv = argv
        self.read = read
        """Is given the output piece by piece, in `collect`."""
        self._told = 0
        self.process = process
        self.output = output
        """The file that its standard output goes to; -1 once it is closed."""
        self.limit = limit
        self.started = time.monotonic()
        self.stderr = bytearray()

    def tell(self, least: int = _LEAST) -> bool:
        """Gives a piece of at least so many new bytes to the reader; False: there is none."""
        if self.read is None:
            return False
        size = min(os.fstat(self.output).st_size, self.limit) - self._told
        if size < least:
            return False
        piece = os.pread(self.output, min(size, _PIECE), self._told)
        self._told += len(piece)
        self.read(piece)
        return True

    def kill(self) -> None:
        """Kills it if it still runs, reaps it and closes its files."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        output, self.output = self.output, -1
        if output >= 0:
            os.close(output)


def find_program(*names: str) -> str | None:
    """The path of the first of `names` that is installed; absolute names are taken as they are."""
    for name in names:
        found = shutil.which(name, path=_SEARCH)
        if found:
            return found
    return None


def start(argv: Sequence[str], *, limit: int, read: Callable[[bytes], None] | None = None) -> Child:
    """Starts `argv` in the calling thread's namespace.  `limit`: the most bytes of output.

    `read` is called in `collect` with all that the program writes, piece by piece, while it is
    still at work.  Raises `UnavailableError` when it cannot be started.
    """
    vector = tuple(argv)
    _raise_stack()
    output = os.memfd_create(os.path.basename(vector[0]))
    try:
        process = subprocess.Popen(  # a fixed vector, no shell
            vector,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
    except OSError as error:
        os.close(output)
        raise UnavailableError(f"cannot run {vector[0]}: {error.strerror}") from None
    child = Child(vector, process, output, limit, read)
    try:
        # One byte more than it may write, so that too much can be told from just enough.
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit + 1, limit + 1))
    except BaseException:
        child.kill()
        raise
    return child


@functools.cache
def _raise_stack() -> None:
    """Raises this process's own soft limit, once; children inherit it.

    Setting a child's (prlimit) comes too early: execve puts back the limit that it began with
    (bprm->rlim_stack, finalize_exec) after Popen has returned.  Here it changes nothing else:
    threads' stacks have the size that glibc read at start-up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK if hard == resource.RLIM_INFINITY else min(_STACK, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def collect(
    children: Sequence[Child], *, timeout: float
) -> list[Completed | UnavailableError | ExhaustedError]:
    """Waits for all of `children`, in order: what each gave, or why it gave nothing.

    `timeout` counts in seconds from now and is for all together.  A child over its time or its
    output is killed; all are reaped, whatever happens.
    """
    deadline = time.monotonic() + timeout
    try:
        with selectors.DefaultSelector() as selector:
            for child in children:
                if child.process.stderr is not None:
                    os.set_blocking(child.process.stderr.fileno(), False)
                    selector.register(child.process.stderr, selectors.EVENT_READ, child)
            _drain(selector, deadline, [child for child in children if child.read is not None])
        return [_finish(child, deadline) for child in children]
    finally:
        for child in children:
            child.kill()


def _drain(selector: selectors.DefaultSelector, deadline: float, read: Sequence[Child]) -> None:
    """Until all have closed their stderr, which ending does."""
    began = time.monotonic()
    while selector.get_map():
        now = time.monotonic()
        if now >= deadline:
            return
        wait = deadline - now
        told = [child.tell() for child in read]
        if True in told:
            wait = 0.0
        elif read:
            # A file in memory does not tell that it has grown.
            wait = min(wait, max(_LOOK, (now - began) / 50))
        for key, _ in selector.select(wait):
            child: Child = key.data
            pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]  # what was registered
            data = os.read(pipe.fileno(), _STDERR)
            child.stderr += data[: _STDERR - len(child.stderr)]
            if not data:
                selector.unregister(pipe)


def _finish(child: Child, deadline: float) -> Completed | UnavailableError | ExhaustedError:
    name = os.path.basename(child.argv[0])
    try:
        child.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        waited = time.monotonic() - child.started
        return TimeoutExceeded(f"{name} was killed after {waited:.1f} s without an end")
    if os.fstat(child.output).st_size > child.limit:
        return ExhaustedError(f"{name} wrote more than {child.limit} bytes")
    while child.tell(1):
        pass
    return Completed(
        argv=child.argv,
        returncode=child.process.returncode,
        stdout=_contents(child.output),
        stderr=child.stderr.decode("utf-8", "backslashreplace"),
        seconds=time.monotonic() - child.started,
    )


def _contents(file: int) -> bytes:
    """All of a file, in one piece and with one copy where the kernel gives it so."""
    size = os.fstat(file).st_size
    data = os.pread(file, size, 0)
    while len(data) < size:  # more than 2 GiB
        data += os.pread(file, size - len(data), len(data))
    return data


def run(argv: Sequence[str], *, timeout: float, limit: int) -> Completed:
    """Runs one program to its end.  Raises `UnavailableError`, `TimeoutExceeded`,
    `ExhaustedError`; a status other than 0 is for the caller to judge."""
    (result,) = collect([start(argv, limit=limit)], timeout=timeout)
    if isinstance(result, Completed):
        return result
    raise result
