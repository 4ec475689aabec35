"""Prometheus metrics, on a port of their own.

A scrape reads what the kernel keeps as numbers (count, limit, statistics) and the last sample; it
never reads the table.  A thread does that every now and then: at most `_SHARE` of one CPU, and for
`_TIME_LIMIT` seconds at a time.  Which series there are: `gketrace_agent.metrics_series`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, ProcessCollector

from gketrace.errors import GketraceError, UnavailableError
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle
from gketrace_agent.log import logger
from gketrace_agent.metrics_http import ScrapeServer
from gketrace_agent.metrics_series import Collector, Sampled
from gketrace_agent.observe.conntrack_names import ServiceNames
from gketrace_agent.observe.conntrack_sample import take_sample
from gketrace_agent.observe.conntrack_table import ConntrackTable, open_conntrack
from gketrace_agent.observe.pod_tables import PodTables

if TYPE_CHECKING:
    from gketrace_agent.tls import Certificate

__all__ = ["MetricsServer", "Sampler"]

_EVERY: Final = 15.0
"""Seconds between samples of a table that costs little."""
_SHARE: Final = 0.02
"""Of one CPU, that sampling may take in the long run."""
_TIME_LIMIT: Final = 5.0
"""Seconds for one sample."""
_NAMES_EVERY: Final = 300.0
"""Seconds between readings of the rules for Services' names."""


class Sampler:
    """Samples one table, and the size of each pod's, in a thread of its own."""

    def __init__(
        self,
        table: ConntrackTable,
        names: Callable[[], ServiceNames],
        pods: Callable[[], PodTables],
        *,
        every: float = _EVERY,
        share: float = _SHARE,
    ) -> None:
        self._table = table
        self._read_names = names
        self._read_pods = pods
        self._every = every
        self._share = share
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._names: ServiceNames = {}
        self._names_at = float("-inf")
        self._pods: PodTables | None = None
        self.last: Sampled | None = None
        self.failures = 0
        """Times that something could not be read."""
        self.cpu_seconds = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after the sample that it is taking."""
        self._over.set()
        self._thread.join(_TIME_LIMIT + 1)

    def _run(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            cpu = time.thread_time()
            # One that fails does not keep the others from being told.
            for what, read in (("names", self._names_now), ("pods", self._pods_now)):
                self._try(what, read)
            self._try("conntrack", self._sample)
            took = time.thread_time() - cpu
            self.cpu_seconds += took
            pause = max(self._every, took / self._share)

    def _try(self, what: str, read: Callable[[], None]) -> None:
        try:
            read()
        except GketraceError as error:
            self.failures += 1
            logger.warning("no sample of %s: %s", what, error)

    def _names_now(self) -> None:
        if time.monotonic() - self._names_at > _NAMES_EVERY:
            self._names, self._names_at = self._read_names(), time.monotonic()

    def _pods_now(self) -> None:
        self._pods = None
        self._pods = self._read_pods()

    def _sample(self) -> None:
        sample = take_sample(self._table, time_limit=_TIME_LIMIT)
        self.last = Sampled(sample=sample, names=self._names, pods=self._pods)


class MetricsServer:
    """Serves /metrics.  `start`, then `stop`, once each."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        node: str,
        netns: NetnsHandle,
        paths: HostPaths,
        names: Callable[[], ServiceNames],
        pods: Callable[[], PodTables],
        every: float = _EVERY,
        certificate: Certificate | None = None,
    ) -> None:
        """`netns`, the host's, becomes this server's, which closes it.

        `certificate`: served over TLS with it; None: in the clear.
        """
        self._certificate = certificate
        self._host = host
        self._port = port
        self._stack = ExitStack()
        self._stack.callback(netns.close)
        table = self._stack.enter_context(open_conntrack(netns, paths))
        # Scrapes and samples read side by side.
        counts = self._stack.enter_context(open_conntrack(netns, paths))
        self.sampler: Final = Sampler(table, names, pods, every=every)
        self._registry = CollectorRegistry()
        self._registry.register(Collector(counts, self.sampler, node))
        ProcessCollector(registry=self._registry)

    def start(self) -> int:
        """Serves; returns the port.  Raises `UnavailableError` when the address is taken."""
        try:
            server = ScrapeServer(self._host, self._port, self._registry, self._certificate)
        except OSError as error:
            self._stack.close()
            raise UnavailableError(
                f"cannot serve metrics on {self._host}:{self._port}: {error.strerror}"
            ) from None
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(5)

        self.sampler.start()
        self._stack.callback(self.sampler.stop)
        self._stack.callback(stop)
        return int(server.server_port)

    def stop(self) -> None:
        """May be called twice."""
        self._stack.close()
