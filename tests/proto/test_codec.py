"""Core types and messages agree field by field, and survive the round trip."""

from __future__ import annotations

from dataclasses import fields
from fractions import Fraction
from ipaddress import ip_address

import pytest

from gketrace.errors import GketraceError
from gketrace.packet import Packet
from gketrace.snapshot import Address, PolicyRule, Route
from gketrace.trace import (
    Branch,
    Citation,
    Disposition,
    Hook,
    Ingress,
    NetnsRef,
    Outcome,
    Source,
    Step,
    StepAction,
    StepKind,
    Walk,
)
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import trace_pb2


@pytest.mark.parametrize("cls", codec.MESSAGES, ids=lambda cls: cls.__name__)
def test_every_core_field_has_its_message_field(cls: type) -> None:
    message_fields = {field.name for field in codec.MESSAGES[cls].DESCRIPTOR.fields}
    assert {field.name for field in fields(cls)} == message_fields


def _walk() -> Walk:
    packet = Packet(
        src=ip_address("203.0.113.10"),
        dst=ip_address("10.43.246.223"),
        protocol=6,
        dport=80,
        tcp_options=(2, 4),
    )
    netns = NetnsRef(node="n1", inode=4026531840)
    step = Step(
        kind=StepKind.RULE,
        action=StepAction.JUMP,
        before=packet,
        after=packet,
        hook=Hook.PREROUTING,
        citation=Citation(source=Source.RULE, text="-A X -j Y", table="nat", chain="X", position=1),
        next_hop=ip_address("fd00::1"),
    )
    root = Branch(parent=None, ingress=Ingress(netns=netns), enters=True, steps=(step,))
    leaf = Branch(
        parent=0,
        ingress=Ingress(netns=netns),
        enters=False,
        chance=Fraction(715827883, 2147483648),
        outcome=Outcome(disposition=Disposition.DROPPED, packet=packet, netns=netns),
    )
    return Walk(branches=(root, leaf))


def test_a_walk_survives_the_wire() -> None:
    walk = _walk()
    wire = codec.encode(walk).SerializeToString()
    assert codec.decode(Walk, trace_pb2.Walk.FromString(wire)) == walk


def test_an_unknown_kind_of_step_is_kept_as_unknown() -> None:
    message = codec.encode(_walk())
    message.branches[0].steps[0].kind = 999
    assert codec.decode(Walk, message).branches[0].steps[0].kind is StepKind.UNKNOWN


def test_a_newer_value_without_a_place_for_it_is_an_error() -> None:
    message = codec.encode(_walk())
    message.branches[0].steps[0].hook = 999
    with pytest.raises(GketraceError, match="hook 999 is newer"):
        codec.decode(Walk, message)


def _change_walk(name: str, message: trace_pb2.Walk) -> None:
    first, second = message.branches
    if name == "own parent":
        second.parent = 1
    elif name == "later parent":
        second.parent = 7
    elif name == "two roots":
        second.ClearField("parent")
    elif name == "no root":
        first.parent = 0
    elif name == "no outcome":
        second.ClearField("outcome")
    elif name == "outcome, and goes on":
        first.outcome.CopyFrom(second.outcome)
    elif name == "nothing":
        del message.branches[:]
    else:
        second.chance = name


@pytest.mark.parametrize(
    "change",
    [
        "own parent",
        "later parent",
        "two roots",
        "no root",
        "no outcome",
        "outcome, and goes on",
        "nothing",
        "1/0",
        "-1/2",
        "3/2",
        "1e999999999",
        "nan",
    ],
)
def test_what_no_walk_is(change: str) -> None:
    """A parent that is the branch itself was followed for ever."""
    message = codec.encode(_walk())
    _change_walk(change, message)
    with pytest.raises(GketraceError, match="unreadable"):
        codec.decode(Walk, message)


@pytest.mark.parametrize(
    ("cls", "value"),
    [
        (Address, {"address": "10.0.0.1", "prefixlen": 33}),
        (Address, {"address": "10.0.0.1", "prefixlen": 24, "peer": "::1"}),
        (Route, {"family": 4, "dst": "::/0", "type": 1}),
        (Route, {"family": 6, "dst": "::/0", "type": 1, "prefsrc": "10.0.0.1"}),
        (PolicyRule, {"family": 4, "action": 1, "dst": "::/0"}),
    ],
)
def test_what_no_kernel_has(cls: type, value: dict[str, object]) -> None:
    with pytest.raises(GketraceError, match=f"unreadable {cls.__name__}"):
        codec.decode(cls, codec.MESSAGES[cls](**value))


def test_bytes_that_are_not_utf_8_travel_escaped() -> None:
    comment = b'/* caf\xe9 "x" */'.decode("utf-8", "surrogateescape")
    citation = Citation(source=Source.RULE, text=comment)
    walked = codec.encode(citation)
    assert codec.decode(Citation, walked).text == '/* caf\\xe9 "x" */'
