"""Answers of traces → the ways that detectors look at."""

from __future__ import annotations

from collections.abc import Iterable

from gketrace.findings.world import Way
from gketrace_cli.astray import is_astray, is_misled, meant_for
from gketrace_cli.verdict import Answer, path_standing

__all__ = ["ways_of"]


def ways_of(answers: Iterable[Answer], services: dict[int, str] | str = "") -> tuple[Way, ...]:
    """`services`: the Service that was asked for, or of each answer by its number."""
    found = []
    for number, answer in enumerate(answers):
        question = answer.question
        whose = services if isinstance(services, str) else services.get(number, "")
        sender = question.sender
        for path in answer.paths:
            found.append(
                Way(
                    path=path,
                    standing=path_standing(answer, path).name.lower(),
                    service=whose,
                    port=question.port_name,
                    sender_pod=sender.pod.key if sender.pod is not None else "",
                    sender_node=sender.node,
                    configured=question.configured_drop,
                    asked=question.asked,
                    astray=is_astray(question, path) or is_misled(question, path),
                    meant=meant_for(question, path),
                )
            )
    return tuple(found)
