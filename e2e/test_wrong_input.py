"""What goes wrong, on purpose: each with its one line on standard error and its exit status.

Never a traceback, never an answer that hides what was not seen.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.answers import COMMAND, Ran, document, run_cli
from e2e.netlab import Lab
from gketrace.errors import ExitCode

NODE = "gke-lab-cluster-default-pool-9e4ce61e-"
PORT = ("service", "hello-server", "--via", "nodeport", "--from", "10.142.0.2", "--node")


def refused(ran: Ran, code: ExitCode, *words: str) -> None:
    """One line on standard error with these words, nothing on standard output."""
    assert ran.code == code, ran
    assert ran.out == ""
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.startswith("error: ")
    assert len(ran.err) < 500
    for word in words:
        assert word in ran.err, (word, ran.err)


def first(ran: Ran) -> str:
    """The verdict, on one line."""
    return " ".join(ran.out.split("\n\n")[0].split())


# -- names that do not exist, and words that make no sense -----------------------------------------

WRONG = [
    (["pod", "hello-serve"], 'pod "hello-serve" not found', "hello-server-579859fb5b-szrwh?"),
    (["pod", "web-9"], 'pod "web-9" not found', "did you mean web-"),
    (["pod", "web-0", "-n", "defalt"], 'namespace "defalt" not found', "did you mean default?"),
    (["service", "hello-servr"], 'service "hello-servr" not found', "did you mean hello-server?"),
    (["service", "web", "-n", "shop"], 'namespace "shop" not found', "there is default"),
    (["service", "web", "--node", "9jdh"], "no node '9jdh'", f"{NODE}2jdh"),
    (["service", "web", "--node", "e"], "no node 'e'", "did you mean"),
    (["service", "web", "--port", "81"], "has no port '81'", "80 (http)/tcp"),
    (["service", "web", "--from", "pod/web-7"], 'pod "web-7" not found', "did you mean web-"),
    (["service", "web", "--from", "node/xx"], "no node 'xx'", f"{NODE}2jdh"),
    (["service", "web", "--from", "svc/web"], "a service sends nothing", "name a pod, node or IP"),
    (["service", "web", "--from", "web-0"], "cannot tell what 'web-0' is", "use pod/NAME"),
    (["service", "web", "--from", "10.142.0.2:x"], "a source port is a number", "10.142.0.2:x"),
    (["service", "web", "--from", "2001:db8::1"], "it is IPv6 and service default/web is not"),
    (["service", "web", "--via", "loadbalancer"], "has no LoadBalancer", "its doors: ClusterIP"),
    (["service", "web", "--via", "externalip"], "has no ExternalIP", "its doors: ClusterIP"),
    (["service", "headless", "--via", "clusterip"], "has no ClusterIP", "its doors: Pod"),
    (["service", "web", "--via", "dns"], "'dns' is not one of", "'nodeport'"),
    (["service", "web", "-o", "garbage"], "'garbage' is not one of", "'json'"),
    (["service"], "missing argument 'NAME'", "gketrace service --help"),
    (["services", "web"], "no such command 'services'", "--help"),
    (["trace", "pod/web-0"], "missing argument 'DST", "gketrace trace --help"),
    (["trace", "foo", "bar"], "cannot tell what 'foo' is", "use pod/NAME"),
    (["trace", "pod/web-0", "svc/web"], "'svc/web' lacks a port", "80/tcp, 9090/tcp"),
    (["trace", "pod/web-0", "10.43.240.10:abc"], "no port is named 'abc'", "use a number"),
    (["trace", "pod/web-0", "10.43.240.10:99999"], "'99999' is no port", "1 to 65535"),
    (["trace", "pod/web-0", "fd00:43::21"], "lacks a port", "[fd00:43::21]:80"),
    (["trace", "10.142.0.2", "[fd00:43::21]:80"], "not of one address family", "10.142.0.2"),
    (["trace", "pod/web-0", "svc/headless:8080"], "headless", "gketrace service headless"),
    (["pod", "web-0", "--context", "nope"], 'no context "nope"', "there are:"),
    (["pod", "web-0", "--kubeconfig", "/nonexistent"], "/nonexistent does not exist"),
    (["pod", "web-0", "--agent", "foo"], "not NODE=ADDR", "for example"),
    (["pod", "web-0", "--agent", "xx=10.1.1.1:99"], "no node 'xx'", f"{NODE}2jdh"),
]


@pytest.mark.parametrize(("words", "expected"), [(w, e) for w, *e in WRONG], ids=str)
def test_wrong_words(lab: Lab, words: list[str], expected: list[str]) -> None:
    ran = run_cli(lab, *words)
    code = ExitCode.PARTIAL if "svc/headless:8080" in words else ExitCode.USAGE
    refused(ran, code, *expected)


def test_external_name(lab: Lab) -> None:
    path = "/api/v1/namespaces/default/services"
    spec = {"type": "ExternalName", "externalName": "db.example.com"}
    lab.api("POST", path, {"metadata": {"name": "outside"}, "spec": spec})
    try:
        ran = run_cli(lab, "service", "outside")
    finally:
        lab.api("DELETE", f"{path}/outside")
    refused(ran, ExitCode.PARTIAL, "ExternalName", "db.example.com", "no rules on any node")


def test_a_source_of_the_other_family_is_said(lab: Lab) -> None:
    ran = run_cli(lab, "service", "web", "--from", "node/2jdh", "--from", "2001:db8::1")
    assert ran.code == ExitCode.OK, ran
    said = " ".join(ran.out.split())
    assert "Nothing is traced from client 2001:db8::1: it is IPv6" in said


def test_headless_service(lab: Lab) -> None:
    ran = run_cli(lab, "service", "headless", "--from", "pod/web-0")
    assert ran.code == ExitCode.OK, ran
    assert "all 3 ways traced lead to 3 endpoints" in first(ran)


@pytest.mark.parametrize("text", ["", "{", "apiVersion: v1\nkind: Config\n", "\x00\x01"])
def test_bad_kubeconfig(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    refused(run_cli(None, "pod", "web-0", "--kubeconfig", str(path)), ExitCode.USAGE, str(path))


# -- who does not answer ---------------------------------------------------------------------------


@pytest.fixture
def without_agent(lab: Lab) -> Iterator[Callable[[str], None]]:
    """Stops agents; they are back afterwards."""
    stopped: list[str] = []

    def stop(node: str) -> None:
        lab.stop_agent(node)
        stopped.append(node)

    yield stop
    for node in stopped:
        lab.start_agent(node)


@pytest.fixture
def fail(lab: Lab) -> Iterator[Callable[..., None]]:
    """Makes the API server fail; it is well again afterwards."""
    yield lambda **fault: lab.api("POST", "/lab/fail", fault)
    lab.api("DELETE", "/lab/fail")


def test_one_agent_down(lab: Lab, without_agent: Callable[[str], None]) -> None:
    without_agent("33fg")
    ran = run_cli(lab, "service", "web", "-o", "json")
    assert ran.code == ExitCode.PARTIAL, ran
    answer = document(ran)
    assert not answer["complete"]
    assert {(m["what"], m["node"]) for m in answer["missing"]} == {("agent", f"{NODE}33fg")}
    assert re.search(r"not everything was seen: no agent answers on \S*33fg", answer["verdict"])
    seen = {path["endpoint"] for path in answer["paths"] if path["outcome"] == "delivered"}
    assert "pod/default/web-0 10.40.0.10:8080" in seen
    # What does not need that node is answered whole; what is on it is not at all.
    assert run_cli(lab, *PORT, "2jdh").code == ExitCode.OK
    refused(run_cli(lab, *PORT, "33fg"), ExitCode.UNAVAILABLE, "agent of node", "33fg", "refused")
    refused(run_cli(lab, "pod", "web-2"), ExitCode.UNAVAILABLE, "agent of node", "33fg")
    text = run_cli(lab, "service", "web")
    assert text.code == ExitCode.PARTIAL
    assert "no agent answers on" in first(text)


def test_no_agent_answers(lab: Lab, without_agent: Callable[[str], None]) -> None:
    for node in ("2jdh", "33fg", "m69d"):
        without_agent(node)
    for words in (["service", "web"], ["pod", "web-0"], ["trace", "pod/web-0", "svc/web:80"]):
        refused(run_cli(lab, *words), ExitCode.UNAVAILABLE, "the agent of node", "log says why")


def test_no_agent_installed(lab: Lab, fail: Callable[..., None]) -> None:
    pods = lab.api("GET", "/api/v1/namespaces/gketrace-system/pods")["items"]
    path = "/api/v1/namespaces/gketrace-system/pods"
    for pod in pods:
        labels = {"metadata": {**pod["metadata"], "labels": {"app": "other"}}}
        lab.api("PUT", f"{path}/{pod['metadata']['name']}", {**pod, **labels})
    try:
        ran = run_cli(lab, "service", "web")
    finally:
        for pod in pods:
            stored = lab.api("GET", f"{path}/{pod['metadata']['name']}")
            stored["metadata"]["labels"] = pod["metadata"]["labels"]
            lab.api("PUT", f"{path}/{pod['metadata']['name']}", stored)
    refused(ran, ExitCode.UNAVAILABLE, "no agent in the cluster", "install the DaemonSet")


def test_api_server_is_down(lab: Lab, tmp_path: Path) -> None:
    text = lab.kubeconfig.read_text()
    config = tmp_path / "config"
    config.write_text(re.sub(r"(server\"?: \"?https://[^:]+):\d+", r"\1:1", text))
    ran = run_cli(None, "service", "web", "--kubeconfig", str(config))
    refused(ran, ExitCode.UNAVAILABLE, ":1 ", "refuses", "check that")


@pytest.mark.parametrize("status", [500, 503])
def test_api_server_fails(lab: Lab, fail: Callable[..., None], status: int) -> None:
    fail(path="/api/v1/*", status=status, message="etcd is on fire")
    refused(run_cli(lab, "service", "web"), ExitCode.UNAVAILABLE, str(status), "etcd is on fire")


def test_api_server_hangs(lab: Lab, fail: Callable[..., None]) -> None:
    fail(path="/api/v1/*", delay=60)
    begun = time.monotonic()
    ran = run_cli(lab, "service", "web", "--timeout", "0.5")
    refused(ran, ExitCode.UNAVAILABLE, "did not answer in time", "check")
    assert time.monotonic() - begun < 30


def test_forbidden(lab: Lab, fail: Callable[..., None]) -> None:
    fail(path="*/services/web", status=403, message='services "web" is forbidden')
    refused(run_cli(lab, "service", "web"), ExitCode.FORBIDDEN, "forbidden", "web")


def test_forbidden_to_list_pods(lab: Lab, fail: Callable[..., None]) -> None:
    """No right to look for agents: said, with the way round it."""
    pods = "/api/v1/namespaces/gketrace-system/pods"
    fail(path=pods, status=403, message="pods is forbidden")
    ran = run_cli(lab, "service", "web")
    refused(ran, ExitCode.FORBIDDEN, "cannot look for agents", "--agent NODE=ADDR")


def test_forbidden_to_ask_as_the_default_account(lab: Lab, fail: Callable[..., None]) -> None:
    path = "/api/v1/namespaces/gketrace-system/serviceaccounts/gketrace-user/token"
    fail(path=path, status=403, message="serviceaccounts/token is forbidden")
    ran = run_cli(lab, "pod", "web-0")
    refused(ran, ExitCode.FORBIDDEN, "no token for ServiceAccount", "auth can-i")


# -- what changes or is not understood -------------------------------------------------------------


def test_a_pod_that_goes_away_meanwhile(lab: Lab) -> None:
    """The object is there, the namespace is not: not known where its packets go."""
    lab.stop_pod("web-2")
    try:
        ran = run_cli(lab, "trace", "node/33fg", "10.40.2.10:8080", "-o", "json")
        told = run_cli(lab, "pod", "web-2")
        sent = run_cli(lab, "trace", "pod/web-2", "svc/web:80")
    finally:
        lab.start_pod("web-2")
    assert ran.code in (ExitCode.BROKEN, ExitCode.PARTIAL), ran
    assert {path["endpoint"] for path in document(ran)["paths"]} == {None}
    assert told.code != ExitCode.OK, told
    assert "web-2" in told.out + told.err
    assert sent.code not in (ExitCode.OK, ExitCode.BROKEN), sent
    assert "web-2" in sent.out + sent.err


def test_a_rule_that_is_not_known(lab: Lab) -> None:
    """The payload is not known, so a rule that asks for it is neither a match nor none."""
    rule = ["PREROUTING", "-m", "string", "--string", "foo", "--algo", "bm", "-j", "ACCEPT"]
    change = ["iptables-nft", "-t", "nat"]
    assert lab.exec("node/2jdh", [*change, "-I", *rule]).returncode == 0
    try:
        ran = run_cli(lab, *PORT, "2jdh")
        as_json = run_cli(lab, *PORT, "2jdh", "-o", "json")
    finally:
        assert lab.exec("node/2jdh", [*change, "-D", *rule]).returncode == 0
    assert ran.code == as_json.code == ExitCode.PARTIAL
    quoted = '-A PREROUTING -m string --string "foo" --algo bm -j ACCEPT'
    assert first(ran).startswith("Could not tell whether Service default/hello-server works")
    assert quoted in first(ran)
    answer = document(as_json)
    assert not answer["complete"]
    assert [path["probability"] for path in answer["paths"]] == [None, None]
    assert all(quoted in " ".join(path["because"]) for path in answer["paths"])


def test_a_target_that_is_not_known(lab: Lab) -> None:
    """Another program decides (NFQUEUE): the trace ends there, with the rule."""
    rule = ["FORWARD", "-d", "10.40.0.6", "-j", "NFQUEUE", "--queue-num", "7"]
    assert lab.exec("node/2jdh", ["iptables-nft", "-I", *rule]).returncode == 0
    try:
        ran = run_cli(lab, *PORT, "2jdh", "-o", "json")
    finally:
        assert lab.exec("node/2jdh", ["iptables-nft", "-D", *rule]).returncode == 0
    assert ran.code == ExitCode.PARTIAL, ran
    answer = document(ran)
    quoted = "-A FORWARD -d 10.40.0.6/32 -j NFQUEUE --queue-num 7"
    assert answer["verdict"].endswith(f"{quoted}.")
    (path,) = (path for path in answer["paths"] if path["outcome"] == "unknown")
    assert path["decidedBy"]["text"] == quoted


# -- how it ends -----------------------------------------------------------------------------------


def variables(lab: Lab) -> dict[str, str]:
    return {**os.environ, "KUBECONFIG": str(lab.kubeconfig)}


def asked(lab: Lab) -> int:
    """How many requests the API server has had for objects of the core group."""
    requests = lab.api("GET", "/lab/state")["requests"]
    return sum(count for what, count in requests.items() if what.startswith("GET /api/v1/"))


def test_control_c(lab: Lab, fail: Callable[..., None]) -> None:
    """While it waits for the API: one signal, no traceback, 130 as shells have it."""
    fail(path="/api/v1/*", delay=60)
    before = asked(lab)
    with subprocess.Popen(
        [*COMMAND, "service", "web"],
        env=variables(lab),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        deadline = time.monotonic() + 30
        while asked(lab) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        begun = time.monotonic()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert running.returncode == 130, (out, err)
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("output", ["text", "json"])
def test_a_closed_pipe(lab: Lab, output: str) -> None:
    """`gketrace … | head -1`."""
    with subprocess.Popen(
        [*COMMAND, "service", "web", "-o", output],
        env=variables(lab),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        err = running.stderr.read()
        running.wait(timeout=30)
    assert err == ""
    assert running.returncode == 0
