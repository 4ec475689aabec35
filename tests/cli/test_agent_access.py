"""Tokens for agents: got by several threads at a time, each asked for once."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from gketrace.errors import UnavailableError
from gketrace_cli.account import Account
from gketrace_cli.agent_access import AgentAccess
from gketrace_cli.apiserver import ApiServer


class SlowServer:
    """Answers TokenRequests when it is let go."""

    name = "the API server"

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.begun = threading.Event()
        self.go = threading.Event()

    def request(self, method: str, path: str, *, body: dict[str, Any]) -> dict[str, Any]:
        self.asked += body["spec"]["audiences"]
        self.begun.set()
        assert self.go.wait(30)
        return self.answer


def access(server: SlowServer) -> AgentAccess:
    account = Account(namespace="gketrace-system", name="gketrace-user")
    return AgentAccess(cast(ApiServer, server), namespace="gketrace-system", account=account)


def waiting_for(made: AgentAccess, node: str) -> threading.Thread:
    """A thread that asks for the node's token, while another one does."""
    thread = threading.Thread(target=lambda: made.prepare([node]))
    thread.start()
    return thread


def test_a_token_that_is_on_its_way_is_waited_for() -> None:
    server = SlowServer({"status": {"token": "abc"}})
    made = access(server)
    thread = waiting_for(made, "n1")
    assert server.begun.wait(30)
    threading.Timer(0.2, server.go.set).start()
    assert made.metadata("n1") == (("authorization", "Bearer abc"),)
    thread.join()
    assert made.prepare(["n1", "n2"]) == {}
    assert len(server.asked) == 2


def test_who_waited_shares_the_failure_and_who_comes_later_asks_again() -> None:
    server = SlowServer({})
    made = access(server)
    thread = waiting_for(made, "n1")
    assert server.begun.wait(30)
    threading.Timer(0.2, server.go.set).start()
    with pytest.raises(UnavailableError, match="gave no token"):
        made.metadata("n1")
    thread.join()
    assert len(server.asked) == 1
    server.answer = {"status": {"token": "abc"}}
    assert made.metadata("n1") == (("authorization", "Bearer abc"),)
