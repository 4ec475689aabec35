"""What all tests share."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores it for what it starts in the background, and children inherit that; the tests
    # of Ctrl-C need children that hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How quickly examples are made says something about the machine, and nothing about the project.
settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")

_FIRST = (
    "e2e/test_answers.py",
    "tests/kernel/test_oracle.py",
    "e2e/test_docs.py",
    "e2e/test_follow.py",
    "e2e/test_conntrack.py",
    "e2e/",
    "tests/core/test_connections.py",
    "tests/soak/",
)
"""What takes longest, so that no worker is left alone with it at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        path = item.path.relative_to(config.rootpath).as_posix()
        return next((n for n, one in enumerate(_FIRST) if path.startswith(one)), len(_FIRST))

    items.sort(key=turn)
