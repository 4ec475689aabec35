"""The cluster, read from a real server process, and every way in which that fails."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.kubeapi.harness import KubeApi, running_server, until
from gketrace.errors import (
    GRPC_STATUS,
    ExitCode,
    ForbiddenError,
    GketraceError,
    NotFoundError,
    ParseError,
    TimeoutExceeded,
    UnavailableError,
    UsageError,
)
from gketrace.objects import ServicePort
from gketrace_cli import apiserver
from gketrace_cli.cluster import Cluster
from gketrace_cli.object_json import parse_endpointslice, parse_node, parse_pod, parse_service

WORLDS = Path(__file__).parents[1] / "data/worlds"
WORLD = WORLDS / "kube-proxy-1.36-iptables-nft"
NODE = "gke-lab-cluster-default-pool-9e4ce61e-2jdh"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubeApi]:
    with running_server(
        tmp_path / "api", name="world", objects_dir=str(WORLD), users={"alice": {}}
    ) as running:
        yield running


@pytest.fixture
def cluster(api: KubeApi) -> Iterator[Cluster]:
    with Cluster.open(kubeconfig=str(api.kubeconfig)) as opened:
        yield opened


def edited(api: KubeApi, tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> str:
    document = json.loads(api.kubeconfig.read_text())
    edit(document)
    path = tmp_path / "edited"
    path.write_text(json.dumps(document))
    return str(path)


def test_reads_the_world(cluster: Cluster) -> None:
    reading = cluster.read()
    assert reading.missing == {}
    assert (len(reading.pods), len(reading.services), len(reading.nodes)) == (7, 18, 3)
    services = {service.name: service for service in reading.services}
    hello = services["hello-server"]
    assert (hello.type, hello.cluster_ips) == ("LoadBalancer", ("10.43.246.223",))
    assert [entry.ip for entry in hello.ingress] == ["35.231.121.11"]
    assert hello.ports == (ServicePort(port=80, target_port=8080, node_port=31830),)
    assert services["headless"].headless
    assert services["headless"].cluster_ips == ()
    backends = [e for e in reading.endpoints if e.service == "hello-server"]
    assert [(e.address, e.port, e.ready, e.node) for e in backends] == [
        ("10.40.0.6", 8080, True, NODE)
    ]
    pods = {pod.name: pod for pod in reading.pods}
    hello_pod = pods[backends[0].pod]
    assert hello_pod.pod_ips[0] == "10.40.0.6"
    assert hello_pod.containers[0].runtime == "containerd"
    assert len(hello_pod.containers[0].id) == 64
    assert pods["hostnet-0"].host_network
    assert not pods["sick-0"].ready
    node = next(node for node in reading.nodes if node.name == NODE)
    assert (node.internal_ips, node.pod_cidrs) == (("10.142.0.8",), ("10.40.0.0/24",))
    assert node.ready is True


@pytest.mark.parametrize("world", sorted(path.name for path in WORLDS.iterdir()))
def test_parses_every_object_of_every_world(world: str) -> None:
    def items(stem: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads((WORLDS / world / f"{stem}.json").read_text())[
            "items"
        ]
        return listed

    services = {s.key: s for s in map(parse_service, items("services"))}
    assert all(s.ports or s.type == "ExternalName" for s in services.values())
    for slice_ in items("endpointslices"):
        for endpoint in parse_endpointslice(slice_):
            assert f"{endpoint.namespace}/{endpoint.service}" in services
            assert endpoint.port > 0
    assert all(parse_pod(obj).uid for obj in items("pods"))
    assert {parse_node(obj).name for obj in items("nodes")} >= {NODE}


def test_single_objects_and_selectors(cluster: Cluster) -> None:
    assert cluster.namespace == "default"
    assert cluster.pod("default", "web-0").node == NODE
    assert cluster.service("default", "dns").ports[0].protocol == "UDP"
    assert cluster.node(NODE).internal_ips == ("10.142.0.8",)
    assert {p.name for p in cluster.pods(field_selector=f"spec.nodeName={NODE}")} >= {"web-0"}
    assert {p.name for p in cluster.pods("default", label_selector="app=edge")} == {"edge-0"}
    assert {e.service for e in cluster.endpoints("default", service="dns")} == {"dns"}
    assert cluster.pods("kube-system") == ()


def test_what_does_not_exist_is_named(cluster: Cluster) -> None:
    with pytest.raises(NotFoundError, match='pods "x" not found in namespace "default"') as caught:
        cluster.pod("default", "x")
    assert caught.value.exit_code == 2
    with pytest.raises(NotFoundError, match='nodes "x" not found; context "world" was asked'):
        cluster.node("x")
    for name in ("", "a/b", ".."):
        with pytest.raises(NotFoundError):
            cluster.pod("default", name)


def test_large_lists_come_in_pages(api: KubeApi, cluster: Cluster) -> None:
    spec = {"containers": [], "nodeName": NODE}
    for number in range(1201):
        cluster.api.request(
            "POST",
            "/api/v1/namespaces/kube-public/pods",
            body={"metadata": {"name": f"p{number:04}"}, "spec": spec},
        )
    pods = cluster.pods("kube-public")
    assert [pod.name for pod in pods] == [f"p{number:04}" for number in range(1201)]
    requests = api.call("GET", "/lab/state")[1]["requests"]
    assert requests["GET /api/v1/namespaces/kube-public/pods"] == 3


def test_pages_whose_version_is_forgotten_are_read_again_whole(
    api: KubeApi, cluster: Cluster
) -> None:
    spec = {"containers": []}
    for number in range(501):
        body = {"metadata": {"name": f"p{number:04}"}, "spec": spec}
        cluster.api.request("POST", "/api/v1/namespaces/kube-public/pods", body=body)
    real, first = cluster.api.get, []

    def get(path: str, query: Any = None) -> dict[str, Any]:
        answer = real(path, query)
        if not first:
            first.append(path)
            cluster.api.request("DELETE", f"{path}/p0000")
            api.call("POST", "/lab/compact")
        return answer

    cluster.api.get = get  # type: ignore[method-assign]
    assert len(cluster.pods("kube-public")) == 500


def test_old_clusters_without_endpointslices(api: KubeApi, cluster: Cluster) -> None:
    new = {(e.service, e.address, e.port, e.ready) for e in cluster.endpoints("default")}
    path = "/apis/discovery.k8s.io/v1/*"
    api.call("POST", "/lab/fail", {"path": path, "status": 404, "message": "not found"})
    old = cluster.endpoints("default")
    assert {e.source.partition("/")[0] for e in old} == {"endpoints"}
    assert {(e.service, e.address, e.port, e.ready) for e in old} == {e for e in new if "." in e[1]}


def test_what_may_not_be_seen_is_said(api: KubeApi, tmp_path: Path) -> None:
    rules = [
        {"apiGroups": [""], "resources": ["pods", "services"], "verbs": ["get", "list"]},
    ]
    rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
    reference = {"kind": "Role", "name": "r", "apiGroup": "rbac.authorization.k8s.io"}
    subjects = [{"kind": "User", "name": "alice"}]
    api.call("POST", f"{rbac}/roles", {"metadata": {"name": "r"}, "rules": rules})
    binding = {"metadata": {"name": "r"}, "roleRef": reference, "subjects": subjects}
    api.call("POST", f"{rbac}/rolebindings", binding)
    with Cluster.open(kubeconfig=str(api.kubeconfig), context="alice@world") as alice:
        reading = alice.read("default")
        assert len(reading.pods) == 7
        assert sorted(reading.missing) == ["endpoints", "nodes"]
        assert 'User "alice" cannot list resource "nodes"' in str(reading.missing["nodes"])
        assert alice.may("list", "pods", namespace="default")
        assert not alice.may("get", "pods/portforward", namespace="default")
        with pytest.raises(ForbiddenError, match="ask for a role") as caught:
            alice.read()
        assert caught.value.exit_code == 4


def test_refused_credentials(api: KubeApi, tmp_path: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["users"][0]["user"]["token"] = "not-the-token"

    with (
        Cluster.open(kubeconfig=edited(api, tmp_path, edit)) as cluster,
        pytest.raises(ForbiddenError, match=r"does not accept these credentials \(401") as caught,
    ):
        cluster.nodes()
    assert "not-the-token" not in str(caught.value)


def test_credentials_are_fetched_again_after_a_401(api: KubeApi, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("expired")

    def edit(document: dict[str, Any]) -> None:
        document["users"][0]["user"] = {"tokenFile": str(token)}

    with Cluster.open(kubeconfig=edited(api, tmp_path, edit)) as cluster:
        assert cluster.api.credentials().authorization == "Bearer expired"
        token.write_text(api.admin_token)
        assert len(cluster.nodes()) == 3


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def test_unreachable_servers(api: KubeApi, tmp_path: Path) -> None:
    def failure(server: str, **more: Any) -> GketraceError:
        def edit(document: dict[str, Any]) -> None:
            document["clusters"][0]["cluster"].update(server=server, **more)

        path = edited(api, tmp_path, edit)
        with (
            Cluster.open(kubeconfig=path, timeout=0.3) as cluster,
            pytest.raises(GketraceError) as caught,
        ):
            cluster.read()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code in (2, 5)
        return caught.value

    refused = failure(f"https://127.0.0.1:{closed_port()}")
    assert isinstance(refused, UnavailableError)
    assert 'of context "world" refuses the connection; check that the cluster is up' in str(refused)
    other = base64.b64encode(_other_ca().encode()).decode()
    untrusted = failure(api.url, **{"certificate-authority-data": other})
    assert "shows a certificate that does not verify" in str(untrusted)
    named = failure(api.url, **{"tls-server-name": "elsewhere.example"})
    assert "does not verify: Hostname mismatch" in str(named)
    assert "does not resolve" in str(failure("https://gketrace.invalid"))
    garbage = base64.b64encode(b"no certificate").decode()
    wrong = failure(api.url, **{"certificate-authority-data": garbage})
    assert isinstance(wrong, UsageError)
    assert "is not a PEM certificate" in str(wrong)
    assert "https:// " not in str(failure(api.url.replace("https", "http")))
    proxied = failure(api.url, **{"proxy-url": "socks5://127.0.0.1:1"})
    assert "socks5://, which is not supported" in str(proxied)
    assert "closed" in str(failure(api.url, **{"proxy-url": api.url.replace("https", "http")}))


def _other_ca() -> str:
    from e2e.kubeapi.certs import Authority

    return Authority("other").pem.decode()


def test_silent_server_times_out(api: KubeApi, tmp_path: Path) -> None:
    api.call("POST", "/lab/fail", {"path": "/api/*", "delay": 60, "times": 1})
    with Cluster.open(kubeconfig=str(api.kubeconfig), timeout=0.3) as cluster:
        started = time.monotonic()
        with pytest.raises(TimeoutExceeded, match="did not answer in time; check the network"):
            cluster.nodes()
        assert time.monotonic() - started < 20


def test_failing_server(api: KubeApi, cluster: Cluster) -> None:
    api.call("POST", "/lab/fail", {"path": "/api/v1/nodes", "status": 503, "message": "etcd gone"})
    with pytest.raises(UnavailableError, match="failed with 503: etcd gone"):
        cluster.nodes()
    assert "etcd gone" in str(cluster.read().missing["nodes"])
    api.call("DELETE", "/lab/fail")
    api.call("POST", "/lab/fail", {"path": "/api/v1/nodes", "drop": True, "times": 2})
    with pytest.raises(UnavailableError, match="closed the connection"):
        cluster.nodes()


def test_connection_that_was_closed_while_idle_is_made_anew(api: KubeApi, cluster: Cluster) -> None:
    assert len(cluster.nodes()) == 3
    api.call("POST", "/lab/fail", {"path": "/api/v1/nodes", "drop": True, "times": 1})
    assert len(cluster.nodes()) == 3


def test_something_else_than_an_api_server(tmp_path: Path) -> None:
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", b"SSH-2.0-OpenSSH\r\n"]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                conn, _ = listener.accept()
                with conn:
                    conn.recv(65536)
                    conn.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        path = tmp_path / "config"
        path.write_text(
            json.dumps(
                {
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "k"}}],
                    "clusters": [
                        {
                            "name": "k",
                            "cluster": {"server": f"http://127.0.0.1:{listener.getsockname()[1]}"},
                        }
                    ],
                }
            )
        )
        for said in ("something that is not a JSON object", "something that is not HTTP"):
            with (
                Cluster.open(kubeconfig=str(path)) as cluster,
                pytest.raises(UnavailableError, match=said),
            ):
                cluster.nodes()
        thread.join()


def test_goes_through_an_http_proxy(api: KubeApi, tmp_path: Path) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def proxy() -> None:
            conn, _ = listener.accept()
            with conn:
                asked.append(conn.recv(4096))
                host, _, port = api.url.removeprefix("https://").partition(":")
                with socket.create_connection((host, int(port))) as onward:
                    conn.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    back = threading.Thread(target=_copy, args=(onward, conn))
                    back.start()
                    _copy(conn, onward)
                    back.join()

        thread = threading.Thread(target=proxy)
        thread.start()

        def edit(document: dict[str, Any]) -> None:
            url = f"http://me:pw@127.0.0.1:{listener.getsockname()[1]}"
            document["clusters"][0]["cluster"]["proxy-url"] = url

        with Cluster.open(kubeconfig=edited(api, tmp_path, edit)) as cluster:
            assert len(cluster.nodes()) == 3
        thread.join()
    assert asked[0].startswith(b"CONNECT 127.0.0.1:")
    assert base64.b64encode(b"me:pw") in asked[0]


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # the other direction has ended both
        return


@pytest.mark.parametrize(
    "obj",
    [
        {},
        {"metadata": {"name": "x"}},
        {"metadata": {"name": "x"}, "spec": {"nodeName": 5}},
        {"metadata": {"name": ""}, "spec": {}},
        {"metadata": {"name": "x"}, "spec": {"containers": [5]}},
        {"metadata": {"name": "x"}, "spec": {"hostNetwork": "yes"}},
        [],
        None,
    ],
)
def test_objects_of_another_shape(obj: Any) -> None:
    with pytest.raises(ParseError, match="not a Pod") as caught:
        parse_pod(obj)
    # Nothing on the command line is wrong; nor is it in an agent's request, when it says such.
    assert caught.value.exit_code is ExitCode.PARTIAL
    assert [status for kind, status in GRPC_STATUS if isinstance(caught.value, kind)] == [
        "INTERNAL"
    ]


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (parse_pod, {"spec": {}, "status": {"podIPs": [{"ip": "x"}]}}),
        (parse_pod, {"spec": {}, "status": {"podIPs": [{"ip": ""}]}}),
        (parse_pod, {"spec": {}, "status": {"hostIP": "10.0.0.256"}}),
        (parse_service, {"spec": {"clusterIPs": ["x"]}}),
        (parse_service, {"spec": {"externalIPs": ["1.2.3.4/5"]}}),
        (parse_service, {"spec": {"loadBalancerSourceRanges": ["10.0.0.0/33"]}}),
        (parse_service, {"spec": {}, "status": {"loadBalancer": {"ingress": [{"ip": "x"}]}}}),
        (parse_node, {"spec": {"podCIDRs": ["x"]}}),
        (parse_node, {"status": {"addresses": [{"type": "InternalIP", "address": "x"}]}}),
        (
            parse_endpointslice,
            {"addressType": "IPv4", "endpoints": [{"addresses": ["x"]}], "ports": [{"port": 1}]},
        ),
    ],
)
def test_what_is_no_address_is_refused(
    parse: Callable[[Any], object], body: dict[str, Any]
) -> None:
    with pytest.raises(ParseError, match="does not appear to be an IPv4 or IPv6"):
        parse({"metadata": {"namespace": "default", "name": "n"}, **body})


def test_an_endpoints_pod_may_be_in_another_namespace() -> None:
    made = {
        "metadata": {"namespace": "shop", "name": "web-1"},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [
            {
                "addresses": ["10.40.0.6"],
                "targetRef": {"kind": "Pod", "namespace": "prod", "name": "web-0"},
            },
            {"addresses": ["10.40.0.7"], "targetRef": {"kind": "Pod", "name": "web-1"}},
            {"addresses": ["10.40.0.8"]},
        ],
    }
    found = [one.pod_key for one in parse_endpointslice(made)]
    assert found == ["prod/web-0", "shop/web-1", ""]


@pytest.mark.parametrize("number", [-1, 65536, 1 << 32])
def test_what_is_no_port_is_refused(number: int) -> None:
    for port in ({"port": number}, {"port": 80, "nodePort": number}):
        with pytest.raises(ParseError, match="is no port"):
            parse_service({"metadata": {"name": "n"}, "spec": {"ports": [port]}})


def test_answers_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apiserver, "_MOST_BODY", 1000)
    headers = http.client.HTTPMessage()
    headers["Content-Encoding"] = "gzip"
    assert apiserver._unzipped(headers, gzip.compress(b"x" * 900)) == b"x" * 900
    with pytest.raises(UnavailableError, match="is longer than"):
        apiserver._unzipped(headers, gzip.compress(b"x" * 100_000))
    with pytest.raises(http.client.HTTPException, match="cut short"):
        apiserver._unzipped(headers, gzip.compress(b"x" * 900)[:-9])
    headers["Retry-After"] = "\u00b2"
    assert apiserver._retry_after(429, headers) is None


@pytest.mark.parametrize(
    "answer", [b"Content-Length: 90\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n9\r\n{}"]
)
def test_an_answer_that_breaks_off(answer: bytes, tmp_path: Path) -> None:
    """A part of it is never taken for all."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + answer)

        thread = threading.Thread(target=serve)
        thread.start()
        where = f"http://127.0.0.1:{server.getsockname()[1]}"
        path = tmp_path / "kubeconfig"
        path.write_text(
            f"{{current-context: c, clusters: [{{name: c, cluster: {{server: '{where}'}}}}],"
            "contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {}}]}"
        )
        with (
            Cluster.open(kubeconfig=str(path)) as cluster,
            pytest.raises(UnavailableError, match="closed the connection"),
        ):
            cluster.node("n1")
        thread.join()


def test_what_stands_for_no_address_is_taken() -> None:
    """The API allows blanks around ranges; a name is the whole of an FQDN slice."""
    meta = {"metadata": {"namespace": "default", "name": "n"}}
    service = parse_service(
        {**meta, "spec": {"clusterIP": "None", "loadBalancerSourceRanges": [" 10.0.0.0/8 "]}}
    )
    assert (service.cluster_ips, service.source_ranges) == ((), ("10.0.0.0/8",))
    named = {"addressType": "FQDN", "endpoints": [{"addresses": ["a.example"]}], "ports": [{}]}
    assert [one.address for one in parse_endpointslice({**meta, **named})] == ["a.example"]
    node = {"status": {"addresses": [{"type": "Hostname", "address": "n.example"}]}}
    assert parse_node({**meta, **node}).hostname == "n.example"


def test_reads_the_cluster_without_the_kubernetes_package(api: KubeApi) -> None:
    """Its import alone takes longer than reading the cluster; docs/adr says how long."""
    program = (
        "import sys\n"
        "from gketrace_cli.cluster import Cluster\n"
        "with Cluster.open(kubeconfig=sys.argv[1]) as c: assert c.read().pods\n"
        "assert 'kubernetes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(api.kubeconfig)], check=True)


def test_leaves_no_connection_behind(api: KubeApi) -> None:
    with Cluster.open(kubeconfig=str(api.kubeconfig)) as cluster:
        cluster.read()
        assert api.open_count("connections") > 1
    until(lambda: api.open_count("connections") == 1)
