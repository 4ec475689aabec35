"""A gRPC channel to one agent, with its certificate's name checked and a token with each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import grpc

from gketrace.errors import GketraceError

__all__ = ["Metadata", "secure_channel"]

Metadata: TypeAlias = tuple[tuple[str, str], ...]


def secure_channel(
    target: str,
    *,
    ca: bytes,
    name: str,
    metadata: Callable[[], Metadata],
    options: Iterable[tuple[str, Any]],
) -> grpc.Channel:
    """`ca`: PEM; `name`: in the agent's certificate, however it is reached; `metadata`: what goes
    with each call, asked for at each one; it may raise `GketraceError`."""
    secure = grpc.ssl_channel_credentials(root_certificates=ca)
    calls = grpc.metadata_call_credentials(_Plugin(metadata))
    return grpc.secure_channel(
        target,
        grpc.composite_channel_credentials(secure, calls),
        options=(*options, ("grpc.ssl_target_name_override", name)),
    )


class _Plugin(grpc.AuthMetadataPlugin):
    def __init__(self, metadata: Callable[[], Metadata]) -> None:
        self._metadata = metadata

    def __call__(self, context: Any, callback: Any) -> None:
        try:
            callback(self._metadata(), None)
        except GketraceError as error:
            callback((), error)
