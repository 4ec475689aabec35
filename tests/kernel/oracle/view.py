"""The namespace under test as the simulator sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gketrace.simulate.query import WalkQuery
from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.trace import NetnsRef, Walk

__all__ = ["DutView", "WalkFunction"]


@dataclass(slots=True, kw_only=True)
class DutView:
    """`gketrace.snapshot.NodeView` over the namespace under test, as it was observed once."""

    node: str
    shot: NetnsSnapshot

    def snapshot(self, netns: NetnsRef) -> NetnsSnapshot | Unavailable:
        if netns == self.shot.netns:
            return self.shot
        return Unavailable(reason=f"{netns} is not part of the test bed")


WalkFunction = Callable[[DutView, WalkQuery], Walk]
