"""Ends a stream whose client has stopped reading."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import grpc

from gketrace_agent.calls import LOSSES
from gketrace_agent.log import logger

__all__ = ["until_stalled"]

T = TypeVar("T")


def until_stalled(
    replies: Iterator[T], context: grpc.ServicerContext, seconds: float
) -> Iterator[T]:
    """`replies`, until the client takes nothing for `seconds`: then the call is cancelled.

    gRPC asks for the next message when the one before has gone into the connection's window, so a
    client that does not read holds up `replies` (which is the back-pressure that we want), and
    with it a thread and whatever the call has open.
    """
    handed: list[float] = []
    """When the message was handed over that the client has not taken yet; empty: none."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(seconds / 4, 1.0)):
            since = handed[:]
            if since and time.monotonic() - since[0] > seconds:
                logger.warning("call cut off: its client took nothing for %s s", seconds)
                LOSSES.add("stalled_streams", 1)
                context.cancel()  # type: ignore[no-untyped-call]
                return

    threading.Thread(target=watch, name="stall", daemon=True).start()
    try:
        for reply in replies:
            handed.append(time.monotonic())
            yield reply
            handed.clear()
    finally:
        over.set()
