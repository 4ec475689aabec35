"""What a request may be made of, before anything is done with it.

Names go into paths, look-ups and other programs' questions: what cannot be one is refused here.
"""

from __future__ import annotations

import math
import re
from typing import Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from gketrace.errors import UsageError
from gketrace_proto.v1alpha1 import target_pb2

__all__ = ["check_request", "is_namespace"]

_NAMESPACE: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label (apimachinery/pkg/util/validation, IsDNS1123Label)."""
_NAME: Final = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
"""A DNS subdomain (IsDNS1123Subdomain)."""
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._:/]{0,255}")
"""UIDs, container ids with or without their runtime's scheme, hashes."""
_PODREF: Final = {
    "namespace": _NAMESPACE,
    "name": _NAME,
    "uid": _IDENTIFIER,
    "container_ids": _IDENTIFIER,
    "config_hash": _IDENTIFIER,
}
_FRACTIONS: Final = (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT)
_STRING: Final = 32 << 10
"""Characters of any string: the longest are the filters of captures, with all endpoints in them."""
_LIST: Final = 20_000
"""Elements of any list: pods of a node, entries to delete."""
_LISTS: Final = {"taps": 64}
"""Those of which each costs more than its bytes: a tap's namespace is opened before it is looked at
any further."""
_DEPTH: Final = 16


def is_namespace(text: str) -> bool:
    """Whether a namespace may be called that."""
    return _NAMESPACE.fullmatch(text) is not None


def check_request(message: Message, depth: int = 0) -> None:
    """Raises `UsageError`."""
    if depth > _DEPTH:
        raise UsageError("the request is nested too deeply")
    for field, value in message.ListFields():
        values = value if field.is_repeated else (value,)
        most = _LISTS.get(field.name, _LIST)
        if len(values) > most:
            raise UsageError(
                f"the request's {field.name} has {len(values)} elements, more than {most}"
            )
        if field.type == FieldDescriptor.TYPE_STRING:
            wanted = _PODREF.get(field.name) if isinstance(message, target_pb2.PodRef) else None
            for text in values:
                _check_text(field.name, text, wanted)
        elif field.type in _FRACTIONS:
            # NaN is neither less nor more than any bound.
            if not all(map(math.isfinite, values)):
                raise UsageError(f"the request's {field.name} is no finite number")
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in values:
                check_request(one, depth + 1)


def _check_text(name: str, text: str, wanted: re.Pattern[str] | None) -> None:
    if len(text) > _STRING:
        raise UsageError(f"the request's {name} has {len(text)} characters, more than {_STRING}")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise UsageError(f"the request's {name} has control characters in it")
    if wanted is not None and wanted.fullmatch(text) is None:
        raise UsageError(f"the request's {name} cannot be one: {text[:100]!r}")
