"""An old CLI with a new agent, and the reverse: the protocol only grows.

``tests/data/proto/vX.Y.Z.binpb`` is what a release spoke: a FileDescriptorSet as
``scripts/gen-proto --release`` writes it.  Every release's stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor

import gketrace_proto.v1alpha1.agent_pb2
import gketrace_proto.v1alpha1.capture_pb2
from gketrace.errors import UnsupportedError
from gketrace_agent.config import Config, Listen
from gketrace_agent.server import AgentServer
from gketrace_cli.agents import Fleet

RELEASES = sorted((Path(__file__).parents[1] / "data/proto").glob("v*.binpb"))
PACKAGE = "gketrace.v1alpha1"
NOW = descriptor_pool.Default()


@dataclass
class Release:
    pool: Any
    files: list[str]


@pytest.fixture(scope="module", params=RELEASES, ids=lambda path: path.stem)
def old(request: pytest.FixtureRequest) -> Release:
    """A release's descriptors, in a pool of their own."""
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(request.param.read_bytes())
    for file in files.file:
        pool.Add(file)
    return Release(pool, [file.name for file in files.file])


def _messages(release: Release) -> Iterator[Descriptor]:
    def below(message: Descriptor) -> Iterator[Descriptor]:
        yield message
        for nested in message.nested_types:
            yield from below(nested)

    for name in release.files:
        for message in release.pool.FindFileByName(name).message_types_by_name.values():
            yield from below(message)


def _shape(field: FieldDescriptor) -> tuple[object, ...]:
    of = field.message_type or field.enum_type
    return (
        field.name,
        field.type,
        field.is_repeated,
        field.has_presence,
        of.full_name if of is not None else "",
        field.containing_oneof.name if field.containing_oneof else "",
    )


def test_there_is_a_release() -> None:
    assert RELEASES


def test_fields_are_only_added(old: Release) -> None:
    for message in _messages(old):
        now = NOW.FindMessageTypeByName(message.full_name)
        for number, field in message.fields_by_number.items():
            assert number in now.fields_by_number, f"{field.full_name} is gone"
            assert _shape(now.fields_by_number[number]) == _shape(field), field.full_name


def test_enum_values_are_only_added(old: Release) -> None:
    for name in old.files:
        for enum in old.pool.FindFileByName(name).enum_types_by_name.values():
            now = NOW.FindEnumTypeByName(enum.full_name)
            for number, value in enum.values_by_number.items():
                assert now.values_by_number[number].name == value.name


def test_calls_are_only_added(old: Release) -> None:
    service = old.pool.FindServiceByName(f"{PACKAGE}.Agent")
    now = NOW.FindServiceByName(f"{PACKAGE}.Agent")
    for method in service.methods:
        found = now.methods_by_name[method.name]
        assert found.input_type.full_name == method.input_type.full_name
        assert found.output_type.full_name == method.output_type.full_name
        assert found.server_streaming == method.server_streaming
        assert found.client_streaming == method.client_streaming


def _fill(message: Any, depth: int = 0) -> Any:
    """Every field set to something."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None:
            if depth < 3:
                inner = getattr(message, field.name)
                _fill(inner.add() if field.is_repeated else inner, depth + 1)
            continue
        value: Any = 1
        if field.type == FieldDescriptor.TYPE_STRING:
            value = "x"
        elif field.type == FieldDescriptor.TYPE_BYTES:
            value = b"x"
        elif field.type == FieldDescriptor.TYPE_BOOL:
            value = True
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return message


def test_an_old_side_reads_a_new_message_and_passes_on_what_it_does_not_know(old: Release) -> None:
    for descriptor in _messages(old):
        if descriptor.GetOptions().map_entry:
            continue
        here = message_factory.GetMessageClass(NOW.FindMessageTypeByName(descriptor.full_name))
        there = message_factory.GetMessageClass(descriptor)
        sent = _fill(here())
        read = there.FromString(sent.SerializeToString())
        for field in descriptor.fields:
            if field.has_presence and field.containing_oneof is None:
                assert read.HasField(field.name) == sent.HasField(field.name), field.full_name
        assert here.FromString(read.SerializeToString()) == sent


def test_a_new_side_reads_an_old_message(old: Release) -> None:
    for descriptor in _messages(old):
        if descriptor.GetOptions().map_entry:
            continue
        here = message_factory.GetMessageClass(NOW.FindMessageTypeByName(descriptor.full_name))
        sent = _fill(message_factory.GetMessageClass(descriptor)())
        assert here.FromString(sent.SerializeToString()).SerializeToString(
            deterministic=True
        ) == sent.SerializeToString(deterministic=True)


def test_an_old_client_asks_a_new_agent(old: Release, tmp_path: Path) -> None:
    """Beyond the messages: the names of the calls, over a real server."""
    info = old.pool.FindServiceByName(f"{PACKAGE}.Agent").methods_by_name["GetInfo"]
    config = Config(node="n", listen=(Listen(path=tmp_path / "agent.sock"),), runtime_sockets=())
    server = AgentServer(config)
    server.start()
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/agent.sock") as channel:
            call = channel.unary_unary(
                f"/{PACKAGE}.Agent/GetInfo",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(info.output_type).FromString,
            )
            reply = call(message_factory.GetMessageClass(info.input_type)(), timeout=20)
    finally:
        server.stop(0)
    assert reply.node == "n"


def test_a_new_client_asks_an_agent_that_lacks_a_call(tmp_path: Path) -> None:
    """What an old agent does not have is said as such, not as nothing."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{tmp_path}/old.sock")
    server.start()
    try:
        with Fleet(timeout=10) as fleet:
            fleet.add_address("n", f"unix://{tmp_path}/old.sock")
            request = gketrace_proto.v1alpha1.agent_pb2.GetInfoRequest()
            with pytest.raises(UnsupportedError, match=r"node n: .*[Mm]ethod not found"):
                fleet.call("n", "GetInfo", request)
    finally:
        server.stop(0)
