"""xt_recent's lists: session affinity's memory (/proc/net/xt_recent/NAME).

The file gives the time of each packet in jiffies.  Now, in jiffies, is worked out: the kernel
starts them at -300 s (INITIAL_JIFFIES, so that wrapping shows early) as a 32-bit number, and moves
them on by CLOCK_MONOTONIC (tick_do_update_jiffies64); a jiffy is the resolution of
CLOCK_MONOTONIC_COARSE (TICK_NSEC).  What jiffies lagged behind the clock during boot, well under
a second, is the error.

Source: kernel net/netfilter/xt_recent.c recent_seq_show(), include/linux/jiffies.h,
kernel/time/tick-sched.c.
"""

from __future__ import annotations

import re
import time
from ipaddress import ip_address
from typing import Final

from gketrace.snapshot import RecentEntry
from gketrace_agent.kernel.reader import KernelReader

__all__ = ["jiffies_now", "observe_recent", "parse_recent"]

_LINE: Final = re.compile(
    r"src=(\S+) ttl: (\d+) last_seen: (\d+) oldest_pkt: \d+((?:,? ?\d+)*)", re.ASCII
)
_CLOCK_MONOTONIC_COARSE: Final = 6


def jiffies_now() -> tuple[float, int]:
    """Now in jiffies, and how many of them a second has (CONFIG_HZ)."""
    per_second = round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))
    initial = (-300 * per_second) & 0xFFFFFFFF
    return initial + time.clock_gettime(time.CLOCK_MONOTONIC) * per_second, per_second


def observe_recent(reader: KernelReader) -> dict[str, tuple[RecentEntry, ...]]:
    """List name → its addresses.  Empty where no rule of the namespace uses xt_recent."""
    try:
        names = reader.list_net("xt_recent")
    except FileNotFoundError:
        return {}
    found = {}
    for name in names:
        try:
            content = reader.read_net("xt_recent", name)
        except FileNotFoundError:
            continue  # the last rule with this list went away meanwhile
        now, per_second = jiffies_now()
        found[name] = parse_recent(content, now, per_second)
    return found


def parse_recent(content: str, now: float, per_second: int) -> tuple[RecentEntry, ...]:
    """The lines of one list.  Raises ValueError for a line that is none of xt_recent's."""
    entries = []
    for line in content.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"not a line of xt_recent: {line!r}")
        address, ttl, last, stamps = match.groups()
        jiffies = [int(stamp) for stamp in re.findall(r"\d+", stamps)] or [int(last)]
        ages = sorted(max(0.0, (now - stamp) / per_second) for stamp in jiffies)
        entries.append(
            RecentEntry(
                address=ip_address(address), ages=tuple(ages), ttl=int(ttl), text=line.strip()
            )
        )
    return tuple(entries)
