"""Port-forwards of the CLI, through a real API server into real network namespaces."""

from __future__ import annotations

import concurrent.futures
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from e2e.kubeapi.echo import GREETING
from e2e.kubeapi.harness import KubeApi, Pod, running_pod, running_server, until
from gketrace.errors import ForbiddenError, NotFoundError, TimeoutExceeded, UnavailableError
from gketrace_cli.cluster import Cluster
from gketrace_cli.portforward import PortForwards, Target, Way
from tests.agent.pods import gained, open_files


def pod_object(name: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "gk"},
        "spec": {"nodeName": "n1", "containers": []},
    }


@pytest.fixture
def pod() -> Iterator[Pod]:
    with running_pod(["echo:8080", "greet:8081", "flood:8082"]) as running:
        yield running


@pytest.fixture
def api(tmp_path: Path, pod: Pod) -> Iterator[KubeApi]:
    with running_server(
        tmp_path / "api",
        name="forward",
        users={"alice": {}},
        extra_pods=[pod_object(name) for name in ("a", "b", "c", "lost")],
        netns={"pods": {f"gk/{name}": {"pid": pod.pid} for name in "abc"}},
    ) as running:
        yield running


@pytest.fixture
def cluster(api: KubeApi) -> Iterator[Cluster]:
    with Cluster.open(kubeconfig=str(api.kubeconfig)) as opened:
        yield opened


@pytest.fixture
def forwards(cluster: Cluster) -> Iterator[PortForwards]:
    before = set(threading.enumerate())
    with PortForwards(cluster.api) as made:
        yield made
    assert set(threading.enumerate()) <= before


def target(pod: str = "a", port: int = 8080) -> Target:
    return Target(namespace="gk", pod=pod, port=port)


def connect(way: Way) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(way.path))
    return sock


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(1 << 16)):
        data += more
    return data


def test_bytes_go_there_and_back(forwards: PortForwards) -> None:
    (way,) = forwards.open([target()])
    payload = os.urandom(3 << 20)
    with connect(way) as sock, concurrent.futures.ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sock.sendall, payload)
        assert receive(sock, len(payload)) == payload
        sending.result()
    assert way.error is None
    way.check()


def test_every_connection_is_one_of_its_own(api: KubeApi, forwards: PortForwards) -> None:
    (way,) = forwards.open([target()])
    socks = [connect(way) for _ in range(20)]
    try:
        for number, sock in enumerate(socks):
            sock.sendall(b"%02d" % number)
        assert [receive(sock, 2) for sock in socks] == [b"%02d" % n for n in range(20)]
        assert api.open_count("portforwards") == 20
    finally:
        for sock in socks:
            sock.close()
    until(lambda: api.open_count("portforwards") == 0)


def test_server_that_speaks_first_is_heard_by_the_first_connection(
    forwards: PortForwards,
) -> None:
    (way,) = forwards.open([target(port=8081)])
    for _ in range(3):
        with connect(way) as sock:
            assert receive(sock, len(GREETING)) == GREETING


def test_is_private(forwards: PortForwards) -> None:
    (way,) = forwards.open([target()])
    assert way.path.stat().st_mode & 0o777 == 0o600
    assert way.path.parent.stat().st_mode & 0o777 == 0o700
    assert way.address == f"unix:{way.path}"


def test_ways_that_cannot_be_made_leave_the_others_alone(forwards: PortForwards) -> None:
    good, gone, refused, lost = forwards.open(
        [target(), target("nobody"), target(port=7), target("lost")]
    )
    assert good.error is None
    assert isinstance(gone.error, NotFoundError)
    assert str(gone.error) == 'pods "nobody" not found in namespace "gk"'
    until(lambda: refused.error)
    with pytest.raises(UnavailableError, match=r"nothing listens there \(connection refused\)"):
        refused.check()
    until(lambda: lost.error)
    assert "failed to find sandbox" in str(lost.error)
    with connect(gone) as sock:
        assert sock.recv(1) == b""
    with connect(good) as sock:
        sock.sendall(b"x")
        assert receive(sock, 1) == b"x"


def test_forbidden_says_which_permission(api: KubeApi) -> None:
    with (
        Cluster.open(kubeconfig=str(api.kubeconfig), context="alice@forward") as cluster,
        PortForwards(cluster.api) as forwards,
    ):
        (way,) = forwards.open([target()])
        with pytest.raises(ForbiddenError, match='cannot get resource "pods/portforward"'):
            way.check()


def test_works_again_after_it_broke(api: KubeApi, forwards: PortForwards) -> None:
    (way,) = forwards.open([target()])
    with connect(way) as sock:
        sock.sendall(b"one")
        assert receive(sock, 3) == b"one"
        api.call("POST", "/lab/hangup")
        assert sock.recv(1) == b""
    until(lambda: way.error)
    assert "was closed" in str(way.error)
    with connect(way) as sock:
        sock.sendall(b"two")
        assert receive(sock, 3) == b"two"
    assert way.error is None


def test_pod_deleted_in_between(api: KubeApi, forwards: PortForwards) -> None:
    (way,) = forwards.open([target("c")])
    api.call("POST", "/lab/hangup")
    api.call("DELETE", "/api/v1/namespaces/gk/pods/c")
    until(lambda: way.error)
    with connect(way) as sock:
        assert sock.recv(1) == b""
    assert isinstance(way.error, NotFoundError)


def test_silent_kubelet_times_out(api: KubeApi, cluster: Cluster) -> None:
    api.call("POST", "/lab/fail", {"path": "*/portforward", "delay": 60, "times": 1})
    # The other way has to be there in that time, on a busy machine too.
    with PortForwards(cluster.api, timeout=1) as forwards:
        started = time.monotonic()
        slow, good = forwards.open([target(), target()])
        assert time.monotonic() - started < 20
        errors = [way.error for way in (slow, good) if way.error]
        assert len(errors) == 1
        assert isinstance(errors[0], TimeoutExceeded)
        assert "was not answered within 1 s" in str(errors[0])


def test_close_interrupts_a_dial(api: KubeApi, cluster: Cluster) -> None:
    before = set(threading.enumerate())
    forwards = PortForwards(cluster.api, timeout=60)
    (way,) = forwards.open([target()])
    with connect(way) as first:
        first.sendall(b"x")
        assert receive(first, 1) == b"x"
        api.call("POST", "/lab/fail", {"path": "*/portforward", "delay": 60})
        asked = _asked(api)
        with connect(way) as second:
            until(lambda: _asked(api) > asked)
            started = time.monotonic()
            forwards.close()
            assert time.monotonic() - started < 20
            assert first.recv(1) == b""
            assert second.recv(1) == b""
    forwards.close()
    assert set(threading.enumerate()) <= before
    assert not way.path.parent.exists()
    with pytest.raises(UnavailableError, match="are closed"):
        forwards.open([target()])


def _asked(api: KubeApi) -> int:
    count: int = api.call("GET", "/lab/state")[1]["requests"][
        "GET /api/v1/namespaces/gk/pods/a/portforward"
    ]
    return count


def test_slow_reader_holds_the_pod_back(pod: Pod, forwards: PortForwards) -> None:
    (way,) = forwards.open([target(port=8082)])
    with connect(way) as sock:
        assert sock.recv(1)
        word, _, total = pod.line(15).partition(" ")
        assert word == "stalled"
        assert int(total) < 16 << 20


def test_logs_in_again_after_a_401(api: KubeApi, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("expired")
    text = api.kubeconfig.read_text().replace(f'"token": "{api.admin_token}"', '"tokenFile": "T"')
    path = tmp_path / "config"
    path.write_text(text.replace('"T"', f'"{token}"'))
    with Cluster.open(kubeconfig=str(path)) as cluster, PortForwards(cluster.api) as forwards:
        assert cluster.api.credentials().authorization == "Bearer expired"
        token.write_text(api.admin_token)
        (way,) = forwards.open([target()])
        assert way.error is None


def test_grpc_goes_through(api: KubeApi, cluster: Cluster) -> None:
    def upper(request: bytes, _: grpc.ServicerContext) -> bytes:
        return request.upper()

    handler = grpc.method_handlers_generic_handler(
        "t.T", {"Upper": grpc.unary_unary_rpc_method_handler(upper)}
    )
    with concurrent.futures.ThreadPoolExecutor(2) as pool, PortForwards(cluster.api) as forwards:
        server = grpc.server(pool, handlers=(handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        api.call("POST", "/lab/netns", {"pods": {"gk/a": {"pid": os.getpid()}}})
        (way,) = forwards.open([target(port=port)])
        with grpc.insecure_channel(way.address) as channel:
            call = channel.unary_unary("/t.T/Upper")
            assert call(b"through", timeout=10) == b"THROUGH"
            api.call("POST", "/lab/hangup")
            until(lambda: way.error)

            def again() -> bool:
                try:
                    return bool(call(b"x" * 100_000, timeout=10) == b"X" * 100_000)
                except grpc.RpcError as error:
                    # The channel has not seen yet that its connection ended.
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    return False

            until(again)
        server.stop(0).wait()


def test_three_open_in_a_tenth_of_a_second(cluster: Cluster) -> None:
    cluster.api.credentials()
    took: list[float] = []
    # The best: whoever else is at work on the machine only adds to it.
    while len(took) < 7 or (min(took) >= 0.1 and len(took) < 40):
        with PortForwards(cluster.api) as forwards:
            started = time.perf_counter()
            ways = forwards.open([target("a"), target("b"), target("c")])
            took.append(time.perf_counter() - started)
            assert [way.error for way in ways] == [None] * 3
    assert min(took) < 0.1, took


def test_a_hundred_pods(forwards: PortForwards) -> None:
    ways = forwards.open([target(port=8081)] * 100)
    assert {way.error for way in ways} == {None}
    for way in ways:
        with connect(way) as sock:
            assert receive(sock, len(GREETING)) == GREETING


def test_leaves_no_file_descriptor_behind(api: KubeApi, cluster: Cluster) -> None:
    before = open_files()
    for _ in range(3):
        with PortForwards(cluster.api) as forwards:
            ways = forwards.open([target(), target("nobody"), target(port=7)])
            with connect(ways[0]) as sock:
                sock.sendall(b"x")
                assert receive(sock, 1) == b"x"
    assert gained(before, open_files()) == []
    until(lambda: api.open_count("portforwards") == 0)
