"""kubeconfig files: merging, contexts, credentials, and what is said when they are wrong."""

from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from gketrace.errors import ForbiddenError, GketraceError, UnavailableError, UsageError
from gketrace_cli import kubeconfig
from gketrace_cli.kubeconfig import Credentials, Settings, load_settings, redact

SECRET = "s3cr3t-token-that-must-not-show"


def write(path: Path, **members: Any) -> Path:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "shop"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://10.0.0.1:6443/"}}],
        "users": [{"name": "u", "user": {"token": SECRET}}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**document, **members}))
    return path


def user(**body: Any) -> dict[str, Any]:
    return {"users": [{"name": "u", "user": body}]}


def load(path: Path, context: str = "") -> Settings:
    return load_settings(kubeconfig=str(path), context=context)


def test_one_file(tmp_path: Path) -> None:
    settings = load(write(tmp_path / "config"))
    assert (settings.server, settings.namespace, settings.user, settings.context) == (
        "https://10.0.0.1:6443",
        "shop",
        "u",
        "c",
    )
    assert settings.verify
    assert settings.credentials().authorization == f"Bearer {SECRET}"
    assert SECRET not in repr(settings.credentials())
    assert SECRET not in repr(settings)


def test_yaml_with_relative_paths(tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki/ca.pem").write_text("CA")
    (tmp_path / "pki/token").write_text("from-file\n")
    path = tmp_path / "config"
    path.write_text(
        "current-context: c\n"
        "contexts: [{name: c, context: {cluster: k, user: u}}]\n"
        "clusters:\n- name: k\n"
        "  cluster: {server: 'https://h', certificate-authority: pki/ca.pem}\n"
        "users: [{name: u, user: {tokenFile: pki/token}}]\n"
    )
    settings = load(path)
    assert (settings.ca_pem, settings.namespace) == ("CA", "default")
    assert settings.credentials().authorization == "Bearer from-file"


def test_several_files_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a", contexts=[], users=[], **{"current-context": ""})
    clusters = [{"name": "k", "cluster": {"server": "https://other"}}]
    second = write(tmp_path / "b", clusters=clusters)
    third = write(tmp_path / "c", **{"current-context": "nowhere"})
    paths = [tmp_path / "missing", first, second, third]
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, paths)))
    settings = load_settings()
    assert (settings.context, settings.server) == ("c", "https://10.0.0.1:6443")


def test_home_then_in_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kubeconfig, "_SERVICE_ACCOUNT", tmp_path / "account")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.43.240.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(UsageError, match=r"there is no kubeconfig at .*; give one with"):
        load_settings()
    (tmp_path / "account").mkdir()
    for name, text in (("token", "tok\n"), ("ca.crt", "CA"), ("namespace", "gk")):
        (tmp_path / "account" / name).write_text(text)
    settings = load_settings()
    assert (settings.context, settings.server, settings.namespace, settings.ca_pem) == (
        "in-cluster",
        "https://10.43.240.1:443",
        "gk",
        "CA",
    )
    assert settings.credentials().authorization == "Bearer tok"
    write(tmp_path / ".kube/config")
    assert load_settings().context == "c"


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"current-context": ""}, "sets no current-context; use --context, one of: c"),
        ({"current-context": "x"}, 'there is no context "x" in .*; there are: c'),
        ({"clusters": []}, 'context "c" in .* names cluster "k", which is not there'),
        ({"users": []}, 'context "c" in .* names user "u", which is not there'),
        ({"clusters": [{"name": "k", "cluster": {}}]}, 'cluster "k" in .* has no valid server'),
        ({"contexts": {}}, "sets no current|no context"),
        ({"contexts": {"a": 1}}, "is not a kubeconfig"),
        ({"users": ["u"]}, "an entry of users has no name"),
    ],
)
def test_wrong_files(tmp_path: Path, members: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load(write(tmp_path / "config", **members))
    assert SECRET not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["a: [", "\t- x", "just text", "[1, 2]", "\x00", "{" * 3000])
def test_not_a_kubeconfig(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"kubeconfig .*config (is not|sets no)"):
        load(path)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist; check --kubeconfig"):
        load(tmp_path / "none")
    with pytest.raises(UsageError, match="Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"token": "with\nnewline"}, "the bearer token"),
        ({"tokenFile": "nowhere"}, "cannot read the tokenFile"),
        ({"client-certificate-data": "%%"}, "client-certificate-data is not base64"),
        ({"client-certificate-data": "Zü=="}, "client-certificate-data is not base64"),
        ({"client-certificate-data": "QQ=="}, "only one of client-certificate and client-key"),
        ({"exec": {"apiVersion": "v1"}}, "the exec plugin has no command"),
    ],
)
def test_wrong_users(tmp_path: Path, body: dict[str, Any], said: str) -> None:
    settings = load(write(tmp_path / "config", **user(**body)))
    with pytest.raises(UsageError, match=said):
        settings.credentials()


def test_basic_and_certificate(tmp_path: Path) -> None:
    encoded = {k: base64.b64encode(k.encode()).decode() for k in ("cert", "key")}
    settings = load(
        write(
            tmp_path / "config",
            **user(
                username="joe",
                password="pw",
                **{"client-certificate-data": encoded["cert"], "client-key-data": encoded["key"]},
            ),
        )
    )
    assert settings.credentials() == Credentials(
        authorization=f"Basic {base64.b64encode(b'joe:pw').decode()}",
        certificate=b"cert",
        key=b"key",
    )


def plugin(tmp_path: Path, script: str, **more: Any) -> Settings:
    path = tmp_path / "bin/plugin"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    body = {"apiVersion": "client.authentication.k8s.io/v1", "command": "bin/plugin", **more}
    return load(write(tmp_path / "config", **user(exec=body)))


def test_exec_plugin(tmp_path: Path) -> None:
    script = (
        'test "$1" = arg && test "$COLOUR" = red && echo "$KUBERNETES_EXEC_INFO" > "$0.info"\n'
        f'echo \'{{"kind": "ExecCredential", "status": {{"token": "{SECRET}"}}}}\''
    )
    settings = plugin(
        tmp_path,
        script,
        args=["arg"],
        env=[{"name": "COLOUR", "value": "red"}],
        provideClusterInfo=True,
    )
    assert settings.credentials().authorization == f"Bearer {SECRET}"
    info = json.loads((tmp_path / "bin/plugin.info").read_text())
    assert info["kind"] == "ExecCredential"
    assert info["spec"]["cluster"]["server"] == "https://10.0.0.1:6443/"


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("echo please log in: ya29.abcdefg >&2; exit 3", ForbiddenError, r"status 3: .*\[...\]"),
        (f"echo {SECRET}", UnavailableError, "printed no ExecCredential"),
        ("echo '{\"status\": {}}'", UnavailableError, "neither token nor certificate"),
        ("echo '[]'", UnavailableError, "printed no ExecCredential"),
    ],
)
def test_failing_plugins(
    tmp_path: Path, script: str, error: type[GketraceError], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        plugin(tmp_path, script).credentials()
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_missing_plugin_gives_its_own_hint(tmp_path: Path) -> None:
    body = {"apiVersion": "v1", "command": "gketrace-no-such-plugin", "installHint": "install it"}
    settings = load(write(tmp_path / "config", **user(exec=body)))
    with pytest.raises(UnavailableError, match=r"cannot run the credential plugin .*; install it"):
        settings.credentials()


def test_auth_provider_goes_through_the_kubernetes_package(tmp_path: Path) -> None:
    provider = {"name": "gcp", "config": {"access-token": "tok", "expiry": "2099-01-01T00:00:00Z"}}
    settings = load(write(tmp_path / "config", **user(**{"auth-provider": provider})))
    assert settings.credentials().authorization == "Bearer tok"
    settings = load(write(tmp_path / "config", **user(**{"auth-provider": {"name": "azure"}})))
    with pytest.raises(ForbiddenError, match="gave no token"):
        settings.credentials()


def test_redact_cuts_credentials_only() -> None:
    for secret in ("eyJhbGciOiJFUzI1NiJ9.eyJhdWQiOlsi.abc-_", "ya29.a0AfB_by", "token=abc"):
        assert secret.rpartition("=")[2] not in redact(f"said {secret} here")
    for plain in (
        "gke-lab-cluster-default-pool-9e4ce61e-2jdh",
        "951a293b-2984-467f-9740-0d1cae1fe4e1",
        'pods "hello-server-579859fb5b-szrwh" not found',
    ):
        assert redact(plain) == plain
