"""CRI as a kubelet speaks it: the messages of cri.proto, and a client of one runtime."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

from e2e.netlab.errors import LabError

__all__ = ["CriClient", "messages"]

_PROTO = Path(__file__).with_name("cri.proto")
_SECONDS = 60.0


@cache
def _compiled() -> tuple[descriptor_pool.DescriptorPool, str]:
    """cri.proto in a pool of its own: the agent's subset has the same names."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, "cri.binpb")
        argv = ["protoc", f"-I{_PROTO.parent}", f"--descriptor_set_out={out}", str(_PROTO)]
        if protoc.main(argv) != 0:
            raise LabError(f"{_PROTO} does not compile")
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool, files.file[0].name


@cache
def messages() -> Any:
    """Message classes by name, and the enumerations' values."""
    pool, name = _compiled()
    file = pool.FindFileByName(name)
    found: dict[str, Any] = {
        key: message_factory.GetMessageClass(descriptor)
        for key, descriptor in file.message_types_by_name.items()
    }
    for kind in file.enum_types_by_name.values():
        found |= {value.name: value.number for value in kind.values}
    return SimpleNamespace(**found)


class CriClient:
    """One runtime's socket."""

    def __init__(self, socket: str) -> None:
        self._channel = grpc.insecure_channel(
            f"unix:{socket}", options=(("grpc.default_authority", "localhost"),)
        )

    def close(self) -> None:
        self._channel.close()

    def call(self, name: str, *, service: str = "RuntimeService", **fields: Any) -> Any:
        """Makes the call `name` with its request's fields; raises LabError with what it says."""
        known = messages()
        request = getattr(known, f"{name}Request")(**fields)
        method = self._channel.unary_unary(
            f"/runtime.v1.{service}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=getattr(known, f"{name}Response").FromString,
        )
        try:
            return method(request, timeout=_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise LabError(f"{name}: {error.code().name}: {error.details()}") from None
