"""The series of one scrape.

Their number is bounded whatever the node does: the busiest `_TOP` Services, source-translated
destinations and pods have series of their own, all others one together, and how many those are is
a series, too.  docs/metrics.md has every name.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Final, Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from gketrace_agent.calls import BUCKETS, CALLS, LOSSES
from gketrace_agent.capture_counts import CAPTURES
from gketrace_agent.kernel.netns import count_open
from gketrace_agent.observe.conntrack_names import Destination, ServiceNames
from gketrace_agent.observe.conntrack_sample import Sample
from gketrace_agent.observe.conntrack_table import ConntrackTable
from gketrace_agent.observe.pod_tables import PodTables

__all__ = ["Collector", "Sampled", "Totals"]

_TOP: Final = 20
"""Services, destinations of source NAT, and pods with a series of their own."""
_COUNTER: Final = 1 << 32
"""The kernel's statistics are unsigned 32-bit numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the sampler brought last."""

    sample: Sample
    names: ServiceNames
    pods: PodTables | None
    """None: they could not be counted."""


class _Sampler(Protocol):
    """`gketrace_agent.metrics.Sampler`, as far as it is read here."""

    last: Sampled | None
    failures: int
    cpu_seconds: float


class Totals:
    """Sums of counters that wrap: each one's growth since it was read last."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], int] = {}
        self._totals: dict[str, int] = {}

    def add(self, cpu: int, counters: Mapping[str, int]) -> None:
        """What one CPU says now."""
        for name, value in counters.items():
            before = self._before.get((cpu, name), 0)
            self._totals[name] = self._totals.get(name, 0) + (value - before) % _COUNTER
            self._before[cpu, name] = value

    @property
    def totals(self) -> Mapping[str, int]:
        return self._totals


class Collector:
    """Makes the series of one scrape."""

    def __init__(self, table: ConntrackTable, sampler: _Sampler, node: str) -> None:
        self._table = table
        self._sampler = sampler
        self._node = node
        self._statistics = Totals()

    def collect(self) -> Iterator[Metric]:
        begun = time.perf_counter()
        yield from self._kernel()
        yield from self._sampled()
        yield from _calls()
        yield from self._process()
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
        for cpu in self._table.statistics():
            self._statistics.add(cpu.cpu, cpu.counters)
        for name, value in self._statistics.totals.items():
            yield CounterMetricFamily(
                f"gketrace_conntrack_{name}",
                f"The kernel's own statistic {name} of connection tracking, over all CPUs.",
                value=value,
            )

    def _sampled(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "gketrace_conntrack_sample_failures",
            "Times that the table, the pods or the names of Services could not be read.",
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
        if last.pods is not None:
            yield from _pods(last.pods)

    def _process(self) -> Iterator[Metric]:
        lost = CounterMetricFamily(
            "gketrace_agent_lost",
            "What clients did not get: conntrack_events and capture_packets that the kernel "
            "dropped, conntrack_dumps that never held still, stalled_streams that were cut off.",
            labels=("kind",),
        )
        captured = CAPTURES.read()
        for kind, count in {**LOSSES.read(), "capture_packets": captured.dropped}.items():
            lost.add_metric((kind,), count)
        yield lost
        yield _gauge("gketrace_agent_captures", "Captures that are running.", captured.open)
        yield CounterMetricFamily(
            "gketrace_agent_capture_packets",
            "Captured packets that were sent to clients.",
            value=captured.packets,
        )
        yield CounterMetricFamily(
            "gketrace_agent_capture_bytes",
            "Bytes of them, with the kernel's headers.",
            value=captured.bytes,
        )
        yield _gauge(
            "gketrace_agent_open_namespaces",
            "Network namespaces that the agent holds open.",
            count_open(),
        )
        yield InfoMetricFamily(
            "gketrace_agent_build",
            "Version of the agent.",
            value={"version": metadata.version("gketrace"), "node": self._node},
        )


def _calls() -> Iterator[Metric]:
    calls = CounterMetricFamily(
        "gketrace_agent_calls",
        "Calls that ended, by method and gRPC status.",
        labels=("method", "code"),
    )
    sent = CounterMetricFamily(
        "gketrace_agent_call_sent_bytes",
        "Bytes of replies of calls that ended, by method.",
        labels=("method",),
    )
    durations = HistogramMetricFamily(
        "gketrace_agent_call_duration_seconds",
        "How long calls took, streams until their end.",
        labels=("method",),
    )
    for method, counts in sorted(CALLS.read().items()):
        for code, count in counts.codes.items():
            calls.add_metric((method, code), count)
        sent.add_metric((method,), counts.sent)
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*BUCKETS, float("inf")), counts.durations, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        durations.add_metric((method,), buckets, counts.seconds)
    yield calls
    yield sent
    yield durations


def _services(sample: Sample, names: ServiceNames) -> Iterator[Metric]:
    """Entries by Service, and what was folded."""
    by_name: Counter[tuple[str, ...]] = Counter()
    for destination, count in sample.translated.items():
        by_name[(_service(destination, names),)] += count
    family = GaugeMetricFamily(
        "gketrace_conntrack_service_entries",
        "Sampled entries whose destination was translated, by the Service (namespace/name:port) "
        "of the rule, or by address where no rule names it; the rest is `other`.",
        labels=("service",),
    )
    folded = _fold(family, by_name, more=sample.given_up)
    yield family
    yield _gauge(
        "gketrace_conntrack_services_folded",
        "Services whose entries are in the series `other`.",
        folded,
    )


def _service(destination: Destination, names: ServiceNames) -> str:
    address, port, protocol = destination
    found = names.get(destination) or names.get(("", port, protocol))
    return found or f"{_with_port(address, port)}/{protocol}"


def _snat(sample: Sample) -> Iterator[Metric]:
    """Source ports in use towards one destination: there are some 64,000 of them."""
    family = GaugeMetricFamily(
        "gketrace_conntrack_snat_ports",
        "Sampled entries whose source was translated, each with a source port of the node, by the "
        "destinations that take the most; the rest is `other`.",
        labels=("destination", "protocol"),
    )
    by_name: Counter[tuple[str, ...]] = Counter(
        {
            (_with_port(address, port), protocol): count
            for (address, port, protocol), count in sample.snat.items()
        }
    )
    folded = _fold(family, by_name, other=("other", ""))
    yield family
    yield _gauge(
        "gketrace_conntrack_snat_destinations_folded",
        "Destinations whose source ports are in the series `other`.",
        folded,
    )


def _pods(pods: PodTables) -> Iterator[Metric]:
    """Pods' own tables: most pods track nothing, and have no series."""
    tracking: Counter[tuple[str, ...]] = Counter(
        {(name,): count for name, count in pods.entries.items() if count}
    )
    family = GaugeMetricFamily(
        "gketrace_conntrack_pod_entries",
        "Entries in the table of a pod's own network namespace, of the pods with the most; the "
        "rest is `other`.",
        labels=("pod",),
    )
    folded = _fold(family, tracking)
    yield family
    yield _gauge(
        "gketrace_conntrack_pods_folded",
        "Pods whose entries are in the series `other`.",
        folded,
    )
    yield _gauge(
        "gketrace_conntrack_pods_unread",
        "Pods whose network namespace could not be entered.",
        pods.unread,
    )


def _fold(
    family: GaugeMetricFamily,
    counts: Counter[tuple[str, ...]],
    *,
    other: tuple[str, ...] = ("other",),
    more: int = 0,
) -> int:
    """A series for each of the first `_TOP`, and `other` for the rest and `more`; how many are in
    the rest.  Which of equal ones are among the first never changes."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for labels, count in ranked[:_TOP]:
        family.add_metric(labels, count)
    family.add_metric(other, sum(count for _, count in ranked[_TOP:]) + more)
    return len(ranked[_TOP:])


def _with_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
