"""`quick` changes how fast a class is made, and nothing else."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, replace

import pytest

from gketrace.errors import UsageError
from gketrace.packet import Packet, parse_address
from gketrace.quick import quick


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    name: str
    number: int = 3


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Fast:
    name: str
    number: int = 3


def test_it_is_the_dataclass_that_it_was() -> None:
    one = Fast(name="a")
    assert (one.name, one.number) == ("a", 3)
    assert one == Fast(name="a", number=3) != Fast(name="b")
    assert hash(one) == hash(Fast(name="a"))
    assert repr(one) == "Fast(name='a', number=3)"
    assert replace(one, number=4) == Fast(name="a", number=4)
    assert copy.deepcopy(one) == one
    assert pickle.loads(pickle.dumps(one)) == one
    ours, theirs = inspect.signature(Fast), inspect.signature(Slow)
    assert [str(p) for p in ours.parameters.values()] == [
        str(p) for p in theirs.parameters.values()
    ]
    with pytest.raises(FrozenInstanceError):
        one.number = 5  # type: ignore[misc]
    with pytest.raises(TypeError, match="name"):
        Fast()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="other"):
        Fast(name="a", other=1)  # type: ignore[call-arg]


def test_what_a_class_checks_is_still_checked() -> None:
    with pytest.raises(UsageError, match="not of one address family"):
        Packet(src=parse_address("10.0.0.1"), dst=parse_address("fd00::1"), protocol=6)


def test_only_plain_fields_are_taken() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Listed:
        items: list[int] = field(default_factory=list)

    with pytest.raises(TypeError, match=r"Listed\.items"):
        quick(Listed)
