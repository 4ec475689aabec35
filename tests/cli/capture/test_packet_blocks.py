"""Packet blocks laid out by NumPy are byte for byte those that are made packet by packet."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from typing import Any

import numpy as np
import pytest

from gketrace.capture.packets import CapturedPacket, Direction, LinkType, Tap
from gketrace_cli.capture import packet_blocks
from gketrace_cli.capture.batch import PacketBatch, batch_from_blocks, batch_from_packets
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.pcapng import PcapngWriter
from tests.cli.capture.test_files import BASE, blocks, tap

SIZES = (0, 1, 2, 3, 4, 31, 32, 33, 60, 66, 127, 128, 509, 512, 513, 1514, 2047, 2049, 9000)
COMMENTS = ("", "hop 1", "hop 2, DNAT by KUBE-SEP-X:2", "ü")


def block(packet: CapturedPacket, number: int, *, of_file: bool = False) -> bytes:
    """One packet's block (draft-ietf-opsawg-pcapng, section 4.3); a file does not say to whom a
    packet that came in was sent."""
    data = packet.data + b"\0" * (-len(packet.data) % 4)
    flags = 2 if packet.direction is Direction.OUT else 1 if of_file else 1 | 1 << 2
    options = b""
    if packet.comment:
        text = packet.comment.encode()
        options = struct.pack("<HH", 1, len(text)) + text + b"\0" * (-len(text) % 4)
    options += struct.pack("<HHIHH", 2, 4, flags, 0, 0)
    length = 28 + len(data) + len(options) + 4
    head = struct.pack(
        "<7I", 6, length, number, packet.time_ns >> 32, packet.time_ns & 0xFFFFFFFF,
        len(packet.data), packet.original_length,
    )  # fmt: skip
    return head + data + options + struct.pack("<I", length)


def written(chunk: Chunk) -> bytes:
    with tempfile.TemporaryFile() as file:
        writer = PcapngWriter(file.fileno())
        for batch in chunk.batches:
            writer.interface(batch.tap)
        begin = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        writer.write(chunk)
        file.seek(begin)
        return file.read()


def random_batch(chance: random.Random, one: Tap, count: int, *, later: int) -> PacketBatch:
    """Out of a ring, or as files are read back, with comments."""
    narrow = chance.random() < 0.5
    sizes = chance.sample(SIZES[:12] if narrow else SIZES, chance.randint(1, 4))
    if not narrow and chance.random() < 0.2:
        sizes.append(70_000)
    kind = chance.choice((0, 4))
    times = sorted(chance.randrange(10_000_000) for _ in range(count))
    of_file = chance.random() < 0.3
    packets = [
        CapturedPacket(
            tap=one,
            time_ns=BASE + later + time,
            data=chance.randbytes(max(chance.choice(sizes), 14 if one.snap_length else 0)),
            original_length=chance.randrange(1 << 17),
            direction=Direction.OUT if kind == 4 else Direction.IN,
            vlan=7 if not of_file and chance.random() < 0.1 else None,
            comment=chance.choice(COMMENTS) if of_file else "",
        )
        for time in times
    ]
    if of_file:
        return batch_from_packets(one, packets)
    return batch_from_blocks(
        one, *blocks(packets, per_block=chance.randint(1, 9), kind=kind)
    ).shifted(chance.choice((0, 12_345)))


@pytest.mark.parametrize("seed", range(30))
def test_blocks_are_those_of_single_packets(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    for bound in ("_PIECE", "_MERGED"):
        monkeypatch.setattr(packet_blocks, bound, chance.choice((1000, 20_000, 8 << 20)))
    taps: list[Any] = [tap(0), tap(1, snap_length=0), tap(2, ifindex=0, link_type=276)]
    count = chance.choice((1, 2, 40, 300))
    batches = tuple(
        random_batch(chance, one, count, later=chance.choice((0, 5_000_000)))
        for one in chance.sample(taps, chance.randint(1, 3))
    )
    order = None
    if len(batches) > 1 and chance.random() < 0.8:
        times = np.concatenate([one.times for one in batches])
        order = np.argsort(times, kind="stable")
    chunk = Chunk(batches=batches, order=order)
    numbers = {one.tap: place for place, one in enumerate(batches)}
    files = {one.tap for one in batches if one.headers is None}
    assert written(chunk) == b"".join(
        block(one, numbers[one.tap], of_file=one.tap in files) for one in chunk.packets()
    )


def test_pieces_follow_each_other() -> None:
    """More than is laid out at a time, and what was longest comes last."""
    one = tap(0, snap_length=0, link_type=LinkType.ETHERNET)
    chance = random.Random(1)
    packets = [
        CapturedPacket(
            tap=one,
            time_ns=BASE + number,
            data=chance.randbytes(size),
            original_length=size,
            direction=Direction.IN,
        )
        for number, size in enumerate([90] * 9000 + [65_000] * 30 + [200_000, 90, 91])
    ]
    chunk = Chunk(batches=(batch_from_blocks(one, *blocks(packets, per_block=500)),))
    assert written(chunk) == b"".join(block(packet, 0) for packet in packets)
