"""What all tests share."""

from __future__ import annotations

import signal

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
