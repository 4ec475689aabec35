"""Matches that are always true: ``comment`` and ``nfacct``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, quote
from gketrace.simulate.matches.base import only_options
from gketrace.simulate.state import YES, Answer, Environment, PacketState

if TYPE_CHECKING:
    from typing import Self

__all__ = ["CommentMatch", "NfacctMatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommentMatch(Match):
    """``-m comment``: xt_comment.c returns true."""

    module: ClassVar[str] = "comment"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--comment": 1}

    comment: str

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        return cls(comment=options[0].value)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return YES

    def render(self) -> str:
        return f"-m comment --comment {quote(self.comment)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NfacctMatch(Match):
    """``-m nfacct``: counts in a named object, and is true.

    nfacct_mt() is false only for an object that was made with a quota and is still below it.
    kube-proxy makes its objects without; quotas of others are not read (docs/limitations).
    """

    module: ClassVar[str] = "nfacct"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--nfacct-name": 1}

    name: str

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        return cls(name=options[0].value)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return YES

    def render(self) -> str:
        # Two spaces, as libxt_nfacct.c prints it.
        return f"-m nfacct --nfacct-name  {quote(self.name)}"
