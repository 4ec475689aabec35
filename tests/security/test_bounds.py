"""TLS, certificates that change, bounds, and clients that mean no good."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from e2e.kubeapi.harness import until
from gketrace.access import AGENT_NAMESPACE, CallClass, server_name
from gketrace.errors import ExhaustedError, UnavailableError
from gketrace_agent.access.bounds import Bounds
from gketrace_agent.access.cache import FOLLOWERS, WAITING, Cache
from gketrace_agent.config import Limits
from gketrace_agent.kernel.memory import used_memory
from gketrace_agent.tls import Certificate
from gketrace_cli.certificates import days_left, issue
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import target_pb2
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub
from tests.security.bed import Bed, agent_bed, metadata

HOST = target_pb2.Target(host=True)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    limits = Limits(follow_calls=1, user_calls=2, connections=64, request_bytes=64 << 10)
    with agent_bed(tmp_path_factory.mktemp("bed"), limits) as made:
        yield made


def _info(channel: grpc.Channel, token: str | None, seconds: float = 20) -> pb.GetInfoReply:
    return AgentStub(channel).GetInfo(
        pb.GetInfoRequest(), metadata=metadata(token), timeout=seconds
    )


class TestTls:
    def test_another_authority_is_not_believed(self, bed: Bed) -> None:
        other = issue([server_name(AGENT_NAMESPACE)]).authority
        with bed.channel(ca=other) as channel, pytest.raises(grpc.RpcError) as caught:
            _info(channel, None, 30)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    def test_the_name_is_checked(self, bed: Bed) -> None:
        channel = bed.channel(name="somebody.else.svc")
        with channel, pytest.raises(grpc.RpcError) as caught:
            _info(channel, None, 30)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    def test_plaintext_gets_nothing(self, bed: Bed) -> None:
        channel = grpc.insecure_channel(f"127.0.0.1:{bed.port}")
        with channel, pytest.raises(grpc.RpcError) as caught:
            _info(channel, bed.token("default/admin"), 30)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    def test_the_protocol_is_of_today(self, bed: Bed) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        raw = socket.create_connection(("127.0.0.1", bed.port), 5)
        with context.wrap_socket(raw) as wrapped:
            assert wrapped.version() in ("TLSv1.2", "TLSv1.3")

    def test_a_changed_certificate_is_taken_up(self, bed: Bed) -> None:
        old = (bed.folder / "tls.crt").read_text(), (bed.folder / "tls.key").read_text()
        renewed = issue([server_name(AGENT_NAMESPACE)])
        try:
            (bed.folder / "tls.crt").write_text(renewed.certificate)
            # Half of it: the old pair stays.
            with bed.channel() as channel, pytest.raises(grpc.RpcError) as caught:
                _info(channel, None)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            (bed.folder / "tls.key").write_text(renewed.key)
            with bed.channel(ca=renewed.authority) as channel:
                assert _info(channel, bed.token("default/viewer")).node == "node-a"
            with bed.channel() as channel, pytest.raises(grpc.RpcError) as caught:
                _info(channel, None, 30)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            (bed.folder / "tls.crt").write_text(old[0])
            (bed.folder / "tls.key").write_text(old[1])
        with bed.channel() as channel:
            assert _info(channel, bed.token("default/viewer")).node == "node-a"

    def test_files_that_are_no_certificate(self, tmp_path: Path) -> None:
        (tmp_path / "crt").write_text("x")
        (tmp_path / "key").write_text("y")
        with pytest.raises(UnavailableError, match="cannot use the certificate"):
            Certificate(tmp_path / "crt", tmp_path / "key")
        with pytest.raises(UnavailableError, match="No such file"):
            Certificate(tmp_path / "crt", tmp_path / "none")

    def test_the_authority_s_key_is_nowhere(self) -> None:
        issued = issue(["a.b.svc"])
        assert issued.key.count("PRIVATE KEY") == 2
        assert "PRIVATE" not in issued.authority + issued.certificate
        assert 390 < days_left(issued.certificate) < 398

    def test_the_unix_socket_is_root_s(self, bed: Bed) -> None:
        path = bed.folder / "agent.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with grpc.insecure_channel(f"unix:{path}") as channel:
            assert _info(channel, None).node == "node-a"


class TestOtherServices:
    def test_health_is_told_to_probes(self, bed: Bed) -> None:
        with bed.channel() as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            status = check(health_pb2.HealthCheckRequest(), timeout=10).status
        assert status == health_pb2.HealthCheckResponse.SERVING

    def test_streams_without_an_end_are_not(self, bed: Bed) -> None:
        with bed.channel() as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), timeout=10
            )
            with pytest.raises(grpc.RpcError) as caught:
                next(watch)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([ask]), timeout=10
            )
            with pytest.raises(grpc.RpcError) as caught:
                next(listed)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


class TestBounds:
    def test_of_a_class(self, bed: Bed) -> None:
        extra = metadata(bed.token("default/viewer"))
        with bed.channel() as channel:
            stub = AgentStub(channel)
            request = pb.FollowConntrackRequest(target=HOST)
            first = stub.FollowConntrack(request, metadata=extra, timeout=30)
            next(first)
            with pytest.raises(grpc.RpcError) as caught:
                next(stub.FollowConntrack(request, metadata=extra, timeout=30))
            first.cancel()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == (
            "the agent is busy: 1 calls of class follow are in progress, and 1 is its bound; "
            "try again"
        )

    def test_size_of_a_request(self, bed: Bed) -> None:
        pod = target_pb2.PodRef(namespace="default", name="x" * (65 << 10))
        with bed.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            AgentStub(channel).ResolvePod(
                pb.ResolvePodRequest(pod=pod),
                metadata=metadata(bed.token("default/viewer")),
                timeout=10,
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_of_a_user(self) -> None:
        bounds = Bounds(calls=3, of_a_user=2, classes={})
        with bounds.admit("a", CallClass.QUICK), bounds.admit("a", CallClass.QUICK):
            with pytest.raises(ExhaustedError, match="a has 2 calls in progress, and 2 is each"):
                bounds.admit("a", CallClass.QUICK).__enter__()
            busy = pytest.raises(ExhaustedError, match="3 calls are in progress, and 3 is its")
            with bounds.admit("b", CallClass.QUICK), busy:
                bounds.admit("c", CallClass.QUICK).__enter__()
        with bounds.admit("a", CallClass.QUICK):
            pass

    def test_of_memory(self) -> None:
        bounds = Bounds(calls=3, of_a_user=2, classes={}, memory_bytes=1 << 20)
        with pytest.raises(ExhaustedError, match="MiB of the 1 MiB of memory"):
            bounds.admit("a", CallClass.READ).__enter__()
        with bounds.admit("a", CallClass.QUICK):
            pass
        assert used_memory().bytes > 10 << 20


class TestBadClients:
    def test_a_request_that_never_comes_holds_no_one_up(self, bed: Bed) -> None:
        """Nobody is let in before the request; somebody who is has ten seconds for it."""

        over = threading.Event()

        def never() -> Iterator[bytes]:
            over.wait(60)
            yield b""

        with bed.channel() as channel:
            call = channel.stream_unary("/gketrace.v1alpha1.Agent/GetInfo")
            waiting = [call.future(never(), timeout=60) for _ in range(16)]
            for one in waiting:
                assert one.code() is grpc.StatusCode.UNAUTHENTICATED
            started = time.monotonic()
            assert _info(channel, bed.token("default/viewer")).node == "node-a"
            assert time.monotonic() - started < 20
        over.set()

    def test_connections_that_say_nothing(self, bed: Bed) -> None:
        """More than the bound are refused, and a good client gets in when they are gone."""
        idle = []
        try:
            for _ in range(200):
                sock = socket.socket()
                sock.settimeout(5)
                try:
                    sock.connect(("127.0.0.1", bed.port))
                except OSError:
                    sock.close()
                    break
                idle.append(sock)
            with grpc.insecure_channel(f"unix:{bed.folder / 'agent.sock'}") as channel:
                assert _info(channel, None).node == "node-a"
        finally:
            for sock in idle:
                sock.close()
        with bed.channel() as channel:
            grpc.channel_ready_future(channel).result(20)
            assert _info(channel, bed.token("default/viewer")).node == "node-a"


class TestCache:
    def test_it_forgets(self) -> None:
        now = [0.0]
        cache: Cache[str, int] = Cache(2, clock=lambda: now[0])
        asked: list[str] = []

        def ask(key: str, seconds: float) -> int:
            return cache.get(key, lambda: (asked.append(key) or len(asked), seconds))  # type: ignore[func-returns-value]

        assert [ask("a", 30), ask("a", 30)] == [1, 1]
        now[0] = 30.0
        assert ask("a", 30) == 2
        ask("b", 300)
        ask("c", 300)
        assert len(cache) == 2
        assert ask("a", 0) == 5
        assert ask("a", 0) == 6

    def test_failures_are_not_kept(self) -> None:
        cache: Cache[str, int] = Cache(2)

        def fail() -> tuple[int, float]:
            raise UnavailableError("no")

        with pytest.raises(UnavailableError):
            cache.get("a", fail)
        assert cache.get("a", lambda: (7, 1.0)) == 7

    def test_one_question_at_a_time(self) -> None:
        cache: Cache[str, int] = Cache(2, asking=1)
        asked, go = [], threading.Event()

        def ask() -> tuple[int, float]:
            asked.append(1)
            go.wait(10)
            return 1, 10.0

        threads = [threading.Thread(target=cache.get, args=("a", ask)) for _ in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: asked, seconds=10)
        go.set()
        for thread in threads:
            thread.join()
        assert len(asked) == 1

    def test_so_many_wait_for_one_answer(self) -> None:
        cache: Cache[str, int] = Cache(2)
        go = threading.Event()
        refused: list[str] = []

        def get() -> None:
            try:
                cache.get("a", lambda: (int(go.wait(10)), 10.0))
            except ExhaustedError as error:
                refused.append(error.message)

        threads = [threading.Thread(target=get) for _ in range(FOLLOWERS + 3)]
        for thread in threads:
            thread.start()
        until(lambda: len(refused) == 2, seconds=10)
        go.set()
        for thread in threads:
            thread.join()
        assert refused == ["too many callers wait for the API server's word on them"] * 2

    def test_bad_answers_push_out_no_good_ones(self) -> None:
        cache: Cache[str, int] = Cache(2, good=lambda value: value > 0)
        assert cache.get("a", lambda: (1, 10.0)) == 1
        for n in range(5):
            assert cache.get(f"forged {n}", lambda: (0, 10.0)) == 0
        assert len(cache) == 3
        assert cache.get("a", lambda: (2, 10.0)) == 1

    def test_who_is_refused_now_is_known_no_longer(self) -> None:
        now = [0.0]
        cache: Cache[str, int] = Cache(2, good=lambda value: value > 0, clock=lambda: now[0])
        assert cache.get("a", lambda: (1, 10.0)) == 1
        now[0] = 10.0
        assert cache.get("a", lambda: (0, 5.0)) == 0
        assert cache.get("a", lambda: (1, 10.0)) == 0
        now[0] = 15.0
        assert cache.get("a", lambda: (1, 10.0)) == 1

    def test_a_known_key_is_asked_before_a_crowd(self) -> None:
        """Its answer's time is over, and as many as may wait for others' seats."""
        now = [0.0]
        cache: Cache[str, int] = Cache(8, asking=4, clock=lambda: now[0])
        assert cache.get("known", lambda: (1, 10.0)) == 1
        now[0] = 10.0
        go = threading.Event()
        asked: list[str] = []

        def forged(key: str) -> None:
            def ask() -> tuple[int, float]:
                asked.append(key)
                go.wait(10)
                return 0, 0.0

            cache.get(key, ask, key)

        threads = [threading.Thread(target=forged, args=(f"{n}",)) for n in range(3 + WAITING)]
        for thread in threads:
            thread.start()
        until(lambda: len(asked) == 3, seconds=10)
        assert cache.get("known", lambda: (2, 10.0)) == 2
        assert len(asked) == 3
        go.set()
        for thread in threads:
            thread.join()
        assert len(asked) == 3 + WAITING
