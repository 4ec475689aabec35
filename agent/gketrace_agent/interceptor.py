"""Around every call: exceptions become gRPC statuses, and one line goes into the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from gketrace.errors import GRPC_STATUS, GketraceError
from gketrace_agent.calls import CALLS
from gketrace_agent.log import logger
from gketrace_agent.messages import describe_request

__all__ = ["CallInterceptor", "status_of"]

_DETAILS: Final = 2000
"""Characters of an error's text; HTTP/2 trailers are bounded to 8 KiB, percent-encoded."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status that tells a client of `error`, and its text in one line."""
    if isinstance(error, GketraceError):
        for cls, status in GRPC_STATUS:
            if isinstance(error, cls):
                return grpc.StatusCode[status], str(error)[:_DETAILS]
    text = " ".join(str(error).split())
    return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}: {text}"[:_DETAILS]


class CallInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # not generic when run
    """The agent's only interceptor; access control will stand before it."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                _wrap_unary(method, handler.unary_unary),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream and method.startswith("/gketrace."):
            return grpc.unary_stream_rpc_method_handler(
                _wrap_stream(method, handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        # Health's Watch and reflection: gRPC's own long-lived streams, which handle their errors.
        return handler


def _wrap_unary(
    method: str, behaviour: Callable[[Any, grpc.ServicerContext], Any]
) -> Callable[[Any, grpc.ServicerContext], Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        started = time.monotonic()
        try:
            reply = behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - the boundary: every error becomes a status
            code, details = _failed(method, request, context, started, error)
            context.abort(code, details)
        _log(method, request, context, started, grpc.StatusCode.OK)
        return reply

    return call


def _wrap_stream(
    method: str, behaviour: Callable[[Any, grpc.ServicerContext], Iterator[Any]]
) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        started = time.monotonic()
        try:
            yield from behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - the boundary: every error becomes a status
            code, details = _failed(method, request, context, started, error)
            context.abort(code, details)
        _log(method, request, context, started, grpc.StatusCode.OK)

    return call


def _failed(
    method: str, request: Any, context: grpc.ServicerContext, started: float, error: Exception
) -> tuple[grpc.StatusCode, str]:
    code, details = status_of(error)
    if not context.is_active():
        # The client hung up or its deadline passed: the error is most likely the consequence.
        details = f"after the client had gone: {details}"
    _log(method, request, context, started, code, error=error, details=details)
    return code, details


def _log(
    method: str,
    request: Any,
    context: grpc.ServicerContext,
    started: float,
    code: grpc.StatusCode,
    *,
    error: Exception | None = None,
    details: str = "",
) -> None:
    internal = code is grpc.StatusCode.INTERNAL
    if not method.startswith("/gketrace."):
        level = logging.DEBUG
    elif internal:
        level = logging.ERROR
    else:
        level = logging.INFO
    seconds = time.monotonic() - started
    if method.startswith("/gketrace."):
        CALLS.add(method.rpartition("/")[2], code.name, seconds)
    fields: dict[str, Any] = {
        "call": method.rpartition("/")[2],
        "target": describe_request(request),
        "duration_ms": round(seconds * 1000, 1),
        "code": code.name,
        "peer": context.peer(),
    }
    if details:
        fields["error"] = details
    logger.log(level, "call", extra={"fields": fields}, exc_info=error if internal else None)
