"""Alerts, scrape job and dashboard: by Prometheus's own tool, and against the documentation.

What they say of real agents: e2e/test_conntrack.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
SERIES = re.compile(r"\b(?:gketrace|process)_[a-z_0-9]+")


def promtool(folder: Path, *words: str) -> None:
    done = subprocess.run(
        ["promtool", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def documented() -> set[str]:
    rows = (ROOT / "docs/metrics.md").read_text().splitlines()
    return {row.split("`")[1] for row in rows if row.startswith("| `")}


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    shutil.copy(PROMETHEUS / "rules.yaml", tmp_path)
    shutil.copy(ROOT / "tests/data/prometheus/rules_test.yaml", tmp_path)
    promtool(tmp_path, "check", "rules", "rules.yaml")
    promtool(tmp_path, "test", "rules", "rules_test.yaml")
    tested = yaml.safe_load((tmp_path / "rules_test.yaml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tested
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in alerts()}


def test_each_alert_has_its_page_and_each_page_its_alert() -> None:
    pages = {path.name for path in (ROOT / "docs/runbooks").glob("*.md")} - {"README.md"}
    assert pages == {f"{rule['alert']}.md" for rule in alerts()}
    index = (ROOT / "docs/runbooks/README.md").read_text()
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"docs/runbooks/{rule['alert']}.md"
        assert f"({rule['alert']}.md)" in index
        text = (ROOT / rule["annotations"]["runbook"]).read_text()
        assert text.startswith(f"# {rule['alert']}\n")
        assert "\n## Look\n" in text
        assert "\n## Do\n" in text


def test_the_scrape_job(tmp_path: Path) -> None:
    config = yaml.safe_load((PROMETHEUS / "scrape.yaml").read_text())
    (job,) = config["scrape_configs"]
    # Debian's Prometheus is built without the Kubernetes discovery.
    (discovery,) = job.pop("kubernetes_sd_configs")
    assert discovery == {"role": "pod", "namespaces": {"names": ["gketrace-system"]}}
    job["tls_config"].pop("ca_file")
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "rules.yaml", tmp_path)
    promtool(tmp_path, "check", "config", "prometheus.yaml")
    assert all(job["job_name"] in rule["expr"] for rule in alerts() if "job=" in rule["expr"])


def test_alerts_dashboard_and_runbooks_name_documented_series() -> None:
    texts = [rule["expr"] for rule in alerts()]
    dashboard = json.loads((ROOT / "deploy/grafana/gketrace.json").read_text())
    texts += [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    texts += [path.read_text() for path in (ROOT / "docs/runbooks").glob("*.md")]
    used = {name for text in texts for name in SERIES.findall(text)}
    names = documented()
    unknown = {n for n in used if n not in names and n.removesuffix("_bucket") not in names}
    assert not unknown
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
