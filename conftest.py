"""What all tests share."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores it for what it starts in the background, and children inherit that; the tests
    # of Ctrl-C need children that hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
