"""``gketrace install`` and ``uninstall`` against a real API server."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from e2e.kubeapi.harness import KubeApi, running_server
from gketrace_cli.main import run

Ask = Callable[..., tuple[int, str, str]]
NAMESPACE = "/api/v1/namespaces/gketrace-system"
DAEMONSET = "/apis/apps/v1/namespaces/gketrace-system/daemonsets/gketrace-agent"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    folder: Path = tmp_path_factory.mktemp("api")
    with running_server(folder, name="bare", users={"bob": {}}) as made:
        yield made


@pytest.fixture
def api(server: KubeApi) -> Iterator[KubeApi]:
    yield server
    run(["uninstall", "--apply", "--kubeconfig", str(server.kubeconfig)])
    server.call("DELETE", NAMESPACE)


@pytest.fixture
def ask(api: KubeApi, capsys: pytest.CaptureFixture[str]) -> Ask:
    def asked(*words: str) -> tuple[int, str, str]:
        code = run([*words, "--kubeconfig", str(api.kubeconfig)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return asked


def _what(out: str) -> set[str]:
    return {line.split()[0] for line in out.splitlines()}


def test_what_is_printed_is_all_that_is_applied(ask: Ask, api: KubeApi) -> None:
    code, out, _ = ask("install")
    assert code == 0
    printed = {(one["kind"], one["metadata"]["name"]) for one in yaml.safe_load_all(out)}
    assert {("Secret", "gketrace-agent-tls"), ("ConfigMap", "gketrace-ca")} <= printed
    code, out, _ = ask("install", "--apply", "-o", "json")
    assert code == 0
    applied = {(one["kind"], one["name"]) for one in json.loads(out)["changes"]}
    assert applied == printed
    assert api.call("GET", NAMESPACE)[0] == 200
    assert api.call("GET", DAEMONSET)[0] == 200


def test_it_may_be_run_again(ask: Ask, api: KubeApi) -> None:
    assert _what(ask("install", "--apply")[1]) == {"created"}
    secret = api.call("GET", f"{NAMESPACE}/secrets/gketrace-agent-tls")[1]
    code, out, _ = ask("install", "--apply")
    assert (code, _what(out)) == (0, {"unchanged"})
    assert api.call("GET", f"{NAMESPACE}/secrets/gketrace-agent-tls")[1] == secret


def test_it_mends_what_differs_and_keeps_what_others_added(ask: Ask, api: KubeApi) -> None:
    ask("install", "--apply")
    live = api.call("GET", DAEMONSET)[1]
    live["metadata"]["annotations"] = {"team": "net"}
    live["spec"]["template"]["spec"]["containers"][0]["args"] = ["serve", "--insecure"]
    assert api.call("PUT", DAEMONSET, live)[0] == 200
    path = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/gketrace-user"
    binding = api.call("GET", path)[1]
    api.call("DELETE", path)
    binding["roleRef"]["name"] = "cluster-admin"
    del binding["metadata"]["resourceVersion"], binding["metadata"]["uid"]
    api.call("POST", path.rpartition("/")[0], binding)
    _, out, _ = ask("install", "--apply", "--image", "registry.example/agent:1")
    assert sorted(line.split()[2] for line in out.splitlines() if "updated" in line) == [
        "gketrace-agent",
        "gketrace-user",
    ]
    mended = api.call("GET", DAEMONSET)[1]
    container = mended["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example/agent:1"
    assert "--insecure" not in container["args"]
    assert mended["metadata"]["annotations"] == {"team": "net"}
    assert api.call("GET", path)[1]["roleRef"]["name"] == "gketrace-viewer"


def test_a_renewed_certificate_keeps_the_old_authority_known(ask: Ask, api: KubeApi) -> None:
    ask("install", "--apply")
    authority = f"{NAMESPACE}/configmaps/gketrace-ca"
    first = api.call("GET", authority)[1]["data"]["ca.crt"]
    old = api.call("GET", f"{NAMESPACE}/secrets/gketrace-agent-tls")[1]["data"]
    _, out, _ = ask("install", "--apply", "--renew")
    assert sorted(line.split()[1] for line in out.splitlines() if "updated" in line) == [
        "ConfigMap",
        "Secret",
    ]
    bundle = api.call("GET", authority)[1]["data"]["ca.crt"]
    assert bundle.endswith(first)
    assert bundle.count("BEGIN CERTIFICATE") == 2
    new = api.call("GET", f"{NAMESPACE}/secrets/gketrace-agent-tls")[1]["data"]
    assert new["tls.key"] != old["tls.key"]
    assert b"PRIVATE KEY" in base64.b64decode(new["tls.key"])
    ask("install", "--apply", "--renew")
    third = api.call("GET", authority)[1]["data"]["ca.crt"]
    assert third.count("BEGIN CERTIFICATE") == 2


def test_another_namespace(ask: Ask, api: KubeApi) -> None:
    code, out, _ = ask("install", "--agent-namespace", "tracing")
    assert code == 0
    assert "gketrace-system" not in out


def test_uninstall(ask: Ask, api: KubeApi) -> None:
    ask("install", "--apply")
    code, out, _ = ask("uninstall")
    assert (code, api.call("GET", DAEMONSET)[0]) == (0, 200)
    assert "DaemonSet gketrace-agent in gketrace-system" in out
    code, out, _ = ask("uninstall", "--apply")
    assert code == 0
    assert _what(out) <= {"deleted", "absent"}
    assert api.call("GET", DAEMONSET)[0] == 404
    assert api.call("GET", NAMESPACE)[0] == 404
    roles = api.call("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles")[1]["items"]
    assert not [one for one in roles if one["metadata"]["name"].startswith("gketrace")]
    assert _what(ask("uninstall", "--apply")[1]) == {"absent"}


def test_a_namespace_that_was_there_before_stays(ask: Ask, api: KubeApi) -> None:
    body = {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "gketrace-system"}}
    api.call("POST", "/api/v1/namespaces", body)
    _, out, _ = ask("uninstall", "--apply")
    assert "kept      Namespace gketrace-system" in out
    assert api.call("GET", NAMESPACE)[0] == 200


def test_who_may_not(ask: Ask) -> None:
    code, _, err = ask("install", "--apply", "--context", "bob@bare")
    assert code == 4
    assert 'User "bob" cannot get resource "namespaces"' in err


@pytest.mark.parametrize("words", [("install", "-n", "shop"), ("uninstall", "-A")])
def test_the_namespace_is_the_agents(words: tuple[str, ...], ask: Ask) -> None:
    code, out, err = ask(*words)
    assert (code, out) == (2, "")
    assert f"{' '.join(words[1:])} is not about {words[0]}" in err
    assert "--agent-namespace NAME" in err


@pytest.mark.parametrize(
    ("command", "listed"),
    [
        ("install", {"--agent-namespace", "--context", "--timeout"}),
        ("explain", {"--color", "--output"}),
    ],
)
def test_help_lists_what_counts(
    command: str, listed: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert all(one in out for one in listed)
    assert not any(one in out for one in ("--namespace NAME", "--agent ", "--local", "--bundle"))


def test_what_help_does_not_list_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--context", "prod", "-n", "shop", "explain", "GKT-301"]) == 0
    assert capsys.readouterr().out.startswith("# GKT-301")
