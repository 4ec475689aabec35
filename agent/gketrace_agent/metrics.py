"""Prometheus metrics, on a port of their own.

A scrape reads what the kernel keeps as numbers (count, limit, statistics) and the last sample; it
never reads the table.  A thread does that every now and then: at most `_SHARE` of one CPU, and for
`_TIME_LIMIT` seconds at a time.  Series are bounded whatever the node does: the busiest `_TOP`
Services and source-translated destinations have their own, all others one together.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from gketrace.errors import GketraceError, UnavailableError
from gketrace_agent.calls import BUCKETS, CALLS
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle
from gketrace_agent.log import logger
from gketrace_agent.observe.conntrack_sample import Destination, Sample, ServiceNames, take_sample
from gketrace_agent.observe.conntrack_table import ConntrackTable, open_conntrack

if TYPE_CHECKING:
    from collections import Counter

    from gketrace_agent.tls import Certificate

__all__ = ["MetricsServer", "Sampler"]

_TOP: Final = 20
"""Services, and destinations of source NAT, with a series of their own."""
_SCRAPE_SECONDS: Final = 10.0
"""For a scrape's handshake and its request."""
_EVERY: Final = 15.0
"""Seconds between samples of a table that costs little."""
_SHARE: Final = 0.02
"""Of one CPU, that sampling may take in the long run."""
_TIME_LIMIT: Final = 5.0
"""Seconds for one sample."""
_NAMES_EVERY: Final = 300.0
"""Seconds between readings of the rules for Services' names."""


@dataclass(frozen=True, slots=True)
class _Last:
    sample: Sample
    names: ServiceNames


class Sampler:
    """Samples one table in a thread of its own."""

    def __init__(
        self,
        table: ConntrackTable,
        names: Callable[[], ServiceNames],
        *,
        every: float = _EVERY,
        share: float = _SHARE,
    ) -> None:
        self._table = table
        self._names = names
        self._every = every
        self._share = share
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self.last: _Last | None = None
        self.failures = 0
        """Samples that could not be taken."""
        self.cpu_seconds = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after the sample that it is taking."""
        self._over.set()
        self._thread.join(_TIME_LIMIT + 1)

    def _run(self) -> None:
        names: ServiceNames = {}
        names_at = float("-inf")
        pause = 0.0
        while not self._over.wait(pause):
            cpu = time.thread_time()
            try:
                if time.monotonic() - names_at > _NAMES_EVERY:
                    names, names_at = self._names(), time.monotonic()
                sample = take_sample(self._table, time_limit=_TIME_LIMIT)
                self.last = _Last(sample, names)
            except GketraceError as error:
                self.failures += 1
                logger.warning("no conntrack sample: %s", error)
            took = time.thread_time() - cpu
            self.cpu_seconds += took
            pause = max(self._every, took / self._share)


class _Collector:
    """Makes the series of one scrape."""

    def __init__(self, table: ConntrackTable, sampler: Sampler, node: str) -> None:
        self._table = table
        self._sampler = sampler
        self._node = node

    def collect(self) -> Iterator[Metric]:
        begun = time.perf_counter()
        yield from self._kernel()
        yield from self._sampled()
        yield from self._calls()
        yield _gauge(
            "gketrace_agent_scrape_seconds",
            "Time that the agent took to make this scrape's series.",
            time.perf_counter() - begun,
        )

    def _kernel(self) -> Iterator[Metric]:
        yield _gauge(
            "gketrace_conntrack_entries",
            "Entries in the node's connection-tracking table.",
            self._table.size().entries,
        )
        yield _gauge(
            "gketrace_conntrack_entries_limit",
            "net.netfilter.nf_conntrack_max: beyond it the kernel drops new connections.",
            self._table.limit(),
        )
        totals: dict[str, int] = {}
        for cpu in self._table.statistics():
            for name, value in cpu.counters.items():
                totals[name] = totals.get(name, 0) + value
        for name, value in totals.items():
            yield CounterMetricFamily(
                f"gketrace_conntrack_{name}",
                f"The kernel's own statistic {name} of connection tracking, over all CPUs.",
                value=value,
            )

    def _sampled(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "gketrace_conntrack_sample_failures",
            "Samples of the table that could not be taken.",
            value=self._sampler.failures,
        )
        yield CounterMetricFamily(
            "gketrace_conntrack_sample_cpu_seconds",
            "CPU time that sampling took.",
            value=self._sampler.cpu_seconds,
        )
        last = self._sampler.last
        if last is None:
            return
        sample = last.sample
        yield _gauge(
            "gketrace_conntrack_sample_age_seconds",
            "Age of the sample that the sampled series are of.",
            max(time.time() - sample.at, 0.0),
        )
        yield _gauge(
            "gketrace_conntrack_sample_seconds", "Time that the sample took.", sample.seconds
        )
        yield _gauge(
            "gketrace_conntrack_sample_complete",
            "1 if the sample is of the whole table, 0 if it ran out of time or was interrupted.",
            float(sample.finished and sample.consistent),
        )
        states = GaugeMetricFamily(
            "gketrace_conntrack_state_entries",
            "Sampled entries by protocol and state.",
            labels=("protocol", "state"),
        )
        for (protocol, state), count in sample.states.items():
            states.add_metric((protocol, state), count)
        yield states
        unreplied = GaugeMetricFamily(
            "gketrace_conntrack_unreplied_entries",
            "Sampled entries that have seen no answer, by protocol.",
            labels=("protocol",),
        )
        for protocol, count in sample.unreplied.items():
            unreplied.add_metric((protocol,), count)
        yield unreplied
        yield from _services(sample, last.names)
        yield from _snat(sample)

    def _calls(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            "gketrace_agent_calls",
            "Calls that ended, by method and gRPC status.",
            labels=("method", "code"),
        )
        durations = HistogramMetricFamily(
            "gketrace_agent_call_duration_seconds",
            "How long calls took, streams until their end.",
            labels=("method",),
        )
        for method, counts in sorted(CALLS.read().items()):
            for code, count in counts.codes.items():
                calls.add_metric((method, code), count)
            total = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*BUCKETS, float("inf")), counts.durations, strict=True):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
            durations.add_metric((method,), buckets, counts.seconds)
        yield calls
        yield durations
        yield InfoMetricFamily(
            "gketrace_agent_build",
            "Version of the agent.",
            value={"version": metadata.version("gketrace"), "node": self._node},
        )


def _services(sample: Sample, names: ServiceNames) -> Iterator[Metric]:
    """Entries by Service, and what was folded."""
    by_name: dict[str, int] = {}
    for destination, count in sample.translated.items():
        name = _service(destination, names)
        by_name[name] = by_name.get(name, 0) + count
    ranked = sorted(by_name.items(), key=lambda item: (-item[1], item[0]))
    family = GaugeMetricFamily(
        "gketrace_conntrack_service_entries",
        "Sampled entries whose destination was translated, by the Service (namespace/name:port) "
        "of the rule, or by address where no rule names it; the rest is `other`.",
        labels=("service",),
    )
    for name, count in ranked[:_TOP]:
        family.add_metric((name,), count)
    family.add_metric(("other",), sum(count for _, count in ranked[_TOP:]) + sample.given_up)
    yield family
    yield _gauge(
        "gketrace_conntrack_services_folded",
        "Services whose entries are in the series `other`.",
        max(len(ranked) - _TOP, 0),
    )


def _service(destination: Destination, names: ServiceNames) -> str:
    address, port, protocol = destination
    found = names.get(destination) or names.get(("", port, protocol))
    return found or f"{_with_port(address, port)}/{protocol}"


def _snat(sample: Sample) -> Iterator[Metric]:
    """Source ports in use towards one destination: there are some 64,000 of them."""
    ranked: Counter[Destination] = sample.snat
    family = GaugeMetricFamily(
        "gketrace_conntrack_snat_ports",
        "Sampled entries whose source was translated, each with a source port of the node, by the "
        "destinations that take the most; the rest is `other`.",
        labels=("destination", "protocol"),
    )
    top = ranked.most_common(_TOP)
    for (address, port, protocol), count in top:
        family.add_metric((_with_port(address, port), protocol), count)
    rest = sum(ranked.values()) - sum(count for _, count in top)
    family.add_metric(("other", ""), rest)
    yield family
    yield _gauge(
        "gketrace_conntrack_snat_destinations_folded",
        "Destinations whose source ports are in the series `other`.",
        len(ranked) - len(top),
    )


def _with_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


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
        self.sampler: Final = Sampler(table, names, every=every)
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(counts, self.sampler, node))
        ProcessCollector(registry=self._registry)

    def start(self) -> int:
        """Serves; returns the port.  Raises `UnavailableError` when the address is taken."""
        try:
            server, thread = start_http_server(self._port, self._host, registry=self._registry)
        except OSError as error:
            self._stack.close()
            raise UnavailableError(
                f"cannot serve metrics on {_with_port(self._host, self._port)}: {error.strerror}"
            ) from None

        if (certificate := self._certificate) is not None:
            accept = server.get_request

            def get_request() -> tuple[socket.socket, Any]:
                # The handshake is made in the connection's own thread, by its first read.
                connection, peer = accept()
                connection.settimeout(_SCRAPE_SECONDS)
                wrapped = certificate.context().wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                return wrapped, peer

            server.get_request = get_request  # type: ignore[method-assign]

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
