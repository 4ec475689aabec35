"""JSON merge patch (RFC 7396) and JSON patch (RFC 6902). Both return a new document."""

from __future__ import annotations

import copy
from typing import Any

from .errors import ApiError, bad_request

__all__ = ["json_patch", "merge_patch"]


def merge_patch(target: Any, patch: Any) -> Any:
    """``target`` with ``patch`` merged in; null removes a member."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def _tokens(pointer: Any) -> list[str]:
    if not isinstance(pointer, str) or (pointer and not pointer.startswith("/")):
        raise bad_request(f"invalid JSON pointer {pointer!r}")
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def _failed(operation: dict[str, Any], why: str) -> ApiError:
    return ApiError(422, "Invalid", f"the server rejected our request: {operation}: {why}")


def _index(parent: list[Any], token: str, *, end: bool) -> int:
    if end and token == "-":
        return len(parent)
    if not token.isdigit() or int(token) > len(parent) - (0 if end else 1):
        raise LookupError(f"no index {token}")
    return int(token)


def _read(document: Any, tokens: list[str]) -> Any:
    for token in tokens:
        if isinstance(document, list):
            document = document[_index(document, token, end=False)]
        elif isinstance(document, dict):
            document = document[token]
        else:
            raise LookupError(f"no member {token}")
    return document


def _apply(document: Any, kind: str, tokens: list[str], value: Any) -> Any:
    if not tokens:
        return value if kind in ("add", "replace") else None
    parent, last = _read(document, tokens[:-1]), tokens[-1]
    if isinstance(parent, list):
        if kind == "add":
            parent.insert(_index(parent, last, end=True), value)
        elif kind == "remove":
            del parent[_index(parent, last, end=False)]
        else:
            parent[_index(parent, last, end=False)] = value
    elif isinstance(parent, dict):
        if kind != "add" and last not in parent:
            raise LookupError(f"no member {last}")
        if kind == "remove":
            del parent[last]
        else:
            parent[last] = value
    else:
        raise LookupError(f"no member {last}")
    return document


def json_patch(target: Any, operations: Any) -> Any:
    """``target`` after ``operations``.

    Raises: ApiError 400 for a patch that is none, 422 for one that does not fit.
    """
    if not isinstance(operations, list) or not all(isinstance(op, dict) for op in operations):
        raise bad_request("a JSON patch is a list of operations")
    document = copy.deepcopy(target)
    for operation in operations:
        kind, tokens = operation.get("op"), _tokens(operation.get("path"))
        try:
            if kind in ("add", "replace"):
                document = _apply(document, kind, tokens, copy.deepcopy(operation["value"]))
            elif kind == "remove":
                document = _apply(document, kind, tokens, None)
            elif kind in ("move", "copy"):
                source = _tokens(operation.get("from"))
                value = copy.deepcopy(_read(document, source))
                if kind == "move":
                    document = _apply(document, "remove", source, None)
                document = _apply(document, "add", tokens, value)
            elif kind == "test":
                if _read(document, tokens) != operation.get("value"):
                    raise _failed(operation, "testing value failed")
            else:
                raise bad_request(f"unknown JSON patch operation {kind!r}")
        except LookupError as error:
            raise _failed(operation, str(error)) from error
    return document
