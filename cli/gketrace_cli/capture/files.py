"""Capture files: one for all taps, or one for each node, or standard output.

A file has its name only when it is whole.  Until then it is NAME.part.  A symbolic link stays one:
what it leads to is the file.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from gketrace.capture.packets import Tap
from gketrace.errors import GketraceError, UsageError
from gketrace.packet import IPAddress
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.pcapng import PcapngWriter
from gketrace_cli.capture.running import Outcome, TapOutcome, tell
from gketrace_proto.v1alpha1 import capture_pb2 as pb

__all__ = ["STDOUT", "CaptureFile", "FileSink", "node_path", "unhurried"]

STDOUT = "-"
_LATENCY: Final = 0.25
_STATISTICS: Final = 1.0
"""Seconds; how long an interruption takes depends on both, where the agent does not know
FinishCapture."""
_QUIET_STATISTICS: Final = 10.0
"""Where it does, and no other tap's packets wait for this one's statistics."""


class CaptureFile:
    """One file that is being written.  `finish` or `abandon` it."""

    def __init__(
        self,
        path: str,
        *,
        comments: Sequence[str] = (),
        names: Mapping[IPAddress, Sequence[str]] | None = None,
        suffix: str = ".part",
    ) -> None:
        """`suffix`: of its name while it is not whole.

        Raises `UsageError` when it cannot be made, `GketraceError` when there is no room,
        `BrokenPipeError`."""
        self._path = path
        self._suffix = suffix
        self._part = self._target = ""
        if path == STDOUT:
            sys.stdout.flush()
            self._fd = os.dup(1)
        else:
            self._open(path)
        try:
            self.writer = PcapngWriter(self._fd, comments=comments)
            if names:
                self.writer.names(names)
        except BrokenPipeError:
            self._close()
            raise
        except OSError as error:
            self.discard()
            raise self._unwritable(error) from None

    def _open(self, path: str) -> None:
        where = path
        try:
            self._target = _target(path)
            if self._target:
                where = self._part = f"{self._target}{self._suffix}"
            self._fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(f"cannot write {where}: {error.strerror}") from None

    def interface(self, tap: Tap) -> None:
        """Raises `GketraceError` when there is no room, `BrokenPipeError`."""
        with self._abandoned():
            self.writer.interface(tap)

    def write(self, chunk: Chunk) -> None:
        """Raises `GketraceError` when there is no room, `BrokenPipeError`."""
        with self._abandoned():
            self.writer.write(chunk)

    @contextmanager
    def _abandoned(self) -> Iterator[None]:
        """When what is done in it fails."""
        try:
            yield
        except BrokenPipeError:
            self.abandon()
            raise
        except OSError as error:
            self.abandon()
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> GketraceError:
        what = "standard output" if self._path == STDOUT else self._path
        return GketraceError(f"cannot write {what}: {error.strerror}")

    def finish(self, taps: Mapping[Tap, TapOutcome]) -> None:
        """Writes the interfaces' statistics, and gives the file its name.

        Raises `GketraceError` when there is no room, `BrokenPipeError`."""
        with self._abandoned():
            for tap, one in taps.items():
                self.writer.statistics(tap, one.statistics, one.started_ns, one.ended_ns)
            self._close()
            if self._part:
                os.replace(self._part, self._target)
                self._part = ""

    def abandon(self) -> None:
        """Leaves what there is under another name, and says so.  May be called twice."""
        if not self._close():
            return
        if self._part:
            tell(f"{self._part} has the {self.writer.packets} packets that were written until then")

    def _close(self) -> bool:
        """Whether it was open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        return fd >= 0

    def discard(self) -> None:
        """Removes what there is: it is in another file."""
        self._close()
        if self._part:
            os.unlink(self._part)


def _target(path: str) -> str:
    """The file that `path` names, through symbolic links; empty: it is no plain file, or one that
    somebody has open (``/dev/stdout``, ``/dev/fd/3``), so it is written as it is.

    Raises `OSError`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ""
    except FileNotFoundError:
        pass
    while os.path.islink(path):
        if os.path.realpath(os.path.dirname(path) or ".").startswith("/proc/"):
            return ""
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return path


def unhurried(request: pb.CaptureRequest, path: str, *, alone: bool = True) -> None:
    """For a capture of which `path` gets all: nobody waits for what is in a plain file, so it may
    come in few messages.  `alone`: of no other agent."""
    if path != STDOUT and (not Path(path).exists() or Path(path).is_file()):
        request.latency_seconds = _LATENCY
        request.statistics_seconds = _STATISTICS
        if alone and len(request.taps) == 1:
            request.quiet_statistics_seconds = _QUIET_STATISTICS


def node_path(path: str, node: str) -> str:
    """``cap.pcapng`` → ``cap.NODE.pcapng``."""
    whole = Path(path)
    return str(whole.with_name(f"{whole.stem}.{node}{whole.suffix}"))


class FileSink:
    """Writes all packets to one file, or each node's to its own."""

    def __init__(
        self,
        path: str,
        *,
        per_node: bool = False,
        comments: Callable[[], Sequence[str]] = tuple,
        names: Mapping[IPAddress, Sequence[str]] | None = None,
        suffix: str = ".part",
    ) -> None:
        """`suffix`: of the files' names while they are not whole."""
        if per_node and path == STDOUT:
            raise UsageError("--per-node writes several files", hint="give -w FILE")
        self._path = path
        self._per_node = per_node
        self._comments = comments
        self._names = names
        self._suffix = suffix
        self._files: dict[str, CaptureFile] = {}
        if not per_node:
            self._file("")

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the files, as they are called when they are whole."""
        if not self._per_node:
            return (self._path,)
        return tuple(node_path(self._path, node) for node in self._files)

    def _file(self, node: str) -> CaptureFile:
        key = node if self._per_node else ""
        if key not in self._files:
            path = node_path(self._path, node) if self._per_node else self._path
            self._files[key] = CaptureFile(
                path, comments=self._comments(), names=self._names, suffix=self._suffix
            )
        return self._files[key]

    def started(self, taps: tuple[Tap, ...]) -> None:
        for tap in taps:
            self._file(tap.node).interface(tap)

    def write(self, chunk: Chunk) -> None:
        if not self._per_node or len({batch.tap.node for batch in chunk.batches}) == 1:
            self._file(chunk.batches[0].tap.node).write(chunk)
            return
        for node in {batch.tap.node: None for batch in chunk.batches}:
            self._file(node).write(chunk.of(lambda tap, node=node: tap.node == node))  # type: ignore[misc]

    def finish(self, outcome: Outcome) -> None:
        for key, file in self._files.items():
            file.finish(
                {
                    tap: one
                    for tap, one in outcome.taps.items()
                    if not self._per_node or tap.node == key
                }
            )

    def abandon(self) -> None:
        """After an error elsewhere."""
        for file in self._files.values():
            file.abandon()

    def discard(self) -> None:
        """Removes what was written."""
        for file in self._files.values():
            file.discard()
