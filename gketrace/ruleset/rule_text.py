"""One line of iptables-save → `Rule`.  Never fails: what is not understood is kept as UNKNOWN."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeAlias

from gketrace.ruleset.model import Match, Rule, Target
from gketrace.ruleset.options import Option, Token, tokenize
from gketrace.simulate.matches import HEADER, MATCHES, UnknownMatch, implied_match
from gketrace.simulate.targets import TARGETS, Jump, UnknownTarget, Verdict

__all__ = ["read_rule"]

_START: Final = re.compile(r"(?:\[(\d+):(\d+)\] )?(-A ([^ \n]+))", re.ASCII)

_HEADER: Final[dict[str, type[Match]]] = {option: cls for cls in HEADER for option in cls.OPTIONS}
_MATCHES: Final[dict[str, type[Match]]] = {cls.module: cls for cls in MATCHES}
_TARGETS: Final[dict[str, type[Target]]] = {cls.name: cls for cls in TARGETS}
_STOP: Final = frozenset({"-m", "--match", "-j", "--jump", "-g", "--goto"})


_Parts: TypeAlias = tuple[tuple[Match, ...], Target | None]

_KEPT: Final = 2048
"""Rules whose parts are kept by their text; about 1.5 KB each."""
_known: Final[dict[tuple[str, int], tuple[str, bool, _Parts]]] = {}
"""Text and family → the name that was asked for, whether it is a chain, and the parts.

One question to an agent walks several packets, and each walk reads the rules anew, as legacy has no
generation that would tell that they are the same.  What a rule says hangs on its text alone, and on
whether there is a chain of its target's name.  Shared by threads: an entry is made whole before it
is put in."""


def _parts(rest: str, family: int, is_chain: Callable[[str], bool]) -> _Parts:
    """The matches and the target of a rule; `rest` is what follows the chain's name."""
    known = _known.get((rest, family))
    if known is not None and (not known[0] or is_chain(known[0]) is known[1]):
        return known[2]
    asked: list[tuple[str, bool]] = []

    def ask(name: str) -> bool:
        asked.append((name, is_chain(name)))
        return asked[-1][1]

    matches: tuple[Match, ...]
    target: Target | None
    try:
        tokens = tokenize(rest)
    except ValueError as error:
        matches = (UnknownMatch(text=rest.strip(), reason=str(error)),)
        target = UnknownTarget(text=rest.strip(), reason=str(error))
    else:
        matches, target = _Reader(rest, tokens, family, ask).read()
    parts = matches, target
    if len(asked) < 2:
        if len(_known) >= _KEPT:
            _known.clear()
        _known[rest, family] = (*(asked[0] if asked else ("", False)), parts)
    return parts


class _Group:
    """An extension being read: its name, its options, where its text stands."""

    __slots__ = ("cls", "end", "name", "options", "start", "trouble")

    def __init__(
        self, name: str, cls: type[Match] | type[Target] | None, start: int, end: int
    ) -> None:
        self.name, self.cls, self.start, self.end = name, cls, start, end
        self.options: list[Option] = []
        self.trouble = "" if cls is not None else f"{name} is not known"


def read_rule(
    line: str,
    *,
    backend: str,
    family: int,
    table: str,
    position: int,
    is_chain: Callable[[str], bool],
) -> Rule:
    """`line` begins with ``-A CHAIN``, with or without ``[packets:bytes]`` before."""
    head = _START.match(line)
    assert head is not None, "the index yields only lines that begin so"
    packets = None if head[1] is None else int(head[1])
    size = None if head[2] is None else int(head[2])
    text = line[head.start(3) :]
    matches, target = _parts(text[len(head[3]) :], family, is_chain)
    return Rule(
        backend=backend,
        table=table,
        chain=head[4],
        position=position,
        matches=matches,
        target=target,
        text=text,
        packets=packets,
        bytes=size,
    )


class _Reader:
    """Splits a rule's words among the header options, the matches and the target."""

    def __init__(
        self, line: str, tokens: list[Token], family: int, is_chain: Callable[[str], bool]
    ) -> None:
        self.line, self.tokens, self.family, self.is_chain = line, tokens, family, is_chain
        self.headers: list[Match] = []
        self.groups: list[_Group] = []
        self.target: _Group | None = None
        self.jump: Target | None = None
        self.protocol = ""

    def read(self) -> tuple[tuple[Match, ...], Target | None]:
        tokens = self.tokens
        at = 0
        while at < len(tokens):
            first = at
            negated = tokens[at].text == "!" and not tokens[at].quoted
            if negated:
                at += 1
            if at >= len(tokens):
                self._stray(first, at)
                break
            word = tokens[at].text
            if word in ("-m", "--match") and not negated and at + 1 < len(tokens):
                name = tokens[at + 1].text
                self._open(name, tokens[at].start, tokens[at + 1].end)
                at += 2
            elif word in ("-j", "--jump", "-g", "--goto") and not negated and at + 1 < len(tokens):
                at = self._jump(at)
            elif (header := _HEADER.get(word)) is not None and not self._mine(word):
                at = self._header(header, first, at, negated)
            else:
                at = self._option(first, at, negated)
        matches = tuple(self.headers) + tuple(self._match(group) for group in self.groups)
        return matches, self._target()

    def _open(self, name: str, start: int, end: int) -> _Group:
        group = _Group(name, _MATCHES.get(name), start, end)
        self.groups.append(group)
        return group

    def _header(self, cls: type[Match], first: int, at: int, negated: bool) -> int:
        word = self.tokens[at].text
        last = at + 1 + cls.OPTIONS[word]
        args = tuple(token.text for token in self.tokens[at + 1 : last])
        if cls.module == "-p" and args:
            self.protocol = args[0]
        text = self.line[
            self.tokens[first].start : self.tokens[min(last, len(self.tokens)) - 1].end
        ]
        try:
            if len(args) != cls.OPTIONS[word]:
                raise ValueError(f"{word} without its value")
            self.headers.append(cls.parse((Option(word, negated, args),), self.family))
        except ValueError as error:
            self.headers.append(UnknownMatch(text=text, reason=str(error)))
        return last

    def _jump(self, at: int) -> int:
        word, name = self.tokens[at].text, self.tokens[at + 1]
        goto = word in ("-g", "--goto")
        if name.text in Verdict.NAMES and not goto:
            self.jump = Verdict(verdict=name.text)
        elif goto or self.is_chain(name.text):
            self.jump = Jump(chain=name.text, goto=goto)
        else:
            cls = _TARGETS.get(name.text)
            self.target = _Group(name.text, cls, self.tokens[at].start, name.end)
        return at + 2

    def _option(self, first: int, at: int, negated: bool) -> int:
        """An option of the match or target that was opened last and knows it."""
        word = self.tokens[at]
        group = self._owner(word)
        if group is None:
            return self._stray(first, at + 1)
        assert group.cls is not None
        last = at + 1 + group.cls.OPTIONS[word.text]
        args = tuple(token.text for token in self.tokens[at + 1 : last])
        group.options.append(Option(word.text, negated, args))
        group.end = self.tokens[min(last, len(self.tokens)) - 1].end
        if len(args) != group.cls.OPTIONS[word.text]:
            group.trouble = f"{word.text} without its value"
        return last

    def _mine(self, word: str) -> bool:
        """Does the extension that was opened last have this option (``-m policy --proto``)?"""
        group = self.target or (self.groups[-1] if self.groups else None)
        return group is not None and group.cls is not None and word in group.cls.OPTIONS

    def _owner(self, word: Token) -> _Group | None:
        if word.quoted or not word.text.startswith("-"):
            return None
        candidates = [*self.groups[::-1]]
        if self.target is not None:
            candidates.insert(0, self.target)
        for group in candidates:
            if group.cls is not None and word.text in group.cls.OPTIONS:
                return group
            if group.cls is None:
                return None
        implied = implied_match(self.protocol)
        if implied is not None and self.target is None and self.jump is None:
            cls = _MATCHES[implied]
            if word.text in cls.OPTIONS and all(g.name != implied for g in self.groups):
                group = _Group(implied, cls, word.start, word.end)
                self.groups.append(group)
                return group
        return None

    def _stray(self, first: int, last: int) -> int:
        """Words that nobody knows belong to the extension that was opened last."""
        end = self.tokens[min(last, len(self.tokens)) - 1].end
        words = self.line[self.tokens[first].start : end]
        group = self.target or (self.groups[-1] if self.groups else None)
        if group is None or (self.jump is not None and self.target is None):
            group = _Group("", None, self.tokens[first].start, end)
            group.trouble = f"{words!r} is not known"
            self.groups.append(group)
        elif not group.trouble:
            group.trouble = f"{words!r} is not known"
        group.end = end
        return last

    def _match(self, group: _Group) -> Match:
        if not group.trouble and group.cls is not None and issubclass(group.cls, Match):
            try:
                return group.cls.parse(tuple(group.options), self.family)
            except ValueError as error:
                group.trouble = str(error)
        return UnknownMatch(text=self.line[group.start : group.end], reason=group.trouble)

    def _target(self) -> Target | None:
        group = self.target
        if group is None:
            return self.jump
        if not group.trouble and group.cls is not None and issubclass(group.cls, Target):
            try:
                return group.cls.parse(tuple(group.options), self.family)
            except ValueError as error:
                group.trouble = str(error)
        return UnknownTarget(text=self.line[group.start : group.end], reason=group.trouble)
