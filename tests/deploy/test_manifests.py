"""deploy/: each way to install renders the same objects, and Kubernetes' schemas take them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import kubernetes_validate
import pytest
import yaml

from e2e.kubeapi.harness import KubeApi, running_server
from gketrace_cli.installation import certificate_objects, manifests

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
NAMESPACE = "gketrace-system"
VERSIONS = ("1.30.0", "1.37.0")
"""The first with appArmorProfile, and the newest that is known."""
GENERATED = {("Secret", "gketrace-agent-tls"), ("ConfigMap", "gketrace-ca")}

Object: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[str, str]

DIGEST = f"sha256:{'ab' * 32}"


def by_key(text: str) -> dict[Key, Object]:
    found = {}
    for one in yaml.safe_load_all(text):
        if one:
            labels = one["metadata"].get("labels") or {}
            labels.pop("app.kubernetes.io/managed-by", None)
            one["metadata"] = {**one["metadata"], "labels": labels}
            found[one["kind"], one["metadata"]["name"]] = one
    return found


def files() -> dict[Key, Object]:
    return by_key("---\n".join((DEPLOY / f"{n}.yaml").read_text() for n in ("daemonset", "rbac")))


def check(objects: dict[Key, Object]) -> None:
    for (kind, name), one in objects.items():
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(one, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{kind} {name}, Kubernetes {version}: {error}")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubeApi]:
    with running_server(tmp_path / "api") as running:
        yield running


def helm(api: KubeApi, *values: Object, namespace: str = NAMESPACE) -> list[dict[Key, Object]]:
    """What Helm makes of the chart, release after release."""
    api.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    done = run_helm(api, *values, namespace=namespace)
    assert done.returncode == 0, done.stderr
    return [by_key(text) for text in json.loads(done.stdout)]


def run_helm(
    api: KubeApi, *values: Object, namespace: str = NAMESPACE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "tests.deploy.charts", str(api.kubeconfig), namespace),
            *(json.dumps(one) for one in values),
        ],
        cwd=ROOT,
        env={**os.environ, "HELM_DRIVER": "memory"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_files() -> None:
    check(files())


def test_kustomize() -> None:
    done = subprocess.run(
        [str(BIN / "kubectl"), "kustomize", str(DEPLOY)], capture_output=True, text=True, check=True
    )
    assert by_key(done.stdout) == files()


def test_install_prints_the_files_and_a_certificate() -> None:
    text = yaml.safe_dump_all([*manifests(), *certificate_objects(None, NAMESPACE)])
    objects = by_key(text)
    assert {key: one for key, one in objects.items() if key not in GENERATED} == files()
    assert objects.keys() >= GENERATED
    check(objects)


def test_the_charts_defaults_are_the_files(api: KubeApi) -> None:
    """But for the namespace, which Helm makes with --create-namespace, and its label, which
    README says how to set; and the certificate."""
    (release,) = helm(api, {})
    expected = {key: one for key, one in files().items() if key[0] != "Namespace"}
    assert {key: one for key, one in release.items() if key not in GENERATED} == expected
    assert release.keys() >= GENERATED
    check(release)


def test_an_upgrade_keeps_the_certificate(api: KubeApi) -> None:
    first, second = helm(api, {}, {})
    for key in GENERATED:
        assert first[key]["data"] == second[key]["data"]


def test_values(api: KubeApi) -> None:
    given = {
        "image": {
            "repository": "mirror/gketrace-agent",
            "tag": "1.2.3",
            "digest": DIGEST,
            "pullPolicy": "Always",
            "pullSecrets": [{"name": "mirror"}],
        },
        "port": 9999,
        "allowSystemChanges": True,
        "metrics": {"listen": "tcp://127.0.0.1:9500"},
        "tls": {"generate": False, "secretName": "own"},
        "resourceQuota": {"create": False},
        "priorityClassName": "",
        "tolerations": [],
        "nodeSelector": {"pool": "a"},
        "podAnnotations": {"a": "b"},
        "runtimeFolder": "/run/k3s/containerd",
        "extraArgs": ["--max-capture-calls=5"],
    }
    (release,) = helm(api, given, namespace="elsewhere")
    check(release)
    assert not release.keys() & GENERATED
    assert {one["metadata"].get("namespace", "elsewhere") for one in release.values()} == {
        "elsewhere"
    }
    pod = release["DaemonSet", "gketrace-agent"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == f"mirror/gketrace-agent@{DIGEST}"
    assert pod["spec"]["imagePullSecrets"] == [{"name": "mirror"}]
    assert {
        "--listen=tcp://127.0.0.1:9999",
        "--allow-system-changes",
        "--metrics-listen=tcp://127.0.0.1:9500",
        "--max-capture-calls=5",
    } <= set(container["args"])
    assert container["ports"][0]["containerPort"] == 9999
    assert pod["metadata"]["annotations"] == {"a": "b"}
    assert "priorityClassName" not in pod["spec"]
    assert "/run/k3s/containerd" in [v.get("hostPath", {}).get("path") for v in volumes(pod)]


def volumes(pod: Object) -> list[Object]:
    found: list[Object] = pod["spec"]["volumes"]
    return found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prot": 1}, "prot"),
        ({"port": "9410"}, "port"),
        ({"image": {"tag": "1"}, "extraArgs": ["x"]}, "extraArgs"),
        ({"image": {"digest": "sha256:1"}}, "digest"),
    ],
)
def test_the_schema_refuses(api: KubeApi, values: Object, said: str) -> None:
    done = run_helm(api, values)
    assert done.returncode == 1
    assert said in done.stderr


def test_the_dockerfile() -> None:
    done = subprocess.run(
        [str(BIN / "hadolint"), str(DEPLOY / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
