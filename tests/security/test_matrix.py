"""The permission matrix, and what happens when nobody can tell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from gketrace.access import METHODS
from gketrace_agent.log import logger, start_logging
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import target_pb2
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub
from tests.security.bed import Bed, agent_bed, metadata
from tests.security.matrix import methods, rows, run, table
from tests.security.tokens import claims_of

HOST = target_pb2.Target(host=True)
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"
ACCESS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("log") / "agent.log"
    handler = start_logging(file, debug=False)
    yield file
    logger.handlers.clear()
    logger.propagate = True
    handler.close()


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory, log: Path) -> Iterator[Bed]:
    with agent_bed(tmp_path_factory.mktemp("bed")) as made:
        yield made


@pytest.fixture
def stub(bed: Bed) -> Iterator[AgentStub]:
    with bed.channel() as channel:
        yield AgentStub(channel)


@pytest.fixture
def fail(bed: Bed) -> Iterator[Any]:
    yield lambda **fault: bed.api.call("POST", "/lab/fail", fault)
    bed.api.call("DELETE", "/lab/fail")


def _info(stub: AgentStub, token: str | None) -> pb.GetInfoReply:
    return stub.GetInfo(pb.GetInfoRequest(), metadata=metadata(token), timeout=20)


def test_no_call_is_without_a_row() -> None:
    assert {row.method for row in rows()} == methods()


def test_no_call_is_without_a_need() -> None:
    assert set(METHODS) == methods()


def test_every_cell(bed: Bed, capsys: pytest.CaptureFixture[str]) -> None:
    cells = list(run(bed))
    wrong = [cell for cell in cells if not cell.right]
    with capsys.disabled():
        print(f"\n{table(cells)}")
    assert not wrong


class TestNobodyCanTell:
    def test_who_calls(self, bed: Bed, stub: AgentStub, fail: Any) -> None:
        token = bed.token("default/viewer")
        fail(path=REVIEWS, status=503, message="etcd is away")
        with pytest.raises(grpc.RpcError) as caught:
            _info(stub, token)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == (
            "denied: the caller's token could not be reviewed: the API server answered 503 "
            "etcd is away"
        )

    def test_what_they_may(self, bed: Bed, stub: AgentStub, fail: Any) -> None:
        token = bed.token("default/viewer")
        fail(path=ACCESS, status=500, message="webhook timed out")
        pod = target_pb2.PodRef(namespace="shop", name="till")
        request = pb.DeleteConntrackRequest(target=target_pb2.Target(pod=pod))
        with pytest.raises(grpc.RpcError) as caught:
            stub.DeleteConntrack(request, metadata=metadata(token), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        said = caught.value.details()
        assert said.startswith(
            "denied: whether system:serviceaccount:default:viewer may delete pods/conntrack."
        )
        assert said.endswith("could not be asked: the API server answered 500 webhook timed out")

    def test_the_connection_breaks(self, bed: Bed, stub: AgentStub, fail: Any) -> None:
        token = bed.token("default/viewer")
        fail(path=REVIEWS, drop=True)
        with pytest.raises(grpc.RpcError) as caught:
            _info(stub, token)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "denied: the caller's token could not be reviewed" in caught.value.details()

    def test_it_is_asked_again_afterwards(self, bed: Bed, stub: AgentStub) -> None:
        assert _info(stub, bed.token("default/viewer")).node == "node-a"


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        ("token", "text"),
        [
            (None, "no token: the call carries no 'authorization: Bearer' metadata"),
            ("x" * 9000, "the token is no ServiceAccount token"),
            ("a.b.c", "the token is no ServiceAccount token"),
        ],
    )
    def test_without_asking_anybody(self, stub: AgentStub, token: str | None, text: str) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            _info(stub, token)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert caught.value.details() == text

    def test_who_may_not_what(self, bed: Bed, stub: AgentStub) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            _info(stub, bed.token("default/nobody"))
        assert caught.value.details() == (
            "system:serviceaccount:default:nobody may not get nodes/info.gketrace.dev of node "
            "node-a; 'gketrace auth can-i' prints the role that would allow it"
        )

    def test_a_user_s_own_token_is_refused(self, bed: Bed, stub: AgentStub) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            _info(stub, bed.api.admin_token)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_one_line_of_audit(bed: Bed, stub: AgentStub, log: Path) -> None:
    before = len(log.read_text().splitlines())
    token = bed.token("default/viewer")
    list(
        stub.ListConntrack(
            pb.ListConntrackRequest(target=HOST, limit=3), metadata=metadata(token), timeout=20
        )
    )
    with pytest.raises(grpc.RpcError):
        stub.DeleteConntrack(
            pb.DeleteConntrackRequest(target=HOST), metadata=metadata(token), timeout=20
        )
    lines = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    # Calls of tests before this one may be ending still.
    own = f"JTI={claims_of(token)['jti']}"
    calls = [line for line in lines if line["msg"] == "call" and line["credential"] == own]
    first, second = calls
    assert first["call"] == "ListConntrack"
    assert first["user"] == "system:serviceaccount:default:viewer"
    assert (first["target"], first["verdict"], first["code"]) == ("host", "allowed", "OK")
    assert first["bytes"] > 0
    assert first["drops"] == 0
    assert first["duration_ms"] >= 0
    assert (second["verdict"], second["code"]) == ("refused", "PERMISSION_DENIED")
    assert "may not delete nodes/conntrack.gketrace.dev of node node-a" in second["error"]


def test_a_kept_connection_that_was_closed_is_made_anew(bed: Bed, stub: AgentStub) -> None:
    for _ in range(2):
        assert _info(stub, bed.token("default/viewer")).node == "node-a"
        for connection in bed.server._api._idle:  # type: ignore[union-attr]
            connection.sock.shutdown(2)  # as after the server's own time-out
    assert _info(stub, bed.token("default/viewer")).node == "node-a"
