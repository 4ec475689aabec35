"""Which cluster, as whom: kubeconfig files, their context, and in-cluster credentials.

Why not `kubernetes.config`: importing it costs 0.4 to 0.6 s (pydantic, requests, oauthlib), more
than the whole reading of a cluster may take. What nearly every kubeconfig uses (tokens, token
files, client certificates, basic auth and exec plugins, which is what GKE writes) is read here.
The two auth providers that need more, gcp and oidc, go through the `kubernetes` package.

Files are merged as client-go merges them (tools/clientcmd/loader.go): the first file that names a
cluster, user or context, or sets current-context, wins.  Relative paths are relative to the file
that holds them.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gketrace.errors import ForbiddenError, UnavailableError, UsageError
from gketrace_cli.inputs import read_input

__all__ = ["Credentials", "Settings", "load_settings", "redact"]

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SECRET = re.compile(
    r"""eyJ[\w-]{8,}(?:\.[\w-]*)*          # a JWT
    | ya29\.[\w.-]+                      # a Google access token
    | (?i:(?<=bearer\s))\S+
    | (?i:(?<=token[=:])|(?<=password[=:])|(?<=secret[=:]))\s*\S+""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What proves who the user is.  Never printed: `repr` shows no member."""

    authorization: str = ""
    """The whole value of the Authorization header."""
    certificate: bytes = b""
    """PEM."""
    key: bytes = b""
    """PEM."""

    def __repr__(self) -> str:
        return "Credentials(...)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One context, resolved."""

    context: str
    """The context's name; "in-cluster" inside a pod."""
    server: str
    """URL, without a trailing slash."""
    namespace: str
    """The context's default namespace."""
    user: str
    """The name of the user entry, to speak of it."""
    source: str
    """Where the settings came from, to speak of it."""
    ca_pem: str
    """Empty: the system's CAs."""
    verify: bool
    tls_server_name: str
    proxy_url: str
    credentials: Callable[[], Credentials]
    """Gets the credentials.  May run a plugin, so call it once per command, and again after a 401.

    Raises: UnavailableError, ForbiddenError, UsageError.
    """


def redact(text: str) -> str:
    """`text` with whatever looks like a credential cut out."""
    return _SECRET.sub("[...]", text)


def load_settings(*, kubeconfig: str = "", context: str = "") -> Settings:
    """Resolve `--kubeconfig` and `--context` as kubectl does.

    `kubeconfig`, else $KUBECONFIG, else ~/.kube/config, else the pod's ServiceAccount.
    Raises: UsageError, which names the file or the entry that is wrong.
    """
    if kubeconfig:
        paths = [Path(kubeconfig).expanduser()]
        if not _exists(paths[0]):
            raise UsageError(f"kubeconfig {paths[0]} does not exist", hint="check --kubeconfig")
        where = str(paths[0])
    else:
        listed = os.environ.get("KUBECONFIG", "")
        given = [Path(p).expanduser() for p in listed.split(os.pathsep) if p]
        paths = given or [Path("~/.kube/config").expanduser()]
        where = listed or str(paths[0])
    found = [path for path in paths if _exists(path)]
    if not found:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and (_SERVICE_ACCOUNT / "token").exists():
            return _in_cluster()
        raise UsageError(
            f"there is no kubeconfig at {where}",
            hint="give one with --kubeconfig, or get one with "
            "`gcloud container clusters get-credentials CLUSTER`",
        )
    return _resolve(_merge(found), context, where)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UsageError(f"kubeconfig {path}: {error.strerror}") from None


def _in_cluster() -> Settings:
    host = os.environ["KUBERNETES_SERVICE_HOST"]
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    token_file = _SERVICE_ACCOUNT / "token"
    try:
        namespace = (_SERVICE_ACCOUNT / "namespace").read_text().strip()
        ca_pem = (_SERVICE_ACCOUNT / "ca.crt").read_text()
    except OSError as error:
        raise UsageError(f"in-cluster credentials: {error.filename}: {error.strerror}") from error
    return Settings(
        context="in-cluster",
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        namespace=namespace or "default",
        user="the pod's ServiceAccount",
        source=str(_SERVICE_ACCOUNT),
        ca_pem=ca_pem,
        verify=True,
        tls_server_name="",
        proxy_url="",
        credentials=lambda: Credentials(authorization=_bearer(_read(token_file, "token"))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merged:
    current: str
    contexts: Mapping[str, tuple[Mapping[str, Any], Path]]
    clusters: Mapping[str, tuple[Mapping[str, Any], Path]]
    users: Mapping[str, tuple[Mapping[str, Any], Path]]


def _merge(paths: list[Path]) -> _Merged:
    current = ""
    tables: dict[str, dict[str, tuple[Mapping[str, Any], Path]]] = {
        "contexts": {},
        "clusters": {},
        "users": {},
    }
    for path in paths:
        document = _load_yaml(path)
        current = current or str(document.get("current-context") or "")
        for plural, table in tables.items():
            for entry in document.get(plural) or []:
                if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                    raise UsageError(f"kubeconfig {path}: an entry of {plural} has no name")
                body = entry.get(plural[:-1])
                if not isinstance(body, dict):
                    body = {}
                table.setdefault(entry["name"], (body, path))
    return _Merged(current=current, **tables)


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml  # 40 ms: only when a file is really read

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        document = yaml.load(read_input(path), Loader=loader)
    except OSError as error:
        raise UsageError(f"kubeconfig {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"kubeconfig {path} is not YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"kubeconfig {path} is not YAML") from error
    if document is None:
        return {}
    if not isinstance(document, dict) or any(
        not isinstance(document.get(plural) or [], list)
        for plural in ("contexts", "clusters", "users")
    ):
        raise UsageError(f"kubeconfig {path} is not a kubeconfig")
    return document


def _resolve(merged: _Merged, wanted: str, where: str) -> Settings:
    name = wanted or merged.current
    known = ", ".join(sorted(merged.contexts)) or "none"
    if not name:
        raise UsageError(
            f"kubeconfig {where} sets no current-context", hint=f"use --context, one of: {known}"
        )
    if name not in merged.contexts:
        raise UsageError(f'there is no context "{name}" in {where}', hint=f"there are: {known}")
    context, context_file = merged.contexts[name]
    cluster_name, user_name = _text(context, "cluster"), _text(context, "user")
    if cluster_name not in merged.clusters:
        raise UsageError(
            f'context "{name}" in {context_file} names cluster "{cluster_name}", which is not there'
        )
    if user_name and user_name not in merged.users:
        raise UsageError(
            f'context "{name}" in {context_file} names user "{user_name}", which is not there'
        )
    cluster, cluster_file = merged.clusters[cluster_name]
    user, user_file = merged.users.get(user_name, ({}, context_file))
    server = _text(cluster, "server").rstrip("/")
    if not re.match(r"https?://[^/\s]+", server):
        raise UsageError(f'cluster "{cluster_name}" in {cluster_file} has no valid server URL')
    ca_pem = _data_or_file(cluster, "certificate-authority", cluster_file).decode(errors="replace")
    return Settings(
        context=name,
        server=server,
        namespace=_text(context, "namespace") or "default",
        user=user_name,
        source=str(cluster_file),
        ca_pem=ca_pem,
        verify=cluster.get("insecure-skip-tls-verify") is not True,
        tls_server_name=_text(cluster, "tls-server-name"),
        proxy_url=_text(cluster, "proxy-url"),
        credentials=lambda: _credentials(user, user_file, name, cluster, ca_pem),
    )


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


def _read(path: Path, what: str) -> str:
    try:
        return read_input(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise UsageError(f"cannot read the {what} {path}: {reason}") from error


def _data_or_file(entry: Mapping[str, Any], key: str, config: Path) -> bytes:
    """The bytes of KEY-data (base64), else of the file KEY; empty when neither is set."""
    if data := _text(entry, f"{key}-data"):
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:  # binascii.Error is one; so is what is not ASCII
            raise UsageError(f"kubeconfig {config}: {key}-data is not base64") from error
    if path := _text(entry, key):
        return _read(config.parent / Path(path).expanduser(), key).encode()
    return b""


def _bearer(token: str) -> str:
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UsageError("the bearer token is empty or holds characters that no token has")
    return f"Bearer {token}"


def _credentials(
    user: Mapping[str, Any], path: Path, context: str, cluster: Mapping[str, Any], ca_pem: str
) -> Credentials:
    """In client-go's order: token, token file, basic auth, exec plugin; certificates go along."""
    certificate = _data_or_file(user, "client-certificate", path)
    key = _data_or_file(user, "client-key", path)
    if bool(certificate) != bool(key):
        raise UsageError(
            f'the user of context "{context}" in {path} has only one of client-certificate and '
            f"client-key"
        )
    authorization = ""
    if token := _text(user, "token"):
        authorization = _bearer(token)
    elif token_file := _text(user, "tokenFile"):
        authorization = _bearer(_read(path.parent / Path(token_file).expanduser(), "tokenFile"))
    elif username := _text(user, "username"):
        raw = f"{username}:{_text(user, 'password')}".encode()
        authorization = f"Basic {base64.b64encode(raw).decode()}"
    elif isinstance(user.get("exec"), dict):
        return _run_plugin(user["exec"], path, cluster, ca_pem)
    elif isinstance(user.get("auth-provider"), dict):
        authorization = _auth_provider(path, context)
    return Credentials(authorization=authorization, certificate=certificate, key=key)


def _run_plugin(
    spec: Mapping[str, Any], path: Path, cluster: Mapping[str, Any], ca_pem: str
) -> Credentials:
    """Run an exec plugin, as client-go's plugin/pkg/client/auth/exec does.

    Raises: UnavailableError when it is not there, fails or says nothing sensible.
    """
    from gketrace_cli.credential_plugin import run_plugin

    command, version = _text(spec, "command"), _text(spec, "apiVersion")
    arguments = [str(argument) for argument in spec.get("args") or []]
    if not command:
        raise UsageError(f"kubeconfig {path}: the exec plugin has no command")
    if os.sep in command and not Path(command).is_absolute():
        command = str(path.parent / command)
    info: dict[str, Any] = {
        "apiVersion": version,
        "kind": "ExecCredential",
        "spec": {"interactive": sys.stdin.isatty()},
    }
    if spec.get("provideClusterInfo"):
        info["spec"]["cluster"] = {"server": _text(cluster, "server")}
        if ca_pem:
            encoded = base64.b64encode(ca_pem.encode()).decode()
            info["spec"]["cluster"]["certificate-authority-data"] = encoded
    environment = {**os.environ, "KUBERNETES_EXEC_INFO": json.dumps(info)}
    for entry in spec.get("env") or []:
        environment[str(entry["name"])] = str(entry["value"])
    name = Path(command).name
    try:
        done = run_plugin([command, *arguments], environment, name)
    except OSError as error:
        hint = _text(spec, "installHint") or f"install {name}, or use another --context"
        raise UnavailableError(
            f"cannot run the credential plugin {name}: {error.strerror}", hint=hint
        ) from error
    if done.status != 0:
        said = done.err.decode(errors="replace").strip().splitlines()
        why = "no message"
        if said:
            why = redact(said[-1])[:200]
        elif done.shown:
            why = "see what it printed"
        raise ForbiddenError(
            f"the credential plugin {name} failed with status {done.status}: {why}",
            hint="log in again, then retry",
        )
    try:
        status = json.loads(done.out)["status"]
        token = status.get("token") or ""
        certificate = (status.get("clientCertificateData") or "").encode()
        key = (status.get("clientKeyData") or "").encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        # Without a cause: it would carry the plugin's output, which holds the token.
        raise UnavailableError(f"the credential plugin {name} printed no ExecCredential") from None
    if not token and not (certificate and key):
        raise UnavailableError(f"the credential plugin {name} gave neither token nor certificate")
    return Credentials(
        authorization=_bearer(token) if token else "", certificate=certificate, key=key
    )


def _auth_provider(path: Path, context: str) -> str:
    """The Authorization value from the gcp or oidc provider, which the `kubernetes` package has."""
    from kubernetes.client import Configuration
    from kubernetes.config import ConfigException
    from kubernetes.config.kube_config import load_kube_config

    configuration = Configuration()
    try:
        load_kube_config(  # type: ignore[no-untyped-call]
            str(path), context, client_configuration=configuration
        )
    except ConfigException as error:
        raise UsageError(f"kubeconfig {path}: {redact(str(error))}") from error
    except Exception as error:  # whatever google.auth and oauthlib raise
        raise ForbiddenError(
            f'the auth provider of context "{context}" failed: {type(error).__name__}',
            hint="log in again, then retry",
        ) from error
    value = configuration.get_api_key_with_prefix("BearerToken") or ""
    if not value:
        raise ForbiddenError(
            f'the auth provider of context "{context}" in {path} gave no token',
            hint="its provider is not supported; use an exec plugin "
            "(gke-gcloud-auth-plugin) instead",
        )
    return str(value)
