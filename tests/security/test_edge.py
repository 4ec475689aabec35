"""What requests may be made of, and that no subprocess is started but where it is bounded."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

from gketrace.errors import UsageError
from gketrace_agent.access.edge import check_request, is_namespace
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import capture_pb2, target_pb2

ROOT = Path(__file__).parents[2]
STARTS = {
    "agent/gketrace_agent/kernel/process.py",
    "cli/gketrace_cli/capture/offline.py",
    "cli/gketrace_cli/credential_plugin.py",
    "cli/gketrace_cli/local.py",
}
"""The only modules that start other programs."""
MAKES_CODE = {"gketrace/quick.py", "gketrace/simulate/evolve.py"}
"""They run code made of the names of dataclasses' fields, nothing that is read."""


@pytest.mark.parametrize(
    "fields",
    [
        {"namespace": "a/../../secrets"},
        {"namespace": "Default"},
        {"namespace": "x" * 64},
        {"name": "web;reboot"},
        {"name": "../etc"},
        {"uid": "a b"},
        {"container_ids": ["$(id)"]},
        {"config_hash": "\n"},
        {"pod_ips": ["1" * 40_000]},
        {"pod_ips": ["x\x00"]},
    ],
)
def test_what_is_refused(fields: dict[str, object]) -> None:
    request = pb.ResolvePodRequest(pod=target_pb2.PodRef(**fields))
    with pytest.raises(UsageError, match="the request's"):
        check_request(request)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(number: float) -> None:
    """A duration that is not a number would be beyond every bound without exceeding it."""
    for request in (
        capture_pb2.CaptureRequest(limits=capture_pb2.CaptureLimits(seconds=number)),
        pb.FollowConntrackRequest(poll_seconds=number),
    ):
        with pytest.raises(UsageError, match="seconds is no finite number"):
            check_request(request)


def test_what_is_taken() -> None:
    pod = target_pb2.PodRef(
        namespace="kube-system",
        name="kube-proxy-gke-lab.node-2jdh",
        uid="11fe6a9c-6bfb-4f1c-9c2b-2f1c1d4b5a66",
        container_ids=["containerd://" + "1c" * 32],
        pod_ips=["10.40.0.6", "fd00::6"],
        config_hash="d41d8cd98f00b204e9800998ecf8427e",
    )
    check_request(pb.GetNetnsRequest(target=target_pb2.Target(pod=pod), pods=[pod]))
    assert is_namespace("default")


def test_too_many_of_anything() -> None:
    request = pb.GetNetnsRequest(pods=[target_pb2.PodRef(name="a")] * 20_001)
    with pytest.raises(UsageError, match="20001 elements"):
        check_request(request)
    taps = capture_pb2.CaptureRequest(taps=[capture_pb2.CaptureTap()] * 65)
    with pytest.raises(UsageError, match="taps has 65 elements, more than 64"):
        check_request(taps)


def _sources() -> list[Path]:
    folders = ("gketrace", "agent", "cli", "proto")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_no_shell_and_no_program_started_elsewhere() -> None:
    wrong = []
    for path in _sources():
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names]
                modules.append(getattr(node, "module", "") or "")
                if {"subprocess", "pty", "popen2"} & set(modules) and name not in STARTS:
                    wrong.append(f"{name}:{node.lineno} imports subprocess")
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("os.system", "os.popen", "os.fork") or (
                    called in ("eval", "exec") and name not in MAKES_CODE
                ):
                    wrong.append(f"{name}:{node.lineno} calls {called}")
                for keyword in node.keywords:
                    if keyword.arg in ("shell", "preexec_fn"):
                        wrong.append(f"{name}:{node.lineno} has {keyword.arg}=")
    assert not wrong
