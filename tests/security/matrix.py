"""Every call of the agent, by every kind of caller: who is let in.

    python -m tests.security.matrix [--json]

Exit status 1 when a verdict is not the expected one, or a call has no row.  What is expected is
written down here, not taken from the product's table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import capture_pb2, target_pb2
from tests.security.bed import NODE, OTHER_NODE, Bed, agent_bed, metadata
from tests.security.tokens import forged

__all__ = ["CALLERS", "Cell", "Row", "methods", "rows", "run"]

READERS = frozenset({"viewer", "capturer", "node-admin"})
CALLERS = (
    "no token",
    "garbage",
    "forged",
    "expired",
    "wrong audience",
    "other node's token",
    "no permission",
    "other namespace",
    "viewer",
    "capturer",
    "node-admin",
)
_HOST = target_pb2.Target(host=True)
_POD = target_pb2.Target(pod=target_pb2.PodRef(namespace="default", name="web"))
_DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One call about one target, and who may make it."""

    method: str
    target: str
    request: Any
    allowed: frozenset[str]
    narrowed: frozenset[str] = frozenset()
    """Who may make it and sees only a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one caller got."""

    method: str
    target: str
    caller: str
    code: str
    verdict: str
    """``allowed``, ``narrowed`` or ``denied``."""
    expected: str

    @property
    def right(self) -> bool:
        return self.verdict == self.expected


def _walk(target: target_pb2.Target) -> pb.WalkRequest:
    request = pb.WalkRequest(target=target)
    request.packet.src, request.packet.dst = "10.40.0.10", "10.40.0.99"
    request.packet.protocol, request.packet.dport = 6, 80
    return request


def _capture(target: target_pb2.Target) -> capture_pb2.CaptureRequest:
    tap = capture_pb2.CaptureTap(target=target, interface="lo", filter="port 9")
    limits = capture_pb2.CaptureLimits(seconds=1, packets=1)
    return capture_pb2.CaptureRequest(taps=[tap], limits=limits)


def rows() -> tuple[Row, ...]:
    """Two for each call that has a target."""
    admin, capturers = frozenset({"node-admin"}), frozenset({"capturer", "node-admin"})
    tenant = frozenset({"other namespace"})
    found = [
        Row(method="GetInfo", target="node", request=pb.GetInfoRequest(), allowed=READERS),
        Row(
            method="Snapshot",
            target="node",
            request=pb.SnapshotRequest(without_rules=True),
            allowed=READERS,
        ),
        Row(
            method="ResolvePod",
            target="pod",
            request=pb.ResolvePodRequest(pod=_POD.pod),
            allowed=READERS,
        ),
        # Of the node-admin's own capture, which `run` begins.
        Row(
            method="FinishCapture",
            target="node",
            request=capture_pb2.FinishCaptureRequest(),
            allowed=admin,
        ),
    ]
    for name, target in (("node", _HOST), ("pod", _POD)):
        host = name == "node"
        part = tenant if host else frozenset()
        list_request = pb.ListConntrackRequest(target=target, limit=5)
        for method, request, allowed, narrowed in (
            ("GetNetns", pb.GetNetnsRequest(target=target), READERS, ()),
            ("GetRules", pb.GetRulesRequest(target=target, table="raw"), READERS, ()),
            ("ListConntrack", list_request, READERS, part),
            ("FollowConntrack", pb.FollowConntrackRequest(target=target), READERS, part),
            ("GetConntrackStats", pb.GetConntrackStatsRequest(target=target), READERS, ()),
            ("DeleteConntrack", pb.DeleteConntrackRequest(target=target), admin, ()),
            ("Walk", _walk(target), READERS, ()),
            ("Capture", _capture(target), admin if host else capturers, ()),
        ):
            found.append(
                Row(
                    method=method,
                    target=name,
                    request=request,
                    allowed=allowed,
                    narrowed=frozenset(narrowed),
                )
            )
    return tuple(found)


def methods() -> frozenset[str]:
    """Every call that an agent answers, by the service's own description."""
    service = pb.DESCRIPTOR.services_by_name["Agent"]
    return frozenset(method.name for method in service.methods)


def tokens(bed: Bed) -> dict[str, str | None]:
    """Of each caller."""
    expired = bed.token("default/admin", seconds=1)
    made = {
        "no token": None,
        "garbage": "garbage",
        "forged": forged(NODE),
        "expired": expired,
        "wrong audience": bed.token("default/admin", audiences=["vault"]),
        "other node's token": bed.token("default/admin", node=OTHER_NODE),
        "no permission": bed.token("default/nobody"),
        "other namespace": bed.token("shop/tenant"),
        "viewer": bed.token("default/viewer"),
        "capturer": bed.token("default/capturer"),
        "node-admin": bed.token("default/admin"),
    }
    time.sleep(2.1)  # the shortest life of a token, in whole seconds
    return made


def ask(stub: Any, row: Row, token: str | None, namespaces: str = "") -> tuple[str, str, str]:
    """(code, what the server said, what is hidden) of one call."""
    call = getattr(stub, row.method)
    extra = metadata(token, namespaces)
    streamed = not hasattr(call, "future")
    running: Any = None
    try:
        if streamed:
            running = call(row.request, metadata=extra, timeout=20)
            next(iter(running), None)
        else:
            running = call.future(row.request, metadata=extra, timeout=20)
            running.result()
        hidden = [v for k, v in running.initial_metadata() or () if k.startswith("gketrace-hidden")]
        return "OK", "", hidden[0].decode() if hidden else ""
    except grpc.RpcError as error:
        return error.code().name, error.details() or "", ""
    finally:
        if streamed and running is not None:
            running.cancel()


def _begin(stub: Any, row: Row, token: str | None) -> Any:
    """The capture that the row's call is about; None: it is about none."""
    if row.method != "FinishCapture":
        return None
    tap = capture_pb2.CaptureTap(target=_HOST, interface="lo", filter="port 9")
    call = stub.Capture(
        capture_pb2.CaptureRequest(taps=[tap]), metadata=metadata(token, ""), timeout=20
    )
    row.request.capture_id = next(call).started.capture_id
    return call


def run(bed: Bed) -> Iterator[Cell]:
    """Every cell of the table."""
    held = tokens(bed)
    with bed.channel() as channel:
        from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub

        stub = AgentStub(channel)
        for row in rows():
            begun = _begin(stub, row, held["node-admin"])
            for caller in CALLERS:
                code, _, hidden = ask(stub, row, held[caller])
                if code in {one.name for one in _DENIED}:
                    verdict = "denied"
                else:
                    verdict = "narrowed" if hidden else "allowed"
                expected = "allowed" if caller in row.allowed else "denied"
                if caller in row.narrowed:
                    expected = "narrowed"
                yield Cell(
                    method=row.method,
                    target=row.target,
                    caller=caller,
                    code=code,
                    verdict=verdict,
                    expected=expected,
                )
            if begun is not None:
                begun.cancel()


def table(cells: list[Cell]) -> str:
    """The matrix as text; ``!`` marks what is not as expected."""
    heads = [f"{n}: {caller}" for n, caller in enumerate(CALLERS, 1)]
    lines = [*heads, "", f"{'':32}" + "".join(f"{n:>5}" for n in range(1, len(CALLERS) + 1))]
    for row in rows():
        mine = [c for c in cells if (c.method, c.target) == (row.method, row.target)]
        marks = [
            {"allowed": "yes", "narrowed": "part", "denied": "-"}[c.verdict] + "!" * (not c.right)
            for c in mine
        ]
        lines.append(f"{row.method + ' ' + row.target:32}" + "".join(f"{m:>5}" for m in marks))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, agent_bed(Path(folder)) as bed:
        cells = list(run(bed))
    missing = sorted(methods() - {row.method for row in rows()})
    wrong = [cell for cell in cells if not cell.right]
    if options.json:
        document = {
            "node": NODE,
            "cells": [asdict(cell) for cell in cells],
            "calls_without_a_row": missing,
            "wrong": len(wrong),
            "passed": not wrong and not missing,
        }
        print(json.dumps(document, indent=1))
    else:
        print(table(cells))
        print(f"\n{len(cells)} cells, {len(wrong)} wrong; calls without a row: {missing or 'none'}")
    sys.exit(bool(wrong or missing))


if __name__ == "__main__":
    main()
