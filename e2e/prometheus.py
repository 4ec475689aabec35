"""A real Prometheus that scrapes a lab's agents: ``python -m e2e.prometheus --seconds 60``.

It runs in the router's network, takes the scrape job, the alerts and the expressions that deploy/
has, and is asked over its own HTTP API.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from e2e.answers import run_cli
from e2e.netlab import Lab
from e2e.netlab.agentaccess import AgentFiles
from e2e.netlab.nodeinit import AGENT_ARGUMENTS
from e2e.netlab.targets import resolve
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import open_pid, run_in_netns

__all__ = [
    "METRICS_PORT",
    "Prometheus",
    "dashboard_expressions",
    "empty_panels",
    "figures",
    "lab_with_metrics",
    "load",
    "prometheus",
    "scraped_text",
]

METRICS_PORT = 9411
DEPLOY = Path(__file__).parents[1] / "deploy"
_LISTEN = "127.0.0.1:9090"
_EVERY = 2
"""Seconds between scrapes, so that rates have samples soon."""


@contextlib.contextmanager
def lab_with_metrics(name: str) -> Iterator[Lab]:
    """A lab whose agents serve metrics and may change their nodes."""
    arguments = (
        f"--metrics-listen tcp://0.0.0.0:{METRICS_PORT} --metrics-sample-seconds 2 "
        "--allow-system-changes"
    )
    before = os.environ.get(AGENT_ARGUMENTS)
    os.environ[AGENT_ARGUMENTS] = arguments
    lab = Lab(name)
    try:
        lab.up()
    finally:
        if before is None:
            del os.environ[AGENT_ARGUMENTS]
        else:
            os.environ[AGENT_ARGUMENTS] = before
    try:
        yield lab
    finally:
        lab.down()


def dashboard_expressions() -> dict[str, str]:
    """What the dashboard asks, with its variables filled in: legend and panel → expression."""
    panels = json.loads((DEPLOY / "grafana/gketrace.json").read_text())["panels"]
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        .replace("$instance", ".*")
        .replace("$__rate_interval", "30s")
        for panel in panels
        for target in panel["targets"]
    }


@dataclass
class Prometheus:
    """A running one, in some network namespace."""

    pid: int

    def ask(self, path: str, **query: str) -> Any:
        """``data`` of an answer of /api/v1.  Raises AssertionError for anything but success."""
        url = f"http://{_LISTEN}/api/v1/{path}"
        if query:
            url += "?" + urllib.parse.urlencode(query)

        def fetch() -> Any:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)

        with open_pid(HostPaths(), self.pid) as handle:
            answer = run_in_netns(handle, fetch)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant query's samples."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def ready(self) -> bool:
        try:
            return len(self.query('up{job="gketrace-agent"} == 1')) == 3
        except OSError:  # it does not listen yet
            return False


def _configuration(lab: Lab, folder: Path) -> Path:
    """deploy/prometheus/scrape.yaml, with the lab's nodes in place of the Kubernetes discovery,
    which Debian's Prometheus is built without."""
    config = yaml.safe_load((DEPLOY / "prometheus/scrape.yaml").read_text())
    (job,) = config["scrape_configs"]
    del job["kubernetes_sd_configs"], job["relabel_configs"]
    job["scrape_interval"] = f"{_EVERY}s"
    files = AgentFiles(Path(lab.state["kubeconfig"]).parent / "agents")
    job["tls_config"]["ca_file"] = str(files.authority)
    job["static_configs"] = [
        {"targets": [f"{lab.node(node)['ip']}:{METRICS_PORT}"], "labels": {"instance": node}}
        for node in ("2jdh", "33fg", "m69d")
    ]
    config["rule_files"] = [str(DEPLOY / "prometheus/rules.yaml")]
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def scraped_text(lab: Lab, node: str) -> str:
    """What one agent serves now."""
    files = AgentFiles(Path(lab.state["kubeconfig"]).parent / "agents")
    context = ssl.create_default_context(cafile=str(files.authority))
    context.check_hostname = False  # the certificate is for a name, and this asks an address
    url = f"https://{lab.node(node)['ip']}:{METRICS_PORT}/metrics"

    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=10, context=context) as reply:
            return str(reply.read().decode())

    with open_pid(HostPaths(), resolve(lab.state, "client").pid) as handle:
        return run_in_netns(handle, fetch)


@contextlib.contextmanager
def prometheus(lab: Lab, timeout: float = 90.0) -> Iterator[Prometheus]:
    """Runs until the block ends; all three agents have been scraped once when it begins."""
    place = resolve(lab.state, "client")
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile() as log:
        folder = Path(name)
        argv = [
            *("nsenter", "--target", str(place.pid), "--net", "--", "prometheus"),
            f"--config.file={_configuration(lab, folder)}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={_LISTEN}",
            "--log.level=warn",
        ]
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            running = Prometheus(place.pid)
            end = time.monotonic() + timeout
            while not running.ready():
                log.seek(0)
                said = log.read().decode()[-2000:]
                assert process.poll() is None, said
                assert time.monotonic() < end, (running.ask("targets"), said)
                time.sleep(0.1)
            yield running
        finally:
            process.terminate()
            process.wait(60)


def figures(running: Prometheus) -> dict[str, Any]:
    """What it costs: series and scrape times of each agent, as Prometheus counted them."""
    series: Counter[str] = Counter()
    for one in running.query('{job="gketrace-agent"}'):
        name = one["metric"]["__name__"]
        if name != "up" and not name.startswith("scrape_"):
            series[one["metric"]["instance"]] += 1

    def of(expression: str) -> dict[str, float]:
        return {
            one["metric"]["instance"]: round(float(one["value"][1]), 4)
            for one in running.query(expression)
        }

    return {
        "series": dict(series),
        "scrape_seconds": of('max_over_time(scrape_duration_seconds{job="gketrace-agent"}[5m])'),
        "agent_seconds": of("max_over_time(gketrace_agent_scrape_seconds[5m])"),
        "agent_seconds_best": of("min_over_time(gketrace_agent_scrape_seconds[5m])"),
    }


def load(lab: Lab, seconds: float) -> int:
    """Connections to the Services from inside and outside; how many were made."""
    made = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lab.connect("pod/web-2", "10.43.240.17", 53, "UDP")
        lab.connect("node/m69d", "10.142.0.8", 31830)
        made += 2
    return made


def empty_panels(running: Prometheus) -> dict[str, str]:
    """The dashboard's expressions that have no data."""
    asked = dashboard_expressions().items()
    return {title: expression for title, expression in asked if not running.query(expression)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    with lab_with_metrics(f"prom{os.getpid()}") as lab, prometheus(lab) as running:
        made = load(lab, given.seconds)
        found = {"seconds": given.seconds, "connections": made, **figures(running)}
        run_cli(lab, "conntrack", "-C")
        time.sleep(3 * _EVERY)
        found["empty_panels"] = empty_panels(running)
    json.dump(found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
