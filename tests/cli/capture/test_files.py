"""Capture files: what is written is what every reader reads; chunks are in order."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import warnings
from collections.abc import Iterable
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pcapng
import pytest

from gketrace.capture import ring
from gketrace.capture.packets import CapturedPacket, Direction, LinkType, PacketFlag, Tap
from gketrace.errors import GketraceError, UsageError
from gketrace.trace import NetnsKind, NetnsRef
from gketrace_cli.capture.batch import PacketBatch, batch_from_blocks, batch_from_packets
from gketrace_cli.capture.files import FileSink
from gketrace_cli.capture.merge import Chunk, Merge
from gketrace_cli.capture.offline import OfflineFilter
from gketrace_cli.capture.pcapng import PcapngWriter
from gketrace_cli.capture.reader import CaptureReader
from gketrace_cli.capture.running import Outcome, TapOutcome
from gketrace_cli.capture.stream import Batch, Started, Statistics, TapsEnded, TapStatistics
from gketrace_cli.capture.wire import RawPackets, parse_reply
from gketrace_cli.main import run
from gketrace_proto.v1alpha1 import capture_pb2 as pb

BASE = 1_700_000_000_000_000_000
IP = bytes.fromhex("45000020000100004011000064000001640000021234003500080000")
MACS = bytes.fromhex("020000000002020000000001")


def tap(index: int = 0, node: str = "n1", **more: Any) -> Tap:
    return Tap(
        **{
            "node": node,
            "netns": NetnsRef(node=node, kind=NetnsKind.POD, inode=7, pod="shop/web-0"),
            "interface": "eth0",
            "link_type": LinkType.ETHERNET,
            "ifindex": 3,
            "mtu": 1500,
            "snap_length": 128,
            "hardware": "02:00:00:00:00:01",
            "filter": "udp",
            "excluded": (("host 169.254.169.254", "the metadata server"),),
            "index": index,
            "description": "hop 1 in",
            **more,
        }
    )


def packet(tap: Tap, time: int, size: int = 44, **more: Any) -> CapturedPacket:
    data = (MACS + b"\x08\x00" + IP + bytes(range(256)) * 12)[:size]
    return CapturedPacket(
        **{
            "tap": tap,
            "time_ns": BASE + time,
            "data": data,
            "original_length": size + 5,
            "direction": Direction.IN,
            **more,
        }
    )


def blocks(
    packets: list[CapturedPacket], *, per_block: int = 3, kind: int = 0
) -> tuple[memoryview, tuple[int, ...], tuple[int, ...]]:
    """As the kernel writes them."""
    data, counts, lengths = bytearray(), [], []
    for start in range(0, len(packets), per_block):
        some = packets[start : start + per_block]
        begin = len(data)
        for number, one in enumerate(some):
            body = one.data
            size = (82 + len(body) + 7) // 8 * 8
            status = 1 | (int(ring.Status.VLAN_VALID) if one.vlan is not None else 0)
            status |= int(ring.Status.VLAN_TPID_VALID) if one.vlan is not None else 0
            head = struct.pack(
                "<6I2HII2H8x",
                size if number + 1 < len(some) else 0,
                one.time_ns // 10**9,
                one.time_ns % 10**9,
                len(body),
                one.original_length,
                status,
                *(82, 96, 0, one.vlan or 0, 0x88A8 if one.vlan is not None else 0, 0),
            )
            head += struct.pack("<HHiHBB8s", 17, 0x0008, one.tap.ifindex or 9, 1, kind, 6, MACS)
            data += (head.ljust(82, b"\0") + body).ljust(size, b"\0")
        counts.append(len(some))
        lengths.append(len(data) - begin)
    return memoryview(bytes(data)), tuple(counts), tuple(lengths)


def from_ring(packets: list[CapturedPacket], **more: Any) -> PacketBatch:
    return batch_from_blocks(packets[0].tap, *blocks(packets, **more))


def write(path: Path, chunks: Iterable[Chunk], **more: Any) -> str:
    sink = FileSink(str(path), **more)
    outcome = Outcome()
    for chunk in chunks:
        for batch in chunk.batches:
            numbers = TapStatistics(received=50, dropped=3, packets=47)
            outcome.taps[batch.tap] = TapOutcome(
                statistics=numbers, started_ns=BASE, ended_ns=BASE + 10**9
            )
        sink.write(chunk)
    sink.finish(outcome)
    return str(path)


def read(path: str) -> list[CapturedPacket]:
    with closing(CaptureReader(path)) as reader:
        return list(reader)


def seen(packets: Iterable[CapturedPacket]) -> list[tuple[Any, ...]]:
    return [(p.tap, p.time_ns, p.data, p.original_length, p.direction, p.comment) for p in packets]


def tshark(path: str, *fields: str) -> list[list[str]]:
    words = [word for field in fields for word in ("-e", field)]
    done = subprocess.run(
        ["tshark", "-r", path, "-T", "fields", "-E", "separator=|", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split("|") for line in done.stdout.splitlines()]


def test_all_readers_read_it(tmp_path: Path) -> None:
    one, two = tap(), tap(1, "n2", interface="any", link_type=LinkType.RAW, ifindex=0)
    sizes = (14, 15, 31, 32, 33, 60, 61, 62, 63, 64, 97, 128)
    first = [packet(one, 1000 * n, size) for n, size in enumerate(sizes)]
    second = [
        packet(
            two,
            1000 * n + 500,
            size,
            data=(IP + b"y" * 3000)[:size],
            direction=Direction.OUT,
            comment=f"hop 2: DNAT to 10.0.0.{n % 2} ✓",
        )
        for n, size in enumerate((28, 29, 2047, 2049, 100))
    ]
    batches = (from_ring(first, kind=2), batch_from_packets(two, second))
    order = np.argsort(np.concatenate([batch.times for batch in batches]), kind="stable")
    names = {ip_address("100.0.0.1"): ("pod/shop/web-0",), ip_address("fd00::1"): ("a", "b")}
    path = write(
        tmp_path / "cap.pcapng",
        [Chunk(batches=batches, order=order)],
        names=names,
        comments=lambda: ["clocks: within 5 µs"],
    )
    wanted = sorted([*first, *second], key=lambda p: p.time_ns)

    with closing(CaptureReader(path)) as reader:
        mine = list(reader)
    assert [(p.time_ns, p.data, p.original_length, p.direction, p.comment) for p in mine] == [
        (p.time_ns, p.data, p.original_length, p.direction, p.comment) for p in wanted
    ]
    assert (mine[0].tap.node, mine[0].tap.pod, mine[0].tap.mtu) == ("n1", "shop/web-0", 1500)
    assert mine[0].flags is PacketFlag.MULTICAST
    assert reader.comments == ["clocks: within 5 µs"]
    assert reader.names == {address: list(texts) for address, texts in names.items()}
    assert {n.dropped for n in reader.statistics.values()} == {3}

    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of that reader about itself
        others = [block for block in pcapng.FileScanner(file) if hasattr(block, "packet_data")]
    assert [block.packet_data for block in others] == [p.data for p in wanted]
    assert [block.packet_len for block in others] == [p.original_length for p in wanted]
    assert {block.interface.options["if_name"] for block in others} == {
        "shop/web-0:eth0",
        "shop/web-0:any",
    }

    rows = tshark(
        path, "frame.time_epoch", "frame.len", "frame.cap_len", "frame.interface_name",
        "frame.comment",
    )  # fmt: skip
    assert [(row[0], int(row[1]), int(row[2])) for row in rows] == [
        (f"{p.time_ns // 10**9}.{p.time_ns % 10**9:09}", p.original_length, len(p.data))
        for p in wanted
    ]
    assert [row[4] for row in rows] == [p.comment for p in wanted]
    resolved = subprocess.run(
        ["tshark", "-r", path, "-N", "n", "-c", "20"], capture_output=True, text=True, check=True
    )
    assert "pod/shop/web-0" in resolved.stdout


def test_tcpdump_reads_one_link_type(tmp_path: Path) -> None:
    one = tap()
    packets = [packet(one, n, 60) for n in range(5)]
    path = write(tmp_path / "cap.pcapng", [Chunk(batches=(from_ring(packets),))])
    done = subprocess.run(
        ["tcpdump", "-n", "-tt", "--nano", "-r", path], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        f"1700000000.{n:09}" for n in range(5)
    ]


def test_vlan_tags_are_put_back(tmp_path: Path) -> None:
    one = tap(snap_length=60)
    packets = [packet(one, 0, 60, vlan=0x2005), packet(one, 1, 60), packet(one, 2, 8, vlan=3)]
    batch = from_ring(packets)
    first, second, third = batch.packets()
    assert first.data == (MACS + bytes.fromhex("88a82005") + packets[0].data[12:])[:60]
    assert first.original_length == packets[0].original_length + 4
    assert (first.vlan, second.vlan, third.vlan) == (0x2005, None, 3)
    assert second.data == packets[1].data
    assert third.data == packets[2].data
    rows = tshark(write(tmp_path / "v.pcapng", [Chunk(batches=(batch,))]), "ieee8021ad.id")
    assert rows == [["5"], [""], [""]]


def test_headers_that_look_alike_are_told_apart() -> None:
    """A packet that holds what a header begins with does not mislead."""
    one = tap()
    decoy = struct.pack("<HHi", 17, 0x0008, one.ifindex)
    sizes = (44, 80, 100, 60)
    packets = [
        packet(one, n, size, data=(b"z" * 6 + decoy * 20)[:size]) for n, size in enumerate(sizes)
    ]
    assert [p.data for p in from_ring(packets).packets()] == [p.data for p in packets]
    data, counts, lengths = blocks(packets)
    broken = bytearray(data)
    broken[0:4] = struct.pack("<I", 24)
    with pytest.raises(GketraceError, match="not where their headers say"):
        batch_from_blocks(one, memoryview(bytes(broken)), counts, lengths)
    with pytest.raises(GketraceError, match="do not agree"):
        batch_from_blocks(one, data, counts, (8, *lengths[1:]))
    with pytest.raises(GketraceError, match="not where their headers say"):
        batch_from_blocks(one, data[:56], (1,), (56,))  # the last header is cut
    assert len(batch_from_blocks(one, data[:0], (), ())) == 0
    long = bytearray(data)
    long[-lengths[-1] + 12 : -lengths[-1] + 16] = struct.pack("<I", 5000)  # tp_snaplen
    with pytest.raises(GketraceError, match="not where their headers say"):
        batch_from_blocks(one, memoryview(bytes(long)), counts, lengths)


def test_what_is_larger_than_the_mtu_was_merged() -> None:
    one = tap()
    flags = [
        p.flags
        for p in from_ring(
            [packet(one, 0, original_length=1514), packet(one, 1, original_length=1515)]
        ).packets()
    ]
    assert flags == [PacketFlag.NONE, PacketFlag.MERGED]


def started(node: str, *taps: Tap) -> Started:
    return Started(
        node=node, taps=taps, reply=pb.CaptureStarted(latency_seconds=0.1), received_ns=0
    )


def statistics(node: str, time: int, *taps: Tap) -> Statistics:
    return Statistics(
        node=node,
        taps=dict.fromkeys(taps, TapStatistics()),
        wall_ns=BASE + time,
        monotonic_ns=0,
        received_ns=0,
    )


def merged(merge: Merge, *events: Any) -> list[int]:
    """Times that are handed on."""
    return [
        p.time_ns - BASE for event in events for chunk in merge.feed(event) for p in chunk.packets()
    ]


def batch(tap: Tap, *times: int) -> Batch:
    return Batch(node=tap.node, batch=from_ring([packet(tap, time) for time in times]))


MS = 1_000_000


@pytest.mark.parametrize("sizes", [(44, 97, 128, 60), (14, 600, 33), (44, 3000, 512, 511), (128,)])
def test_data_of_any_size_is_where_it_belongs(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """In the order of the buffer, in another order, and of several batches in turn."""
    one, other = tap(snap_length=0), tap(1, "n2", snap_length=0)
    wanted = [packet(one, time, sizes[time % len(sizes)] - time % 3) for time in range(2500)]
    parts = [batch_from_packets(one, wanted[:1300]), batch_from_packets(other, wanted[1300:])]
    backwards = np.arange(1299, -1, -1)
    alternating = np.argsort(np.r_[np.arange(1300) * 2, np.arange(1200) * 2 + 1])
    everything = [one.data for one in wanted]
    for chunk, data in (
        (Chunk(batches=tuple(parts)), everything),
        (Chunk(batches=(parts[0].take(backwards),)), everything[1299::-1]),
        (Chunk(batches=tuple(parts), order=alternating), [everything[row] for row in alternating]),
    ):
        with (tmp_path / "file").open("wb", buffering=0) as file:
            PcapngWriter(file.fileno()).write(chunk)
        raw = (tmp_path / "file").read_bytes()
        found, at = [], 0
        while at < len(raw):
            kind, length = struct.unpack_from("<II", raw, at)
            if kind == 6:
                (size,) = struct.unpack_from("<I", raw, at + 20)
                found.append(raw[at + 28 : at + 28 + size])
                assert raw[at + 28 + size : at + length - 16] == bytes(-size % 4)
            at += length
        assert found == data


def test_order_across_nodes() -> None:
    one, two = tap(), tap(0, "n2")
    merge = Merge(["n1", "n2"], {"n2": -5 * MS})
    assert merged(merge, started("n1", one), batch(one, 10 * MS, 40 * MS, 20 * MS)) == []
    assert merged(merge, started("n2", two), batch(two, 22 * MS, 41 * MS)) == [
        10 * MS, 17 * MS, 20 * MS,
    ]  # fmt: skip
    assert merged(merge, statistics("n2", 400 * MS, two), batch(one, 90 * MS)) == [36 * MS, 40 * MS]
    end = TapsEnded(node="n1", taps=(one,), reason="packets", text="")
    assert merged(merge, end) == [90 * MS]
    assert merge.late == 0
    assert merged(merge, batch(two, 60 * MS)) == [55 * MS]
    assert merge.late == 1


def test_parts_of_a_chunk() -> None:
    one, two = tap(), tap(1)
    batches = (batch(one, 1, 3, 5).batch, batch(two, 2, 4).batch)
    order = np.argsort(np.concatenate([b.times for b in batches]))
    chunk = Chunk(batches=batches, order=order)

    def times(some: Chunk) -> list[int]:
        return [p.time_ns - BASE for p in some.packets()]

    assert times(chunk) == [1, 2, 3, 4, 5]
    assert times(chunk.first(3)) == [1, 2, 3]
    assert times(chunk.first(9)) == [1, 2, 3, 4, 5]
    assert times(chunk.of(lambda tap: tap == two)) == [2, 4]
    assert len(chunk.first(0)) == 0


def test_a_file_for_each_node(tmp_path: Path) -> None:
    one, two = tap(), tap(0, "n2")
    chunk = Chunk(batches=(batch(one, 1).batch, batch(two, 2).batch), order=np.array([0, 1]))
    write(tmp_path / "cap.pcapng", [chunk], per_node=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cap.n1.pcapng", "cap.n2.pcapng"]
    assert [p.tap.node for p in read(str(tmp_path / "cap.n2.pcapng"))] == ["n2"]


def test_no_half_file_has_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cap.pcapng"
    sink = FileSink(str(path))
    sink.write(Chunk(batches=(batch(tap(), 1).batch,)))
    assert not path.exists()
    sink.abandon()
    assert not path.exists()
    assert "cap.pcapng.part has the 1 packets" in capsys.readouterr().err
    assert len(read(f"{path}.part")) == 1
    with pytest.raises(UsageError, match="cannot write"):
        FileSink(str(tmp_path / "no" / "cap"))
    with pytest.raises(UsageError, match="several files"):
        FileSink("-", per_node=True)


def test_a_link_stays_one(tmp_path: Path) -> None:
    """As tcpdump has it.  What is not whole is beside the file that it leads to."""
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "cap.pcapng", tmp_path / "link"
    (tmp_path / "near").symlink_to("there/cap.pcapng")
    link.symlink_to(tmp_path / "near")  # a link to a link to what is not there yet
    chunk = Chunk(batches=(batch(tap(), 1).batch,))
    for packets in (1, 2):
        sink = FileSink(str(link))
        for _ in range(packets):
            sink.write(chunk)
        assert (tmp_path / "there" / "cap.pcapng.part").exists()
        sink.finish(Outcome(taps={}))
        assert (link.is_symlink(), target.is_symlink()) == (True, False)
        assert len(read(str(target))) == packets
    assert [one.name for one in (tmp_path / "there").iterdir()] == ["cap.pcapng"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="loop: Too many levels of symbolic links"):
        FileSink(str(tmp_path / "loop"))
    with open(target, "wb") as opened:
        write(Path(f"/dev/fd/{opened.fileno()}"), [chunk])
        assert len(read(str(target))) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_disk_and_a_closed_pipe(tmp_path: Path) -> None:
    with pytest.raises(GketraceError, match="cannot write /dev/full: No space left"):
        FileSink("/dev/full")
    sink = FileSink(str(tmp_path / "x.pcapng"))
    (tmp_path / "x.pcapng").mkdir()
    with pytest.raises(GketraceError, match=r"cannot write .*/x.pcapng: Is a directory"):
        sink.finish(Outcome(taps={}))
    assert (tmp_path / "x.pcapng.part").stat().st_size
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = FileSink(str(path))
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        sink.write(Chunk(batches=(batch(tap(), 1).batch,)))


def classic(order: str, magic: int, unit: int) -> bytes:
    head = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 128, 1)
    body = MACS + b"\x08\x00" + IP
    for n in range(3):
        head += struct.pack(f"{order}IIII", 1_700_000_000, (n + 1) * unit, len(body), 99) + body
    return head


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "unit"), [(0xA1B2C3D4, 1), (0xA1B23C4D, 1000)])
def test_classic_files(tmp_path: Path, order: str, magic: int, unit: int) -> None:
    path = tmp_path / "old.pcap"
    path.write_bytes(classic(order, magic, unit))
    packets = read(str(path))
    assert [p.time_ns - BASE for p in packets] == [1000, 2000, 3000]
    assert packets[0].original_length == 99
    matching = OfflineFilter(1, "udp port 53")
    assert all(map(matching.matches, packets))
    assert not OfflineFilter(1, "tcp").matches(packets[0])
    with pytest.raises(UsageError, match="syntax error"):
        OfflineFilter(1, "foo bar")


@pytest.mark.parametrize("length", [0, 8, 12, 14, 1 << 31])
def test_a_section_of_an_impossible_length(tmp_path: Path, length: int) -> None:
    """Its head alone has 16 bytes: fewer would be read as everything, or not at all."""
    head = struct.pack("<III", 0x0A0D0D0A, length, 0x1A2B3C4D)
    path = tmp_path / "x.pcapng"
    path.write_bytes(head + bytes(60))
    with closing(CaptureReader(str(path))) as reader, pytest.raises(GketraceError, match="damaged"):
        list(reader)


@pytest.mark.parametrize(
    ("resolution", "offset", "ticks"),
    [(0, 0, 1 << 40), (9, 1 << 40, 1), (9, -(1 << 40), 1), (6, (1 << 63) - 1, 0)],
    ids=["whole-seconds", "later", "before", "most"],
)
def test_a_time_that_no_clock_has(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    resolution: int,
    offset: int,
    ticks: int,
) -> None:
    options = struct.pack("<HHB3xHHq", 9, 1, resolution, 14, 8, offset)
    interface = struct.pack("<HHI", 1, 0, 0) + options
    packet = struct.pack("<IIIII", 0, ticks >> 32, ticks & 0xFFFFFFFF, 0, 0)
    written = struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    for kind, body in ((1, interface), (6, packet)):
        size = len(body) + 12
        written += struct.pack("<II", kind, size) + body + struct.pack("<I", size)
    path = tmp_path / "x.pcapng"
    path.write_bytes(written)
    assert run(["capture", "-r", str(path)]) == 3
    assert "is damaged after 0 packets" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_further(capsys: pytest.CaptureFixture[str]) -> None:
    """As on a disk that fails; the kernel gives EIO for address 0."""
    assert run(["capture", "-r", "/proc/self/mem"]) == 3
    said = "cannot read /proc/self/mem after 0 packets: Input/output error"
    assert said in capsys.readouterr().err


def test_interfaces_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gketrace_cli.capture.reader._KEPT", 100 << 10)
    section = struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    path = tmp_path / "x.pcapng"
    path.write_bytes(section + struct.pack("<IIHHII", 1, 20, 1, 0, 0, 20) * 200)
    with closing(CaptureReader(str(path))) as reader:
        with pytest.raises(GketraceError, match="that are not packets"):
            list(reader)
        assert len(reader.taps) < 100


@pytest.mark.parametrize(
    "told",
    ["[" * 20_000, "[]", "7", "{", '{"netns": "mars"}', '{"inode": "x"}', '{"inode": {}}'],
    ids=["deep", "array", "number", "cut", "netns", "inode", "inode-object"],
)
def test_a_taps_comment_that_somebody_else_wrote(tmp_path: Path, told: str) -> None:
    comment = f"gketrace-tap: {told}".encode()
    option = struct.pack("<HH", 1, len(comment)) + comment + bytes(-len(comment) % 4)
    body = struct.pack("<HHI", 1, 0, 0) + option
    size = len(body) + 12
    section = struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    path = tmp_path / "x.pcapng"
    path.write_bytes(section + struct.pack("<II", 1, size) + body + struct.pack("<I", size))
    with closing(CaptureReader(str(path))) as reader, pytest.raises(GketraceError, match="damaged"):
        list(reader)


def test_reading_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tap()
    packets = [packet(one, n, 60) for n in range(4)]
    path = write(tmp_path / "cap.pcapng", [Chunk(batches=(from_ring(packets),))])
    assert run(["capture", "-r", path, "-c", "3", "-o", "jsonl", "udp"]) == 0
    out, err = capsys.readouterr()
    documents = [json.loads(line) for line in out.splitlines()]
    assert [one["kind"] for one in documents] == ["CapturedPacket"] * 3 + ["CaptureSummary"]
    assert documents[0]["timeNs"] == BASE
    assert documents[0]["pod"] == "shop/web-0"
    assert "link-type EN10MB (Ethernet)" in err
    copy = str(tmp_path / "copy.pcapng")
    assert run(["capture", "-r", path, "-w", copy]) == 0
    assert [(p.time_ns, p.data, p.direction) for p in read(copy)] == [
        (p.time_ns, p.data, p.direction) for p in packets
    ]
    assert run(["capture", "-r", path, "--numeric", "-t", "none"]) == 0
    assert "IP 100.0.0.1.4660 > 100.0.0.2.53:" in capsys.readouterr().out
    cut = tmp_path / "cut.pcapng"
    cut.write_bytes(Path(path).read_bytes()[:-200])
    assert run(["capture", "-r", str(cut)]) == 3
    assert "is cut off after" in capsys.readouterr().err
    (tmp_path / "text").write_text("hello, this is no capture")
    assert run(["capture", "-r", str(tmp_path / "text")]) == 2
    assert run(["capture", "-r", path, "pod/x"]) == 2


def test_messages_off_the_wire() -> None:
    message = pb.CaptureReply(
        packets=pb.CapturePackets(tap=3, counts=[1, 300], lengths=[80, 1 << 20], data=b"abc" * 99)
    )
    parsed = parse_reply(message.SerializeToString())
    assert isinstance(parsed, RawPackets)
    assert (parsed.tap, parsed.counts, parsed.lengths) == (3, (1, 300), (80, 1 << 20))
    assert bytes(parsed.data) == b"abc" * 99
    other = pb.CaptureReply(end=pb.CaptureEnd(taps=[1], text="x"))
    assert parse_reply(other.SerializeToString()) == other
    assert "not understood" in str(parse_reply(b"\x12\x03\x22\x7f\x00"))
