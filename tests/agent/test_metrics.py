"""The metrics of a namespace, scraped over HTTP and read by Prometheus's own tool."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gketrace.errors import ParseError
from gketrace_agent.calls import CALLS
from gketrace_agent.kernel.netns import open_path
from gketrace_agent.metrics import MetricsServer
from gketrace_agent.metrics_series import Totals
from gketrace_agent.observe.conntrack_names import nft_service_names, service_names
from gketrace_agent.observe.pod_tables import PodTables
from tests.agent.observe.bed import PATHS, Bed, Netns, wait_until
from tests.kernel.conntrack_made import flows, make

NAMES = {("10.43.0.1", 80, "tcp"): "default/web:http", ("", 30080, "tcp"): "default/door"}
PODS = PodTables(entries={f"default/web-{n}": n for n in range(30)}, unread=1)


@pytest.fixture
def node() -> Iterator[Netns]:
    bed = Bed()
    try:
        yield bed.netns("metrics")
    finally:
        bed.close()


@pytest.fixture
def served(node: Netns) -> Iterator[tuple[MetricsServer, int]]:
    server = MetricsServer(
        host="127.0.0.1",
        port=0,
        node="node-a",
        netns=open_path(Path("/run/netns") / node.name),
        paths=PATHS,
        names=lambda: NAMES,
        pods=lambda: PODS,
        every=0.1,
    )
    port = server.start()
    try:
        yield server, port
    finally:
        server.stop()


def scrape(port: int) -> tuple[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return text, values


def tool(node: Netns, count: int) -> None:
    """Entries with NAT, which only the kernel's own NAT attributes give."""
    for number in range(count):
        node.run(
            *f"conntrack -I -p tcp -s 10.9.{number}.1 -d 10.43.0.1 --sport 7 --dport 80"
            " -t 900 --state ESTABLISHED -u SEEN_REPLY"
            " --dst-nat 10.8.0.1:8080 --src-nat 10.142.0.6".split()
        )


def test_what_is_served(served: tuple[MetricsServer, int], node: Netns) -> None:
    server, port = served
    node.inside(lambda: make(flows(1000)))
    tool(node, 3)
    CALLS.add("Walk", "OK", 0.3, 77)
    wait_until(lambda: server.sampler.last is not None and server.sampler.last.sample.read == 1003)
    text, values = scrape(port)

    def value(name: str, **labels: str) -> float:
        return values[name, tuple(sorted(labels.items()))]

    assert value("gketrace_conntrack_entries") == 1003
    assert value("gketrace_conntrack_entries_limit") > 1003
    assert value("gketrace_conntrack_insert_total") >= 1003
    assert value("gketrace_conntrack_state_entries", protocol="tcp", state="ESTABLISHED") == 603
    assert value("gketrace_conntrack_state_entries", protocol="udp", state="") == 300
    assert value("gketrace_conntrack_unreplied_entries", protocol="udp") == 100
    assert value("gketrace_conntrack_service_entries", service="default/web:http") == 3
    snat = {"destination": "10.8.0.1:8080", "protocol": "tcp"}
    assert value("gketrace_conntrack_snat_ports", **snat) == 3
    assert value("gketrace_conntrack_sample_complete") == 1
    assert value("gketrace_conntrack_pod_entries", pod="default/web-29") == 29
    assert value("gketrace_conntrack_pod_entries", pod="other") == sum(range(10))
    assert value("gketrace_conntrack_pods_folded") == 9  # one tracks nothing
    assert value("gketrace_conntrack_pods_unread") == 1
    assert value("gketrace_agent_open_namespaces") >= 1
    assert value("gketrace_agent_lost_total", kind="stalled_streams") >= 0
    assert value("gketrace_agent_call_sent_bytes_total", method="Walk") >= 77
    assert value("gketrace_agent_calls_total", method="Walk", code="OK") >= 1
    assert value("gketrace_agent_call_duration_seconds_bucket", method="Walk", le="0.5") >= 1
    assert value("process_resident_memory_bytes") > 0
    assert len(values) < 250
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_series_are_bounded_and_the_rest_is_said(
    served: tuple[MetricsServer, int], node: Netns
) -> None:
    server, port = served
    for number in range(45):
        node.run(
            *f"conntrack -I -p udp -s 10.9.0.1 -d 10.43.1.{number} --sport 7 --dport 53 -t 900"
            f" --dst-nat 10.8.0.{number + 1}:53 --src-nat 10.142.0.6".split()
        )
    wait_until(lambda: server.sampler.last is not None and server.sampler.last.sample.read == 45)
    _, values = scrape(port)
    services = {key: n for key, n in values.items() if "service_entries" in key[0]}
    assert len(services) == 21
    assert values["gketrace_conntrack_service_entries", (("service", "other"),)] == 25
    assert values["gketrace_conntrack_services_folded", ()] == 25
    assert values["gketrace_conntrack_snat_destinations_folded", ()] == 25


def test_a_scrape_costs_the_same_whatever_the_table_holds(
    served: tuple[MetricsServer, int], node: Netns
) -> None:
    server, port = served
    node.inside(lambda: make(flows(50_000)))
    wait_until(
        lambda: server.sampler.last is not None and server.sampler.last.sample.read == 50_000, 30
    )
    server.sampler.stop()
    shown = server.sampler.last
    times = []
    for _ in range(20):
        _, values = scrape(port)
        times.append(values["gketrace_agent_scrape_seconds", ()])
    print(f"a scrape of 50,000 entries: {sorted(times)[10]:.4f} s")
    assert min(times) < 0.02
    assert server.sampler.last is shown, "a scrape reads no table"


def test_names_come_from_kube_proxys_rules() -> None:
    world = Path(__file__).parents[1] / "data/worlds/kube-proxy-1.20-iptables-legacy/node-2jdh"
    names = service_names((world / "iptables-save.txt").read_bytes())
    assert names["", 30080, "tcp"] == "default/web-nodeport:http"
    assert len([name for (address, _, _), name in names.items() if address]) > 5
    assert "default/nobody:http" not in names.values(), "a Service without endpoints"
    v6 = service_names((world / "ip6tables-save.txt").read_bytes())
    assert all(":" in address for address, _, _ in v6 if address)


def test_names_come_from_kube_proxys_maps_in_nftables_mode() -> None:
    world = Path(__file__).parents[1] / "data/worlds/kube-proxy-1.36-nftables/node-2jdh"
    names = nft_service_names((world / "nft.json").read_bytes())
    assert names["10.43.240.17", 53, "udp"] == "default/dns:dns"
    assert names["", 31830, "tcp"] == "default/hello-server"
    assert names["fd00:43::21", 80, "tcp"] == "default/web6:http"
    assert "default/nobody:http" not in names.values(), "a Service without endpoints"
    with pytest.raises(ParseError, match="nft -j list table: not JSON"):
        nft_service_names(b"nothing")


def test_counters_that_wrap_go_on() -> None:
    totals = Totals()
    totals.add(0, {"insert": 2**32 - 5})
    totals.add(1, {"insert": 10})
    totals.add(0, {"insert": 3})
    assert totals.totals == {"insert": 2**32 - 5 + 10 + 8}
