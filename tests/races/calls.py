"""The calls that are made in the middle of things, and what proves whose an answer is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any, Final, TypeAlias

import grpc

from gketrace.packet import Packet, parse_address
from gketrace_proto.codec import encode
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import capture_pb2, target_pb2
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub
from tests.races.pods import RacePod

__all__ = ["CALLS", "Call", "WrongNamespace"]

_SECONDS: Final = 60
_CAPTURE_SECONDS: Final = 0.25
_PODS_ADDRESS: Final = re.compile(r"\b10\.(?:6[4-9]|[7-9]\d)\.\d+\.\d+\b")
_MARK: Final = re.compile(r"\b198\.(?:1[89]|2\d)\.\d+\.\d+\b")
_IPV4: Final = re.compile(rb"\x45\x00.{7}\x11..(.{4})(.{4})", re.DOTALL)
"""An IPv4 header of UDP without options: source and destination."""
Call: TypeAlias = Callable[[AgentStub, RacePod], None]
"""Raises grpc.RpcError when the agent refuses or fails, `WrongNamespace` for an answer that is of
another namespace."""


class WrongNamespace(AssertionError):
    """What must never happen."""


def _check(right: bool, pod: RacePod, what: str) -> None:
    if not right:
        raise WrongNamespace(f"{pod.name}, {pod.address}, inode {pod.inode}: {what}")


def _ref(pod: RacePod, netns: Any) -> None:
    _check(netns.inode == pod.inode, pod, f"inode {netns.inode}")
    _check(netns.pod == f"races/{pod.name}", pod, f"called {netns.pod}")


def _only(pod: RacePod, text: str, *, address: bool, mark: bool) -> None:
    """`text` names this pod's address and mark, where they must be in it, and no other's."""
    addresses, marks = set(_PODS_ADDRESS.findall(text)), set(_MARK.findall(text))
    _check(addresses <= {pod.address} and marks <= {pod.mark}, pod, f"{addresses} {marks}")
    _check(pod.address in addresses or not address, pod, f"its address is not in {text[:300]}")
    _check(pod.mark in marks or not mark, pod, f"its route is not in {text[:300]}")


def _snapshot(pod: RacePod, snapshot: Any) -> None:
    _ref(pod, snapshot.netns)
    unread = set(snapshot.unavailable)
    text = f"{snapshot.addresses} {snapshot.routes}"
    _only(pod, text, address="addresses" not in unread, mark="routes" not in unread)


def _target(pod: RacePod) -> target_pb2.Target:
    return target_pb2.Target(pod=pod.ref)


def _resolve(stub: AgentStub, pod: RacePod) -> None:
    reply = stub.ResolvePod(pb.ResolvePodRequest(pod=pod.ref), timeout=_SECONDS)
    _ref(pod, reply.pod.netns)
    _check(not reply.pod.host_network, pod, "host network")


def _netns(stub: AgentStub, pod: RacePod) -> None:
    request = pb.GetNetnsRequest(target=_target(pod), pods=[pod.ref])
    reply = stub.GetNetns(request, timeout=_SECONDS)
    _snapshot(pod, reply.snapshot)


def _walk(stub: AgentStub, pod: RacePod) -> None:
    """To its own blackhole: only its own routes can end the walk there."""
    packet = Packet(
        src=parse_address(pod.address),
        dst=parse_address(pod.mark),
        protocol=17,
        sport=9,
        dport=9,
    )
    request = pb.WalkRequest(target=_target(pod), pods=[pod.ref], packet=encode(packet))
    walk = stub.Walk(request, timeout=_SECONDS).walk
    cited = [step.citation.text for branch in walk.branches for step in branch.steps]
    cited += [branch.outcome.citation.text for branch in walk.branches]
    _only(pod, " ".join(cited), address=False, mark=True)
    for branch in walk.branches:
        _ref(pod, branch.ingress.netns)


def _capture(stub: AgentStub, pod: RacePod) -> None:
    tap = capture_pb2.CaptureTap(target=_target(pod), interface="lo", filter="udp", snap_length=96)
    limits = capture_pb2.CaptureLimits(seconds=5)
    stream = stub.Capture(
        capture_pb2.CaptureRequest(taps=[tap], limits=limits, latency_seconds=0.01),
        timeout=_SECONDS,
    )
    ends = time.monotonic() + _CAPTURE_SECONDS
    own = IPv4Address(pod.address).packed
    try:
        for reply in stream:
            if reply.HasField("started"):
                _ref(pod, reply.started.taps[0].netns)
            for src, dst in _IPV4.findall(reply.packets.data):
                _check(src == dst == own, pod, f"captured {src.hex()} > {dst.hex()}")
            if time.monotonic() > ends and not reply.HasField("started"):
                break
    finally:
        stream.cancel()
        with suppress(grpc.RpcError):
            for _ in stream:
                pass


def _dump(stub: AgentStub, pod: RacePod) -> None:
    request = pb.SnapshotRequest(pods=[pod.ref])
    for reply in stub.Snapshot(request, timeout=_SECONDS):
        if reply.HasField("snapshot") and reply.pod.name:
            _snapshot(pod, reply.snapshot)


def _conntrack(stub: AgentStub, pod: RacePod) -> None:
    request = pb.ListConntrackRequest(target=_target(pod), format=pb.CONNTRACK_FORMAT_TEXT)
    text, summary = b"", None
    for reply in stub.ListConntrack(request, timeout=_SECONDS):
        text += reply.text
        summary = reply.summary if reply.HasField("summary") else summary
    _check(summary is not None, pod, "no summary")
    assert summary is not None
    _ref(pod, summary.netns)
    _only(pod, text.decode(), address=True, mark=True)


CALLS: Final[Mapping[str, Call]] = {
    "resolved": _resolve,
    "observed": _netns,
    "walked": _walk,
    "captured": _capture,
    "dumped": _dump,
    "conntrack": _conntrack,
}
"""By what happens to the pod."""
