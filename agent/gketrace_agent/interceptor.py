"""Around every call: who calls and what they may, bounds, errors as gRPC statuses, one line of
audit.

Each handler of the agent's service is given to gRPC as one that takes a stream of raw requests:
then it runs before the request has come, and a caller who is nobody, or over a bound, is refused
without a byte of theirs being read.  On the wire that is the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message

from gketrace import access
from gketrace.errors import (
    GRPC_STATUS,
    ExhaustedError,
    ForbiddenError,
    GketraceError,
    TimeoutExceeded,
    UsageError,
)
from gketrace_agent.access.alarms import Alarms
from gketrace_agent.access.edge import check_request
from gketrace_agent.access.guard import CALLER, IN_NODE, OWN, Granted, Guard
from gketrace_agent.access.identity import LOCAL, Caller
from gketrace_agent.calls import CALLS
from gketrace_agent.log import logger
from gketrace_agent.messages import describe_request

__all__ = ["CallInterceptor", "status_of"]

_DETAILS: Final = 2000
"""Characters of an error's text; HTTP/2 trailers are bounded to 8 KiB, percent-encoded."""
_REQUEST_SECONDS: Final = 10.0
"""A request must have come whole by then."""
_ALARMS: Final = Alarms(_REQUEST_SECONDS)
_RENEW_SECONDS: Final = 5.0
"""A stream's permission, and whose an address is, are looked at again so often (`Guard.renew`)."""
_AGENT: Final = "/gketrace."
_OPEN: Final = "/grpc.health.v1.Health/Check"
"""For probes: it says only that the agent serves."""
Behaviour = Callable[[Any, grpc.ServicerContext], Any]


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status that tells a client of `error`, and its text in one line."""
    if isinstance(error, GketraceError):
        for cls, status in GRPC_STATUS:
            if isinstance(error, cls):
                return grpc.StatusCode[status], str(error)[:_DETAILS]
    text = " ".join(str(error).split())
    return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}: {text}"[:_DETAILS]


@dataclass(slots=True, kw_only=True)
class _Audit:
    """What one call's line says."""

    method: str
    peer: str
    started: float
    caller: Caller | None = None
    granted: Granted = field(default_factory=Granted)
    asked: bool = False
    """Whether it came as far as to be granted or refused by its permission."""
    target: str = ""
    bytes: int = 0
    drops: int = 0

    @property
    def call(self) -> str:
        return self.method.rpartition("/")[2]


class CallInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # not generic when run
    """Of one server; the guard is the agent's."""

    def __init__(self, guard: Guard, *, local: bool, reply_bytes: int) -> None:
        """`local`: of the unix socket, whose callers are root on the node."""
        self._guard = guard
        self._local = local
        self._reply_bytes = reply_bytes

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        # Runs in gRPC's only polling thread, and under its lock: nothing here may wait.
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or (not method.startswith(_AGENT) and self._lets_in(method)):
            # Health and reflection handle their errors themselves.
            return handler
        if not method.startswith(_AGENT):
            return _refused(handler)
        return _raw(self._unary(method, handler), self._stream(method, handler), handler)

    def _lets_in(self, method: str) -> bool:
        """Reflection and Health.Watch hold what they have for as long as the client likes."""
        return self._local or not self._guard.checks or method == _OPEN

    def _unary(self, method: str, handler: Any) -> Callable[[Any, grpc.ServicerContext], bytes]:
        def call(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            audit = _Audit(method=method, peer=context.peer(), started=time.monotonic())
            try:
                with self._enter(audit, requests, context, handler) as request:
                    reply = self._reply(audit, handler, handler.unary_unary(request, context))
            except Exception as error:  # noqa: BLE001 - the boundary: every error becomes a status
                context.abort(*_failed(audit, context, error))
            _log(audit, grpc.StatusCode.OK)
            return reply

        return call

    def _stream(
        self, method: str, handler: Any
    ) -> Callable[[Any, grpc.ServicerContext], Iterator[bytes]]:
        def call(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            audit = _Audit(method=method, peer=context.peer(), started=time.monotonic())
            try:
                with self._enter(audit, requests, context, handler) as request:
                    renewed = time.monotonic()
                    for reply in handler.unary_stream(request, context):
                        if time.monotonic() - renewed > _RENEW_SECONDS:
                            audit.granted = self._guard.renew(audit.granted)
                            renewed = time.monotonic()
                        yield self._reply(audit, handler, reply)
            except Exception as error:  # noqa: BLE001 - the boundary: every error becomes a status
                context.abort(*_failed(audit, context, error))
            except GeneratorExit:
                _log(audit, grpc.StatusCode.CANCELLED)
                raise
            _log(audit, grpc.StatusCode.OK)

        return call

    def _enter(
        self, audit: _Audit, requests: Iterator[bytes], context: grpc.ServicerContext, handler: Any
    ) -> _Entered:
        return _Entered(self._guard, self._local, audit, requests, context, handler)

    def _reply(self, audit: _Audit, handler: Any, reply: Message | bytes) -> bytes:
        if isinstance(reply, bytes):  # encoded where it was made: a capture's packets
            audit.bytes += len(reply)
            return reply
        audit.granted.filter(reply)
        audit.drops = max(audit.drops, _drops(reply))
        raw: bytes = handler.response_serializer(reply)
        if len(raw) > self._reply_bytes:
            raise ExhaustedError(
                f"the reply has {len(raw)} bytes, and {self._reply_bytes} is the agent's bound",
                hint="ask for less at once",
            )
        audit.bytes += len(raw)
        return raw


class _Entered:
    """From a call's first moment to its last: admitted, read, granted."""

    def __init__(
        self,
        guard: Guard,
        local: bool,
        audit: _Audit,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        handler: Any,
    ) -> None:
        self._guard, self._local, self._audit = guard, local, audit
        self._requests, self._context, self._handler = requests, context, handler
        self._slot: Any = None

    def __enter__(self) -> Any:
        audit, guard = self._audit, self._guard
        metadata = self._context.invocation_metadata()
        caller = audit.caller = LOCAL if self._local else guard.caller(metadata, audit.peer)
        slot = guard.admit(caller, audit.call)
        slot.__enter__()
        self._slot = slot
        try:
            request = self._receive()
            check_request(request)
            audit.target = describe_request(request)
            named = "".join(
                value
                for key, value in metadata
                if key == access.NAMESPACES_HEADER and isinstance(value, str)
            )
            granted = audit.granted = guard.grant(caller, audit.call, request, named)
            audit.asked = True
            CALLER.set(caller)
            IN_NODE.set(lambda: guard.in_node(caller, granted))
            # A stream's permission is renewed, and its addresses with it.
            OWN.set(None if granted.own is None else lambda: audit.granted.own or frozenset())
            if granted.hidden:
                hidden = (access.HIDDEN_HEADER, granted.hidden.encode())
                self._context.send_initial_metadata((hidden,))
        except BaseException as error:
            slot.__exit__(type(error), error, error.__traceback__)
            raise
        return request

    def __exit__(self, *error: Any) -> None:
        self._slot.__exit__(*error)

    def _receive(self) -> Any:
        # A client that never sends its request would keep a thread.
        late = threading.Event()

        def end() -> None:
            late.set()
            self._context.cancel()  # type: ignore[no-untyped-call]

        call_off = _ALARMS.set(end)
        try:
            raw = next(self._requests)
        except StopIteration:
            raise UsageError("the call carries no request") from None
        except grpc.RpcError as error:
            if late.is_set():
                raise TimeoutExceeded(
                    f"the request did not come within {_REQUEST_SECONDS:g} s"
                ) from None
            raise UsageError(f"the request did not come whole: {error}") from None
        finally:
            call_off()
        try:
            return self._handler.request_deserializer(raw)
        except DecodeError:
            raise UsageError("the request is not a message of this call's type") from None


def _raw(unary: Any, stream: Any, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """`handler` for gRPC, which leaves messages as bytes."""
    if handler.unary_unary:
        return grpc.stream_unary_rpc_method_handler(unary)
    if handler.unary_stream:
        return grpc.stream_stream_rpc_method_handler(stream)
    raise NotImplementedError("the agent has no calls with a stream of requests")


def _refused(handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    def refuse(_: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "only on the agent's unix socket")

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    return grpc.stream_unary_rpc_method_handler(refuse)


def _failed(
    audit: _Audit, context: grpc.ServicerContext, error: Exception
) -> tuple[grpc.StatusCode, str]:
    code, details = status_of(error)
    if not context.is_active():
        # The client hung up or its deadline passed: the error is most likely the consequence.
        details = f"after the client had gone: {details}"
    _log(audit, code, error=error, details=details)
    return code, details


def _drops(reply: Any) -> int:
    """What was lost on the way to this reply, as it says itself."""
    if hasattr(reply, "summary"):
        return int(reply.summary.lost)
    if hasattr(reply, "status"):
        return int(reply.status.lost)
    if hasattr(reply, "statistics"):
        return sum(int(tap.dropped) for tap in reply.statistics.taps)
    return 0


def _verdict(code: grpc.StatusCode, error: Exception | None, audit: _Audit) -> str:
    if error is None:
        return "allowed"
    if isinstance(error, ForbiddenError) or not audit.asked:
        return "refused" if code is not grpc.StatusCode.RESOURCE_EXHAUSTED else "bounded"
    return "bounded" if isinstance(error, ExhaustedError) else "allowed"


def _log(
    audit: _Audit,
    code: grpc.StatusCode,
    *,
    error: Exception | None = None,
    details: str = "",
) -> None:
    """The audit: one line for each call, whatever became of it."""
    internal = code is grpc.StatusCode.INTERNAL
    seconds = time.monotonic() - audit.started
    CALLS.add(audit.call, code.name, seconds, audit.bytes)
    fields: dict[str, Any] = {
        "call": audit.call,
        "user": "" if audit.caller is None else audit.caller.user,
        "credential": "" if audit.caller is None else audit.caller.credential,
        "target": audit.target,
        "verdict": _verdict(code, error, audit),
        "duration_ms": round(seconds * 1000, 1),
        "code": code.name,
        "bytes": audit.bytes,
        "drops": audit.drops,
        "peer": audit.peer,
    }
    granted = audit.granted
    if granted.scope is not None:
        fields["namespaces"] = list(granted.scope.namespaces)
    if granted.masker is not None:
        fields["masked"] = granted.masker.masked
        fields["withheld"] = granted.masker.withheld
    if details:
        fields["error"] = details
    level = logging.ERROR if internal else logging.INFO
    logger.log(level, "call", extra={"fields": fields}, exc_info=error if internal else None)
