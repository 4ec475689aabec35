"""Mutations of binary messages: single bytes, lengths, pieces of other messages."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Final

__all__ = ["mutate_bytes"]

_NUMBERS: Final = (0, 1, 2, 3, 4, 15, 16, 17, 19, 20, 127, 128, 255, 0x7FFF, 0x8000, 0xFFFF)
_WIDE: Final = (0, 1, 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def mutate_bytes(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One seed with one to eight changes."""
    raw = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 8)):
        _change(rng, raw, seeds)
    return bytes(raw)


def _change(rng: random.Random, raw: bytearray, seeds: Sequence[bytes]) -> None:
    if not raw:
        raw += rng.choice(seeds)[: rng.randrange(1, 64)]
        return
    at = rng.randrange(len(raw))
    what = rng.randrange(7)
    if what == 0:
        raw[at] = rng.randrange(256)
    elif what == 1:
        raw[at] ^= 1 << rng.randrange(8)
    elif what == 2:  # a length or a type, as netlink and pcapng have them
        at &= ~3
        raw[at : at + 2] = struct.pack("=H", rng.choice(_NUMBERS))
    elif what == 3:
        at &= ~3
        raw[at : at + 4] = struct.pack("=I", rng.choice(_WIDE))
    elif what == 4:
        del raw[at : at + rng.randrange(1, 40)]
    elif what == 5:
        piece = rng.choice(seeds)
        begin = rng.randrange(len(piece) + 1)
        raw[at:at] = piece[begin : begin + rng.randrange(1, 60)]
    else:
        del raw[at:]
