"""Over real sockets: a container runtime that answers nonsense, and an agent that is asked it."""

from __future__ import annotations

import atexit
import functools
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc

from gketrace.packet import Packet, parse_address
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.resolve.model import PodRef
from gketrace_agent.resolve.resolver import Resolver
from gketrace_proto.codec import encode
from gketrace_proto.cri import api_pb2
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import capture_pb2, target_pb2
from tests.fuzz.binary import mutate_bytes

__all__ = [
    "agent_pid",
    "ask",
    "cri_seeds",
    "Refused",
    "mutate_parts",
    "mutate_request",
    "request_seeds",
    "resolve",
]

_ID: Final = "ab" * 32
_UID: Final = "11fe6a9c-6bfb-4f1c-9c2b-2f1c1d4b5a66"
_ENDING: Final = 4_194_300
"""A PID."""
_ASKED: Final = 25
"""Inputs for which the same client asks."""
_CRI: Final = (
    "Version",
    "ListPodSandbox",
    "PodSandboxStatus",
    "ListContainers",
    "ContainerStatus",
)


def _pack(parts: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("=I", len(part)) + part for part in parts)


def _unpack(data: bytes) -> list[bytes]:
    parts, at = [], 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("=I", data, at)
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return parts


def mutate_parts(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """The parts of one seed, one or two of them changed, the lengths around them right."""
    parts = _unpack(rng.choice(seeds))
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(parts))
        others = [one for seed in seeds for one in _unpack(seed)[at : at + 1]]
        parts[at] = mutate_bytes(rng, [parts[at], rng.choice(others)])
    return _pack(parts)


# The container runtime


class _Runtime(grpc.GenericRpcHandler):
    """Answers each method with its part of the input."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}

    def service(self, handler_call_details: Any) -> Any:
        name = handler_call_details.method.rpartition("/")[2]

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            return self.answers.get(name, b"")

        return grpc.unary_unary_rpc_method_handler(answer)


def _make_proc(folder: Path) -> Path:
    """A /proc with few processes, however many the machine has: the real PID 1, this one, and one
    of the pod that is about to end: all but its namespaces is there."""
    folder.mkdir()
    for name in ("1", str(os.getpid()), "self", "thread-self", "sys"):
        (folder / name).symlink_to(f"/proc/{name}")
    ending = folder / str(_ENDING)
    ending.mkdir()
    fields = " ".join(["0"] * 18 + ["7"] + ["0"] * 30)
    (ending / "stat").write_text(f"{_ENDING} (app) S {fields}\n")
    (ending / "comm").write_text("app\n")
    (ending / "cmdline").write_bytes(b"/app\0")
    (ending / "cgroup").write_text(f"0::/kubepods/pod{_UID}/{_ID}\n")
    return folder


class _Runtimes:
    """The runtime, and who asks it: somebody new now and then, as they remember its version."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gkfuzz")
        self._socket = Path(self._folder.name, "cri.sock")
        self._paths = HostPaths(proc=_make_proc(Path(self._folder.name, "proc")))
        self.runtime = _Runtime()
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=(self.runtime,))
        self._server.add_insecure_port(f"unix:{self._socket}")
        self._server.start()
        self._asked = 0
        self._resolver: Resolver | None = None

    def resolver(self) -> Resolver:
        if self._asked % _ASKED == 0 or self._resolver is None:
            if self._resolver is not None:
                self._resolver.close()
            self._resolver = Resolver(self._paths, "fuzz", runtime_sockets=(self._socket,))
        self._asked += 1
        return self._resolver

    def stop(self) -> None:
        if self._resolver is not None:
            self._resolver.close()
        self._server.stop(0).wait()
        self._folder.cleanup()


@functools.cache
def _runtimes() -> _Runtimes:
    made = _Runtimes()
    atexit.register(made.stop)
    return made


def cri_seeds() -> list[bytes]:
    meta = api_pb2.PodSandboxMetadata(name="p", namespace="n", uid=_UID)
    found = []
    for info in (
        '{"pid": 1, "netNamespaceClosed": false, "runtimeSpec": {"linux": {"namespaces": '
        '[{"type": "network", "path": "/var/run/netns/x"}]}}, "runtimeHandler": "runc"}',
        f'{{"pid": {_ENDING}, "runtimeSpec": {{"linux": null}}}}',
        "[1]",
        "[" * 5000,
        "",
    ):
        found.append(
            _pack(
                [
                    message.SerializeToString()
                    for message in (
                        api_pb2.VersionResponse(runtime_name="r", runtime_version="1"),
                        api_pb2.ListPodSandboxResponse(
                            items=[
                                api_pb2.PodSandbox(id=_ID, metadata=meta),
                                api_pb2.PodSandbox(
                                    id=_ID[::-1], metadata=meta, state=api_pb2.SANDBOX_NOTREADY
                                ),
                            ]
                        ),
                        api_pb2.PodSandboxStatusResponse(
                            status=api_pb2.PodSandboxStatus(
                                id=_ID,
                                metadata=meta,
                                network=api_pb2.PodSandboxNetworkStatus(ip="10.0.0.1"),
                            ),
                            info={"info": info},
                        ),
                        api_pb2.ListContainersResponse(
                            containers=[api_pb2.Container(id=_ID, pod_sandbox_id=_ID)]
                        ),
                        api_pb2.ContainerStatusResponse(
                            status=api_pb2.ContainerStatus(id=_ID, state=api_pb2.CONTAINER_RUNNING),
                            info={"info": info},
                        ),
                    )
                ]
            )
        )
    return found


def resolve(data: bytes) -> None:
    runtimes = _runtimes()
    runtimes.runtime.answers = dict(zip(_CRI, _unpack(data), strict=False))
    with runtimes.resolver().resolve(PodRef(namespace="n", name="p", uid=_UID), timeout=1.0):
        raise AssertionError("a pod that is not there was found")


# The agent


@functools.cache
def _agent() -> tuple[grpc.Channel, int]:
    """In namespaces of its own."""
    folder = tempfile.TemporaryDirectory(prefix="gkfuzz")
    socket = Path(folder.name, "agent.sock")
    program = str(Path(sys.executable).parent / "gketrace-agent")
    argv = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", program, "serve"]
    argv += [f"--listen=unix://{socket}", f"--log-file={folder.name}/log", "--node-name=fuzz"]
    argv += ["--runtime-endpoint=none"]
    process = subprocess.Popen(argv)
    channel = grpc.insecure_channel(f"unix:{socket}")
    grpc.channel_ready_future(channel).result(60)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    agent = int(children.split()[0])

    def stop() -> None:
        channel.close()
        os.kill(agent, signal.SIGTERM)  # unshare itself ignores it while its child lives
        process.wait(30)
        folder.cleanup()

    atexit.register(stop)
    return channel, agent


def agent_pid() -> int:
    return _agent()[1]


def request_seeds() -> list[bytes]:
    """The method's name, and a request."""
    pod = target_pb2.PodRef(
        namespace="n", name="p", uid=_UID, container_ids=[_ID], pod_ips=["10.0.0.1"]
    )
    target = target_pb2.Target(pod=pod)
    host = target_pb2.Target(host=True)
    packet = encode(
        Packet(
            src=parse_address("10.0.0.1"),
            dst=parse_address("10.0.0.2"),
            protocol=6,
            sport=1,
            dport=2,
        )
    )
    wanted = pb.ConntrackFilter(
        family=4, protocol=6, orig_src="10.0.0.0/8", orig_dport=80, address="fd00::1", zone=1
    )
    tap = capture_pb2.CaptureTap(target=host, interface="lo", filter="tcp port 80", snap_length=96)
    limits = capture_pb2.CaptureLimits(seconds=0.1, packets=5, bytes=1000)
    calls: tuple[tuple[str, Any], ...] = (
        ("GetInfo", pb.GetInfoRequest()),
        ("ResolvePod", pb.ResolvePodRequest(pod=pod)),
        ("GetNetns", pb.GetNetnsRequest(target=host, pods=[pod])),
        ("GetNetns", pb.GetNetnsRequest(target=target)),
        ("Snapshot", pb.SnapshotRequest(pods=[pod])),
        ("GetRules", pb.GetRulesRequest(target=host, table="nat", chain="x")),
        ("ListConntrack", pb.ListConntrackRequest(target=host, filter=wanted, any=[wanted])),
        ("ListConntrack", pb.ListConntrackRequest(target=host, format=pb.CONNTRACK_FORMAT_TEXT)),
        ("FollowConntrack", pb.FollowConntrackRequest(target=host, filter=wanted, existing=True)),
        ("GetConntrackStats", pb.GetConntrackStatsRequest(target=host)),
        ("DeleteConntrack", pb.DeleteConntrackRequest(target=host)),
        ("Walk", pb.WalkRequest(target=host, interface="lo", packet=packet, pods=[pod])),
        ("Walk", pb.WalkRequest(target=host, arrives=True, packet=packet, use_conntrack=True)),
        ("Capture", capture_pb2.CaptureRequest(taps=[tap], limits=limits)),
    )
    return [_pack([name.encode(), request.SerializeToString()]) for name, request in calls]


def mutate_request(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """The request is changed, or is another method's."""
    name, request = _unpack(rng.choice(seeds))
    others = [_unpack(seed)[1] for seed in seeds]
    return _pack([name, mutate_bytes(rng, [request, request, rng.choice(others)])])


class Refused(Exception):
    """The agent said no."""


_FINE: Final = frozenset({grpc.StatusCode.CANCELLED})
_BROKEN: Final = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}
)
_LIMIT: Final = 30.0
"""Seconds for the first message of an answer: a machine may be busy with much else."""


def ask(data: bytes) -> None:
    """The answer's first messages; what is without an end is ended.  INTERNAL is a crash."""
    name, request = _unpack(data)
    channel, _ = _agent()
    call = channel.unary_stream(f"/gketrace.v1alpha1.Agent/{name.decode()}")
    began = time.monotonic()
    stream = call(request, timeout=_LIMIT)
    try:
        for _ in _first(stream, began):
            pass
    except grpc.RpcError as error:
        if error.code() in _BROKEN:
            raise RuntimeError(f"{name.decode()}: {error.code().name}: {error.details()}") from None
        if error.code() not in _FINE:
            raise Refused(error.details()) from None
    finally:
        stream.cancel()


def _first(stream: Iterator[bytes], began: float) -> Iterator[bytes]:
    for count, message in enumerate(stream):
        yield message
        if count > 3 or time.monotonic() - began > 0.2:
            return
