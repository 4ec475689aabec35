"""A real server on a unix socket: health, reflection, errors, bounds, logs."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gketrace.errors import UnavailableError
from gketrace_agent.config import Config, Limits, Listen
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.log import start_logging
from gketrace_agent.server import AgentServer
from gketrace_proto.v1alpha1 import agent_pb2, agent_pb2_grpc
from tests.agent.pods import container_id, fake_pod, fake_runtime, netns_inode

HOST = agent_pb2.Target(host=True)
WEB = container_id()


def _config(path: Path, **changes) -> Config:
    return Config(
        **{
            "node": "node-a",
            "listen": (Listen(path=path),),
            "runtime_sockets": (),
            "limits": Limits(concurrent_calls=4, request_bytes=64 << 10),
            **changes,
        }
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "agent.log"
    handler = start_logging(file, debug=False)
    yield file
    for name in ("gketrace_agent", "grpc"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    handler.close()


@pytest.fixture
def server(path: Path, log: Path) -> Iterator[AgentServer]:
    made = AgentServer(_config(path))
    made.start()
    yield made
    made.stop(0)


@pytest.fixture
def channel(path: Path, server: AgentServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{path}") as made:
        yield made


@pytest.fixture
def stub(channel: grpc.Channel) -> agent_pb2_grpc.AgentStub:
    return agent_pb2_grpc.AgentStub(channel)


def _lines(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


class TestSocket:
    def test_is_for_its_owner_only(self, server: AgentServer, path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_is_removed_at_the_end(self, path: Path) -> None:
        server = AgentServer(_config(path))
        server.start()
        assert server.stop(0)
        assert not path.exists()

    def test_a_stale_one_is_replaced(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(path))
        server = AgentServer(_config(path))
        server.start()
        with grpc.insecure_channel(f"unix:{path}") as channel:
            agent_pb2_grpc.AgentStub(channel).GetInfo(agent_pb2.GetInfoRequest(), timeout=10)
        server.stop(0)

    def test_one_that_is_served_is_left_alone(self, server: AgentServer, path: Path, stub) -> None:
        second = AgentServer(_config(path))
        with pytest.raises(UnavailableError, match="another process serves on"):
            second.start()
        second.stop(0)
        stub.GetInfo(agent_pb2.GetInfoRequest(), timeout=10)

    def test_a_file_is_not_overwritten(self, path: Path) -> None:
        path.write_text("precious")
        server = AgentServer(_config(path))
        with pytest.raises(UnavailableError, match="is no socket"):
            server.start()
        server.stop(0)
        assert path.read_text() == "precious"

    def test_a_port_that_is_taken(self, path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = Listen(host="127.0.0.1", port=taken.getsockname()[1])
            server = AgentServer(_config(path, listen=(address,), insecure=True))
            with pytest.raises(UnavailableError, match=f"cannot listen on {address}"):
                server.start()
            server.stop(0)


class TestServices:
    def test_health(self, channel: grpc.Channel, server: AgentServer) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "gketrace.v1alpha1.Agent"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING

    def test_health_says_when_it_is_stopping(
        self, channel: grpc.Channel, server: AgentServer
    ) -> None:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        ending = threading.Thread(target=server.stop, args=(5,))
        ending.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        ending.join(10)
        assert not ending.is_alive()

    def test_reflection(self, channel: grpc.Channel) -> None:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (reply,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
        names = {service.name for service in reply.list_services_response.service}
        assert {"gketrace.v1alpha1.Agent", "grpc.health.v1.Health"} <= names


class TestErrors:
    def test_no_target(self, stub, log: Path) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetNetns(agent_pb2.GetNetnsRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "the request names no target: the host or a pod"

    def test_no_such_pod(self, stub, log: Path) -> None:
        pod = agent_pb2.PodRef(namespace="default", name="nope")
        with pytest.raises(grpc.RpcError) as caught:
            stub.ResolvePod(agent_pb2.ResolvePodRequest(pod=pod), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details().startswith("pod default/nope is not on node node-a: runtime")
        (line,) = _lines(log)
        assert (line["call"], line["target"]) == ("ResolvePod", "pod default/nope")
        assert (line["code"], line["level"]) == ("NOT_FOUND", "info")
        assert line["error"] == caught.value.details()
        assert line["duration_ms"] >= 0
        assert line["ts"].endswith("Z")

    def test_in_a_stream(self, stub) -> None:
        wanted = agent_pb2.ConntrackFilter(orig_src="not-an-address")
        request = agent_pb2.ListConntrackRequest(target=HOST, filter=wanted)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ListConntrack(request, timeout=10))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "'not-an-address'" in caught.value.details()

    def test_unexpected_ones_are_one_line_and_a_traceback_in_the_log(
        self, stub, log: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(message):
            raise RuntimeError("no\nsuch luck")

        monkeypatch.setattr("gketrace_agent.service.pod_ref", fail)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ResolvePod(agent_pb2.ResolvePodRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "internal error: RuntimeError: no such luck"
        (line,) = _lines(log)
        assert line["level"] == "error"
        assert 'raise RuntimeError("no\\nsuch luck")' in line["traceback"]

    def test_a_packet_does_not_arrive_at_a_pod(self, stub) -> None:
        target = agent_pb2.Target(pod=agent_pb2.PodRef(uid="x"))
        request = agent_pb2.WalkRequest(target=target, arrives=True)
        request.packet.src = request.packet.dst = "10.0.0.1"
        with pytest.raises(grpc.RpcError) as caught:
            stub.Walk(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    def test_an_unreadable_packet(self, stub) -> None:
        request = agent_pb2.WalkRequest(target=HOST)
        request.packet.src = "10.0.0.256"
        with pytest.raises(grpc.RpcError) as caught:
            stub.Walk(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class TestBounds:
    def test_size_of_a_request(self, stub) -> None:
        pod = agent_pb2.PodRef(name="x" * (65 << 10))
        with pytest.raises(grpc.RpcError) as caught:
            stub.ResolvePod(agent_pb2.ResolvePodRequest(pod=pod), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_calls_in_progress_and_deadlines(self, path: Path, tmp_path: Path) -> None:
        release, entered = threading.Event(), threading.Semaphore(0)

        def hold(method: str) -> None:
            entered.release()
            release.wait(60)

        socket_path = tmp_path / "containerd.sock"
        with fake_runtime(socket_path) as runtime:
            config = _config(
                path, runtime_sockets=(socket_path,), limits=Limits(concurrent_calls=1)
            )
            server = AgentServer(config)
            server.start()
            runtime.before = hold
            request = agent_pb2.ResolvePodRequest(pod=agent_pb2.PodRef(namespace="a", name="b"))
            with grpc.insecure_channel(f"unix:{path}") as channel:
                stub = agent_pb2_grpc.AgentStub(channel)
                first = stub.ResolvePod.future(request, timeout=1)
                assert entered.acquire(timeout=30)
                with pytest.raises(grpc.RpcError) as caught:
                    stub.ResolvePod(request, timeout=20)
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert first.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            release.set()
            assert server.stop(0)


class TestHost:
    def test_info(self, stub) -> None:
        info = stub.GetInfo(agent_pb2.GetInfoRequest(), timeout=10)
        assert info.node == "node-a"
        assert info.kernel == os.uname().release
        assert info.api_version == "gketrace.dev/v1alpha1"
        assert info.data_plane
        assert info.data_plane_reason
        assert info.runtime == ""

    def test_netns(self, stub) -> None:
        reply = stub.GetNetns(agent_pb2.GetNetnsRequest(target=HOST), timeout=10)
        assert reply.snapshot.netns.inode == netns_inode(os.getpid())
        assert "lo" in {link.name for link in reply.snapshot.links}
        assert not reply.HasField("pod")
        assert not reply.snapshot.unavailable

    def test_its_own_listeners_have_an_owner(self, stub) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            reply = stub.GetNetns(agent_pb2.GetNetnsRequest(target=HOST), timeout=10)
            port = listener.getsockname()[1]
            (found,) = [s for s in reply.snapshot.sockets if s.port == port and s.protocol == 6]
            assert found.pid == os.getpid()

    def test_conntrack_ends_with_a_summary(self, stub) -> None:
        request = agent_pb2.ListConntrackRequest(target=HOST, limit=10)
        replies = list(stub.ListConntrack(request, timeout=10))
        assert replies[-1].HasField("summary")
        assert replies[-1].summary.sent == sum(len(reply.entries) for reply in replies)


class TestPod:
    def test_netns(self, stub) -> None:
        with fake_pod() as pod:
            pid = pod.add(WEB, own_netns=True)
            ref = agent_pb2.PodRef(namespace="default", name="web", uid=pod.uid)
            target = agent_pb2.Target(pod=ref)
            reply = stub.GetNetns(agent_pb2.GetNetnsRequest(target=target), timeout=10)
            assert reply.pod.method == "cgroup"
            assert reply.pod.netns.pod == "default/web"
            assert reply.snapshot.netns.inode == netns_inode(pid)
            assert [link.name for link in reply.snapshot.links][:1] == ["lo"]

    def test_gvisor_sockets_are_not_observable(self, path: Path, tmp_path: Path) -> None:
        from tests.agent.pods import FakeSandbox

        socket_path = tmp_path / "containerd.sock"
        with fake_runtime(socket_path) as runtime, fake_pod() as pod:
            pid = pod.add(WEB, own_netns=True)
            runtime.sandboxes.append(
                FakeSandbox(
                    id=WEB,
                    namespace="default",
                    name="web",
                    uid=pod.uid,
                    pid=pid,
                    runtime_handler="gvisor",
                )
            )
            config = _config(path, runtime_sockets=(socket_path,), paths=HostPaths())
            server = AgentServer(config)
            server.start()
            with grpc.insecure_channel(f"unix:{path}") as channel:
                target = agent_pb2.Target(pod=agent_pb2.PodRef(namespace="default", name="web"))
                reply = agent_pb2_grpc.AgentStub(channel).GetNetns(
                    agent_pb2.GetNetnsRequest(target=target), timeout=10
                )
            server.stop(0)
            assert reply.pod.runtime_handler == "gvisor"
            assert "not observable" in reply.snapshot.unavailable["sockets"]
