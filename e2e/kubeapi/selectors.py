"""Label and field selectors, as list and watch take them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .errors import bad_request

__all__ = ["Predicate", "parse_field_selector", "parse_label_selector"]

Predicate = Callable[[Mapping[str, Any]], bool]

_KEY = r"[A-Za-z0-9](?:[-A-Za-z0-9_./]*[A-Za-z0-9])?"
_VALUE = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_SET = re.compile(rf"({_KEY})\s+(in|notin)\s+\(([^()]*)\)$")
_EQUAL = re.compile(rf"({_KEY})\s*(==|=|!=)\s*({_VALUE})?$")
_EXISTS = re.compile(rf"(!?)\s*({_KEY})$")

_FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "pods": {
        "spec.nodeName": ("spec", "nodeName"),
        "spec.restartPolicy": ("spec", "restartPolicy"),
        "spec.serviceAccountName": ("spec", "serviceAccountName"),
        "status.phase": ("status", "phase"),
        "status.podIP": ("status", "podIP"),
    },
    "services": {
        "spec.clusterIP": ("spec", "clusterIP"),
        "spec.type": ("spec", "type"),
    },
}
"""Beyond metadata.name and metadata.namespace; k8s.io/kubernetes/pkg/apis/core/v1/conversion.go."""


def _split(selector: str) -> list[str]:
    """Split at commas outside parentheses."""
    parts = [part.strip() for part in re.split(r",(?![^(]*\))", selector)]
    return [part for part in parts if part]


def _labels(obj: Mapping[str, Any]) -> Mapping[str, str]:
    labels: Mapping[str, str] = obj["metadata"].get("labels") or {}
    return labels


def _requirement(text: str) -> Predicate:
    if match := _SET.match(text):
        key, operator, listed = match.groups()
        values = {value.strip() for value in listed.split(",")}
        if operator == "in":
            return lambda obj: _labels(obj).get(key) in values
        return lambda obj: _labels(obj).get(key) not in values
    if match := _EQUAL.match(text):
        key, operator, wanted = match.group(1), match.group(2), match.group(3) or ""
        if operator == "!=":
            return lambda obj: _labels(obj).get(key) != wanted
        return lambda obj: _labels(obj).get(key) == wanted
    if match := _EXISTS.match(text):
        absent, key = match.groups()
        if absent:
            return lambda obj: key not in _labels(obj)
        return lambda obj: key in _labels(obj)
    raise bad_request(f"unable to parse requirement: {text!r} is not a label selector")


def parse_label_selector(selector: str) -> Predicate | None:
    """The predicate for ``selector``, or None when it selects everything.

    Raises: ApiError 400 when it cannot be parsed.
    """
    requirements = [_requirement(part) for part in _split(selector)]
    if not requirements:
        return None
    return lambda obj: all(requirement(obj) for requirement in requirements)


def parse_field_selector(selector: str, plural: str, api_version: str) -> Predicate | None:
    """The predicate for ``selector`` on resource ``plural``, or None when it selects everything.

    Raises: ApiError 400 for a field that the resource does not support.
    """
    known = {
        "metadata.name": ("metadata", "name"),
        "metadata.namespace": ("metadata", "namespace"),
        **_FIELDS.get(plural, {}),
    }
    terms: list[tuple[tuple[str, ...], bool, str]] = []
    for part in _split(selector):
        match = re.match(r"([^=!]+?)\s*(==|=|!=)\s*(.*)$", part)
        if match is None:
            raise bad_request(f"invalid field selector: {part!r}")
        field, operator, wanted = match.groups()
        if field not in known:
            raise bad_request(
                f'Unable to find "{api_version}, Resource={plural}" that match label selector "", '
                f'field selector "{selector}": field label not supported: {field}'
            )
        terms.append((known[field], operator != "!=", wanted))
    if not terms:
        return None

    def matches(obj: Mapping[str, Any]) -> bool:
        for path, equal, wanted in terms:
            value: Any = obj
            for key in path:
                value = value.get(key) or {}
            if ((value or "") == wanted) != equal:
                return False
        return True

    return matches
