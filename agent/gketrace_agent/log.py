"""Structured logs: one JSON object a line.

Keys: ``ts`` (RFC 3339, UTC), ``level``, ``msg``; for a call also ``call``, ``target``,
``duration_ms``, ``code``, ``peer``, and ``error`` where it failed; for an unexpected exception
``traceback``.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

__all__ = ["logger", "start_logging"]

logger: Final = logging.getLogger("gketrace_agent")
"""The agent's log.  Extra keys go into ``extra={"fields": {...}}``."""


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "ts": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "msg": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def start_logging(file: Path | None, *, debug: bool) -> logging.Handler:
    """Sends the log to `file`, or to standard error.  Raises OSError when it cannot be opened.

    gRPC's own Python messages go the same way.
    """
    handler: logging.Handler
    handler = logging.StreamHandler(sys.stderr) if file is None else logging.FileHandler(file)
    handler.setFormatter(_JsonLines())
    for name in ("gketrace_agent", "grpc"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.setLevel(logging.DEBUG if debug else logging.INFO)
        log.propagate = False
    return handler
