"""Port-forwards through the lab's API server, by the stock client, into a real namespace."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from kubernetes import client, config
from kubernetes.stream import portforward

from .kubeapi.echo import GREETING
from .kubeapi.harness import KubeApi, Pod, running_pod, running_server, until
from .kubeapi.netns import make_socket

SERVERS = ("echo:8080", "greet:8081", "flood:8082", "deaf:8083", "echo:9090:::1")


def pod_object(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}"},
        "spec": {"nodeName": "n1", "containers": [], **spec},
    }


@pytest.fixture
def pod() -> Iterator[Pod]:
    with running_pod(SERVERS) as running:
        yield running


@pytest.fixture
def api(tmp_path: Path, pod: Pod) -> Iterator[KubeApi]:
    with running_server(
        tmp_path / "api",
        name="forward",
        users={"alice": {}},
        extra_pods=[
            pod_object("one"),
            pod_object("host", hostNetwork=True),
            pod_object("lost"),
            pod_object("pending", nodeName=""),
        ],
        netns={"pods": {"default/one": {"pid": pod.pid}}, "nodes": {"n1": {"pid": pod.pid}}},
    ) as running:
        yield running


@pytest.fixture
def core(api: KubeApi) -> Iterator[client.CoreV1Api]:
    configuration = client.Configuration()
    config.load_kube_config(str(api.kubeconfig), client_configuration=configuration)
    with client.ApiClient(configuration) as transport:
        yield client.CoreV1Api(transport)


@contextmanager
def forward(core: client.CoreV1Api, name: str, ports: str) -> Iterator[Any]:
    made = portforward(core.connect_get_namespaced_pod_portforward, name, "default", ports=ports)
    try:
        yield made
    finally:
        made.close()
        named = f"Kubernetes port forward proxy: {', '.join(ports.split(','))}"
        until(lambda: named not in {thread.name for thread in threading.enumerate()})
        made.websocket.shutdown()  # close() does nothing once the other side has closed
        for port in made.local_ports.values():
            port.python.close()


def receive(sock: Any, size: int) -> bytes:
    data = b""
    sock.settimeout(10)
    while len(data) < size and (more := sock.recv(65536)):
        data += more
    return data


@pytest.mark.parametrize("name", ["one", "host"])
def test_bytes_go_there_and_back(core: client.CoreV1Api, name: str) -> None:
    with forward(core, name, "8080,8081,9090") as forwarded:
        payload = bytes(range(256)) * 4096
        for port in (8080, 9090):
            sock = forwarded.socket(port)
            sock.sendall(payload)
            assert receive(sock, len(payload)) == payload
        assert receive(forwarded.socket(8081), len(GREETING)) == GREETING
        assert forwarded.error(8080) is None


def test_refused_port_is_told_as_the_kubelet_tells_it(core: client.CoreV1Api, pod: Pod) -> None:
    with forward(core, "one", "7") as forwarded:
        assert forwarded.socket(7).recv(10) == b""
        assert forwarded.error(7) == (
            "error forwarding port 7 to pod uid-one, uid : failed to execute portforward in "
            f'network namespace "/proc/{pod.pid}/ns/net": failed to connect to localhost:7 inside '
            'namespace "uid-one", IPv4: dial tcp4 127.0.0.1:7: connect: connection refused '
            "IPv6 dial tcp6 [::1]:7: connect: connection refused "
        )


def test_one_refused_port_does_not_end_the_other(core: client.CoreV1Api) -> None:
    with forward(core, "one", "7,8080") as forwarded:
        assert forwarded.socket(7).recv(10) == b""
        sock = forwarded.socket(8080)
        sock.sendall(b"still here")
        assert receive(sock, 10) == b"still here"


def test_pods_that_cannot_be_reached(api: KubeApi, core: client.CoreV1Api) -> None:
    with forward(core, "lost", "8080") as forwarded:
        assert forwarded.socket(8080).recv(10) == b""
        assert 'failed to find sandbox "uid-lost" in store: not found' in forwarded.error(8080)
    # By hand: the stock client leaves its socket open when the upgrade is refused.
    token = core.api_client.configuration.get_api_key_with_prefix("BearerToken")
    for name, why in (
        ("nobody", b'pods \\"nobody\\" not found'),
        ("pending", b"pod pending does not have a host assigned"),
    ):
        with raw_request(api.url, token, name, 8080) as raw:
            assert why in raw.recv(4096)
    gone = subprocess.Popen(["true"])
    gone.wait()
    api.call("POST", "/lab/netns", {"pods": {"default/lost": {"pid": gone.pid}}})
    with forward(core, "lost", "8080") as forwarded:
        assert forwarded.socket(8080).recv(10) == b""
        assert "is closed" in forwarded.error(8080)


def test_needs_get_and_create(api: KubeApi) -> None:
    rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
    path = "/api/v1/namespaces/default/pods/one/portforward?ports=80"
    reference = {"kind": "Role", "name": "r", "apiGroup": "rbac.authorization.k8s.io"}
    api.call(
        "POST",
        f"{rbac}/rolebindings",
        {
            "metadata": {"name": "r"},
            "roleRef": reference,
            "subjects": [{"kind": "User", "name": "alice"}],
        },
    )
    rule = {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["get"]}
    api.call("POST", f"{rbac}/roles", {"metadata": {"name": "r"}, "rules": [rule]})
    status, body = api.call("GET", path, token=api.tokens["alice"])
    assert status == 403
    assert 'cannot create resource "pods/portforward"' in body["message"]
    rule["verbs"] = ["get", "create"]
    kind = "application/merge-patch+json"
    api.call("PATCH", f"{rbac}/roles/r", {"rules": [rule]}, content_type=kind)
    status, body = api.call("GET", path, token=api.tokens["alice"])
    assert (status, body["message"]) == (400, "Upgrade request required")


def test_slow_reader_holds_the_sender_back(core: client.CoreV1Api, pod: Pod) -> None:
    token = core.api_client.configuration.get_api_key_with_prefix("BearerToken")
    raw = raw_upgrade(core.api_client.configuration.host, token, "one", 8082)
    try:
        word, _, total = pod.line(10).partition(" ")
        assert word == "stalled"
        assert int(total) < 16 << 20
    finally:
        raw.close()


def raw_request(url: str, token: str, name: str, port: int) -> ssl.SSLSocket:
    parts = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sock = context.wrap_socket(socket.create_connection((parts.hostname or "", parts.port or 0)))
    sock.sendall(
        f"GET /api/v1/namespaces/default/pods/{name}/portforward?ports={port} HTTP/1.1\r\n"
        f"Host: x\r\nAuthorization: {token}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n".encode()
    )
    return sock


def raw_upgrade(url: str, token: str, name: str, port: int) -> ssl.SSLSocket:
    sock = raw_request(url, token, name, port)
    assert sock.recv(12) == b"HTTP/1.1 101"
    return sock


def test_client_that_goes_away_ends_the_pods_connection(
    api: KubeApi, core: client.CoreV1Api, pod: Pod
) -> None:
    token = core.api_client.configuration.get_api_key_with_prefix("BearerToken")
    raw = raw_upgrade(api.url, token, "one", 8080)
    until(lambda: api.open_count("portforwards") == 1)
    raw.close()
    until(lambda: api.open_count("portforwards") == 0)
    assert pod.line() == "end"


def test_hangup_closes_open_forwards(api: KubeApi, core: client.CoreV1Api) -> None:
    with forward(core, "one", "8081") as forwarded:
        sock = forwarded.socket(8081)
        assert receive(sock, len(GREETING)) == GREETING
        api.call("POST", "/lab/hangup")
        assert sock.recv(10) == b""
    with forward(core, "one", "8081") as again:
        assert receive(again.socket(8081), len(GREETING)) == GREETING


def test_two_hundred_at_once(api: KubeApi, core: client.CoreV1Api) -> None:
    token = core.api_client.configuration.get_api_key_with_prefix("BearerToken")

    def one(_: int) -> socket.socket:
        return raw_upgrade(api.url, token, "one", 8081)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        socks = list(pool.map(one, range(200)))
    try:
        assert api.open_count("portforwards") == 200
        for sock in socks:
            received = b""
            while GREETING not in received:
                received += sock.recv(4096)
    finally:
        for sock in socks:
            sock.close()
    until(lambda: api.open_count("portforwards") == 0)
    assert json.loads(api.kubeconfig.read_text())["current-context"] == "forward"


def test_listens_inside_a_namespace_too(tmp_path: Path, pod: Pod) -> None:
    inside = {"pid": pod.pid, "address": "127.0.0.1:6443"}
    with running_server(tmp_path / "inside", name="x", listen_netns=[inside]) as api:
        api.call("POST", "/lab/listen", {"pid": pod.pid, "address": "127.0.0.2:443"})
        ca = json.loads(api.kubeconfig.read_text())["clusters"][0]["cluster"]
        context = ssl.create_default_context(
            cadata=base64.b64decode(ca["certificate-authority-data"]).decode()
        )
        for address in (("127.0.0.1", 6443), ("127.0.0.2", 443)):
            plain = make_socket(pod.pid, socket.AF_INET)
            plain.connect(address)
            name = "kubernetes.default.svc"
            with context.wrap_socket(plain, server_hostname=name) as sock:
                sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert b"200 OK" in sock.recv(4096)
