"""Mutations: of bytes, of words and lines, and of JSON trees."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

__all__ = ["change_node", "mutate_json", "mutate_lines"]

_WORD: Final = re.compile(rb"\S+")
_STRANGE: Final = (
    b"", b"0", b"-1", b"4294967296", b"99999999999999999999", b"0x", b"0xffffffff", b"!", b"-",
    b"--", b'"', b'\\"', b"'", b"\\", b"/", b"/33", b"1.2.3.4/0", b"::/0", b"1:2:3", b":", b",",
    b"-j", b"-A", b"-m", b"[0:0]", b"COMMIT", b"*nat", b"\xff\xfe", b"\xc3\xa9", b"\xc2\xa0",
    b"\x00",
    b"\t", b"\r", b"1e9", b"nan", b"0.5", b"%s", b"A" * 300,
)  # fmt: skip
_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**32, 2**64, 10**30, 0.5, 1e308, "", "x", "@", "@x",
    "0.0.0.0", "::", "tcp", "accept", [], {}, [[]], [None], {"": None}, {"drop": None},
    {"jump": {"target": "x"}}, {"set": []}, {"set": [1]}, {"range": [9, 1]},
    {"prefix": {"addr": "::", "len": 129}}, {"concat": []}, {"map": {"key": 1, "data": 2}},
    {"numgen": {"mode": "random", "mod": 0}},
)  # fmt: skip


def mutate_lines(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One seed's text, mutated one to six times; other seeds give lines and words."""
    text = rng.choice(seeds)
    lines = text.split(b"\n")
    # Mostly small inputs, so that many are tried; whole tables are cut at random places.
    if len(lines) > 60 and rng.random() < 0.7:
        start = rng.randrange(len(lines) - 50)
        lines = [b"*nat", *lines[start : start + rng.randrange(1, 50)], b"COMMIT"]
    for _ in range(rng.randint(1, 6)):
        rng.choice(_LINE_MUTATIONS)(rng, lines, seeds)
    return b"\n".join(lines)


def _place(rng: random.Random, items: Sequence[Any]) -> int:
    return rng.randrange(len(items)) if items else 0


def _drop_line(rng: random.Random, lines: list[bytes], _: Sequence[bytes]) -> None:
    if lines:
        del lines[_place(rng, lines)]


def _copy_line(rng: random.Random, lines: list[bytes], _: Sequence[bytes]) -> None:
    if lines:
        lines.insert(_place(rng, lines), rng.choice(lines))


def _foreign_line(rng: random.Random, lines: list[bytes], seeds: Sequence[bytes]) -> None:
    lines.insert(_place(rng, lines), rng.choice(rng.choice(seeds).split(b"\n")))


def _change_word(rng: random.Random, lines: list[bytes], seeds: Sequence[bytes]) -> None:
    at = _place(rng, lines)
    words = list(_WORD.finditer(lines[at])) if lines else []
    if words:
        word = rng.choice(words)
        new = rng.choice(_STRANGE)
        if rng.random() < 0.5:
            others = _WORD.findall(rng.choice(rng.choice(seeds).split(b"\n")))
            new = rng.choice(others) if others else new
        lines[at] = lines[at][: word.start()] + new + lines[at][word.end() :]


def _insert_word(rng: random.Random, lines: list[bytes], seeds: Sequence[bytes]) -> None:
    if lines:
        at = _place(rng, lines)
        words = lines[at].split(b" ")
        others = _WORD.findall(rng.choice(rng.choice(seeds).split(b"\n"))) or [b"-"]
        words.insert(rng.randint(0, len(words)), rng.choice((rng.choice(_STRANGE), *others)))
        lines[at] = b" ".join(words)


def _drop_word(rng: random.Random, lines: list[bytes], _: Sequence[bytes]) -> None:
    if lines:
        at = _place(rng, lines)
        words = lines[at].split(b" ")
        del words[_place(rng, words)]
        lines[at] = b" ".join(words)


def _flip_byte(rng: random.Random, lines: list[bytes], _: Sequence[bytes]) -> None:
    at = _place(rng, lines)
    if lines and lines[at]:
        raw = bytearray(lines[at])
        raw[_place(rng, raw)] = rng.randrange(256)
        lines[at] = bytes(raw)


def _jump_anywhere(rng: random.Random, lines: list[bytes], _: Sequence[bytes]) -> None:
    """Loops, and jumps to chains that are not there."""
    names = [line[1:].split(b" ")[0] for line in lines if line.startswith(b":")] or [b"INPUT"]
    target = rng.choice((b"-j ", b"-g ")) + rng.choice((*names, b"NOWHERE"))
    lines.insert(_place(rng, lines), b"-A " + rng.choice(names) + b" " + target)


def _cut(rng: random.Random, lines: list[bytes], _: Sequence[bytes]) -> None:
    del lines[_place(rng, lines) :]


_Mutation: TypeAlias = Callable[[random.Random, list[bytes], Sequence[bytes]], None]
_LINE_MUTATIONS: Final[tuple[_Mutation, ...]] = (
    _drop_line,
    _copy_line,
    _foreign_line,
    _change_word,
    _change_word,
    _change_word,
    _insert_word,
    _insert_word,
    _drop_word,
    _drop_word,
    _flip_byte,
    _jump_anywhere,
    _cut,
)


def mutate_json(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One seed's tree with one to six nodes changed, laid out as nft does or as json.dumps does;
    now and then its bytes instead."""
    seed = rng.choice(seeds)
    if rng.random() < 0.15:
        raw = bytearray(seed)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            end = at + rng.randrange(1, 40)
            raw[at:end] = rng.choice(
                (b"", bytes([rng.randrange(256)]), raw[at:end] * 2, b"}", b'"')
            )
        return bytes(raw)
    tree = json.loads(seed)
    items = tree["nftables"]
    if rng.random() < 0.7:
        keep = rng.sample(range(len(items)), min(len(items), rng.randint(3, 40)))
        tree["nftables"] = items = [
            i for n, i in enumerate(items) if n in keep or "table" in i or "metainfo" in i
        ]
    for _ in range(rng.randint(1, 6)):
        change_node(rng, tree)
    separators = (", ", ": ") if rng.random() < 0.85 else (",", ":")
    return json.dumps(tree, separators=separators).encode()


def change_node(rng: random.Random, tree: Any) -> None:
    slots = _slots(tree)
    if not slots:
        return
    parent, key = rng.choice(slots)
    what = rng.random()
    if what < 0.35:
        parent[key] = copy.deepcopy(rng.choice(_VALUES))
    elif what < 0.6:
        other, place = rng.choice(slots)
        if key in (range(len(parent)) if isinstance(parent, list) else parent):
            parent[key] = copy.deepcopy(other[place])
    elif what < 0.75:
        del parent[key]
    elif isinstance(parent, dict):
        parent[rng.choice(("key", "op", "target", "elem", "expr", "x", "val"))] = parent[key]
    else:
        parent.insert(key, copy.deepcopy(parent[key]))


def _slots(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in the tree that holds a value, as (container, key)."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return found
