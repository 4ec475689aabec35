"""Agents' pods, and the agent that `--local` starts."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from gketrace.errors import (
    ExhaustedError,
    NotFoundError,
    TimeoutExceeded,
    UnavailableError,
    UsageError,
)
from gketrace.objects import Container, ContainerPort, Pod
from gketrace_cli.account import Account
from gketrace_cli.agent_access import AgentAccess
from gketrace_cli.agents import Fleet, agent_port, wrong_address
from gketrace_cli.apiserver import ApiServer
from gketrace_cli.local import local_node, start_local_agent
from gketrace_cli.object_json import parse_node, parse_pod
from gketrace_cli.podref import pod_ref
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from tests.cli.stage import Stage

WORLD = Path(__file__).parents[1] / "data/worlds/kube-proxy-1.36-iptables-nft"


def first(stem: str) -> Any:
    return json.loads((WORLD / f"{stem}.json").read_text())["items"][0]


def agent_pod(node: str, name: str = "agent-1", **changes: Any) -> Pod:
    container = Container(name="agent", ports=(ContainerPort(port=9410, name="grpc"),))
    pod = parse_pod(first("pods"))
    changes = {"phase": "Running", "pod_ips": ("127.0.0.1",), "ready": True, **changes}
    return replace(pod, name=name, node=node, containers=(container,), **changes)


def test_the_port_named_grpc() -> None:
    assert agent_port(agent_pod("n1")) == 9410
    assert agent_port(parse_pod(first("pods"))) == 0


def test_a_pod_that_does_not_run_is_said() -> None:
    with Fleet(timeout=1) as fleet:
        fleet.add_pods(
            [agent_pod("n1", phase="Pending"), replace(agent_pod("n2"), containers=())],
            forwards=None,
        )
        assert fleet.nodes == ()
        whys = {m.node: m.why for m in fleet.missing(["n1", "n2", "n3"])}
    assert "is Pending" in whys["n1"]
    assert "no container port named grpc" in whys["n2"]
    assert whys["n3"] == "no agent on node n3"


def test_the_ready_pod_is_taken_and_a_given_address_kept() -> None:
    pods = [agent_pod("n1", "old", ready=False), agent_pod("n1", "new"), agent_pod("n2")]
    with Fleet(timeout=1) as fleet:
        fleet.add_address("n2", "unix:///nowhere.sock")
        fleet.add_pods(pods, forwards=None)
        assert fleet.agent("n1").how.endswith("/new")
        assert fleet.agent("n1").address == "127.0.0.1:9410"
        assert fleet.agent("n2").how == "--agent"


def test_nobody_there(world: Stage) -> None:
    with Fleet(timeout=20) as fleet:
        fleet.add_address("2jdh", world.sockets["2jdh"])
        fleet.add_address("gone", "unix:///nonexistent/agent.sock")
        fleet.greet()
        assert fleet.nodes == ("2jdh",)
        with pytest.raises(UnavailableError, match="does not answer"):
            fleet.agent("gone")
        world.agents["2jdh"].sleeps = 5
        quick = Fleet(timeout=0.2)
        quick.add_address("2jdh", world.sockets["2jdh"])
        with quick, pytest.raises(TimeoutExceeded, match=r"within 0\.2 s"):
            quick.call("2jdh", "GetInfo", pb.GetInfoRequest())


def test_many_calls_stay_below_an_agents_bound(tmp_path: Path) -> None:
    """An agent refuses what comes beyond its bound, so the CLI sends a few at a time."""

    class Slow(AgentServicer):
        def GetInfo(
            self, request: pb.GetInfoRequest, context: grpc.ServicerContext
        ) -> pb.GetInfoReply:
            time.sleep(0.01)
            return pb.GetInfoReply(node="n1")

    server = grpc.server(ThreadPoolExecutor(16), maximum_concurrent_rpcs=16)
    add_AgentServicer_to_server(Slow(), server)
    server.add_insecure_port(f"unix:{tmp_path}/agent.sock")
    server.start()
    try:
        with Fleet(timeout=10) as fleet:
            fleet.add_address("n1", f"unix://{tmp_path}/agent.sock")
            calls = {number: ("n1", "GetInfo", pb.GetInfoRequest()) for number in range(100)}
            answers = fleet.ask(calls)
    finally:
        server.stop(None).wait()
    assert list(answers) == list(range(100))
    assert {answer.node for answer in answers.values()} == {"n1"}


def test_this_machine_is_a_node_by_its_address() -> None:
    node = parse_node(first("nodes"))
    here = replace(node, name="me", internal_ips=("127.0.0.1",))
    assert local_node([node, here]).name == "me"
    with pytest.raises(NotFoundError, match="none of the cluster's 1 nodes"):
        local_node([node])


def test_a_local_agent_is_stopped_and_leaves_nothing() -> None:
    here = replace(parse_node(first("nodes")), name="me", internal_ips=("127.0.0.1",))
    agent = start_local_agent([here], timeout=30)
    try:
        assert agent.socket.parent.stat().st_mode & 0o777 == 0o700
        with Fleet(timeout=30) as fleet:
            fleet.add_address(agent.node, agent.address, "--local")
            fleet.greet()
            assert fleet.agent("me").info is not None
    finally:
        agent.stop()
    assert not agent.socket.parent.exists()


def test_a_local_agent_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(parse_node(first("nodes")), internal_ips=("127.0.0.1",))
    program = tmp_path / "gketrace-agent"
    program.write_text("#!/bin/sh\necho it will not do >&2\nexit 5\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UnavailableError, match="did not start: it will not do"):
        start_local_agent([here], timeout=10)


def test_a_mirror_pod_is_named_by_the_uid_that_its_kubelet_knows() -> None:
    found = first("pods")
    assert pod_ref(parse_pod(found)).config_hash == ""
    found["metadata"]["annotations"] = {"kubernetes.io/config.hash": "0123abcd"}
    assert pod_ref(parse_pod(found)).config_hash == "0123abcd"


def test_a_ca_file_without_a_certificate(tmp_path: Path) -> None:
    path = tmp_path / "ca.crt"
    path.write_bytes(b"\0\xff")
    api, account = cast(ApiServer, None), Account(namespace="a", name="b")
    access = AgentAccess(api, namespace="a", account=account, ca_file=path)
    with pytest.raises(UsageError, match="has no certificate in it"):
        access.ca()


def test_a_certificate_of_another_ca() -> None:
    class Refused(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return (
                "failed to connect; last error: UNKNOWN: unix:/tmp/x.sock: Tls handshake failed: "
                "OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has expired: OK"
            )

    with Fleet(timeout=1) as fleet:
        said = str(fleet.explain("n1", Refused(), 1.0))
    assert "agent of node n1 is not trusted: certificate has expired; --agent-ca FILE" in said


def test_an_agent_that_never_stops_sending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gketrace_cli.agents._MOST", 1 << 20)
    over = threading.Event()

    class Endless(AgentServicer):
        def GetRules(self, request: Any, context: grpc.ServicerContext) -> Any:
            context.add_callback(over.set)
            while context.is_active():
                yield pb.GetRulesReply(text=b"x" * 100_000)

    server = grpc.server(ThreadPoolExecutor(2))
    add_AgentServicer_to_server(cast(Any, Endless)(), server)
    server.add_insecure_port(f"unix:{tmp_path}/agent.sock")
    server.start()
    calls = {"x": ("n1", "GetRules", pb.GetRulesRequest())}
    try:
        with Fleet(timeout=20) as fleet:
            fleet.add_address("n1", f"unix://{tmp_path}/agent.sock")
            asked = fleet.ask(calls)["x"]
            assert isinstance(asked, ExhaustedError)
            assert "the agent of node n1 sends more than 1 MiB" in asked.message
            assert over.wait(20)
            over.clear()
            streamed = [reply for _, reply in fleet.stream(calls)]
            assert isinstance(streamed[-1], ExhaustedError)
            assert 1 <= len(streamed) <= 12
            assert over.wait(20)
    finally:
        server.stop(None).wait()


def test_an_agent_that_says_nonsense_of_its_node() -> None:
    info = pb.GetInfoReply(node="n1", addresses=[pb.NodeAddress(address="10.0.0.1")])
    assert wrong_address(info) is None
    info.addresses.add(address="")
    assert wrong_address(info) == ""
