"""Our lines beside tcpdump's own, for the same file."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest

from gketrace.capture.packets import CapturedPacket, Direction, LinkType, Tap
from gketrace.trace import NetnsKind, NetnsRef
from gketrace_cli.capture.batch import batch_from_packets
from gketrace_cli.capture.files import FileSink
from gketrace_cli.capture.lines import Lines, LineStyle, TimeStyle
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.reader import CaptureReader
from gketrace_cli.capture.running import Outcome
from tests.core.capture import frames

A, B = "10.0.0.1", "10.0.0.2"
A6, B6 = "fd00::1", "fd00::2"
START = 1_700_000_000_123_456_789
TAP = Tap(
    node="n1", netns=NetnsRef(node="n1"), interface="eth0", link_type=LinkType.ETHERNET, ifindex=2
)
SYN = frames.SYN_OPTIONS


def _connection() -> list[bytes]:
    there: dict[str, int] = {}

    def out(**fields: object) -> bytes:
        return frames.ethernet(frames.tcp(A, 40000, B, 80, **fields, **there))  # type: ignore[arg-type]

    def back(**fields: object) -> bytes:
        return frames.ethernet(frames.tcp(B, 80, A, 40000, **fields, **there))  # type: ignore[arg-type]

    get = b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n"
    sack = bytes.fromhex("0101050a") + struct.pack("!II", 5031, 5040)
    return [
        out(flags=2, seq=1000, options=SYN),
        back(flags=0x12, seq=5000, ack=1001, options=SYN),
        out(flags=0x10, seq=1001, ack=5001, options=frames.TIMESTAMP),
        out(flags=0x18, seq=1001, ack=5001, options=frames.TIMESTAMP, payload=get),
        back(flags=0x18, seq=5001, ack=1030, payload=b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"),
        back(flags=0x18, seq=5031, ack=1030, payload=b"the\nbody\xff"),
        out(flags=0x10, seq=1030, ack=5001, options=sack),
        out(flags=0x11, seq=1030, ack=5040),
        back(flags=0x14, seq=5040, ack=1031),
        frames.ethernet(frames.tcp(B, 9, A, 40000, flags=4, seq=7)),
        frames.ethernet(frames.tcp(B, 9, A, 40000, flags=0x1FF, seq=7, ack=8, urgent=5)),
        frames.ethernet(
            frames.tcp(A, 4, B, 81, flags=0x18, seq=1, ack=1, payload=b"z"), vlans=(0x2064,)
        ),
        frames.ethernet(frames.tcp(A6, 40000, B6, 80, flags=2, seq=5, options=SYN, tos=0x20)),
    ]


def _others() -> list[bytes]:
    init = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65535, 10, 10, 1)
    fragment = struct.pack("!BBHI", 17, 0, 1000, 77)
    return [
        *map(
            frames.ethernet,
            (
                frames.udp(A, 1234, B, 9999, b"hello", identity=77, tos=0x10),
                frames.udp(A, 1234, B, 9999, b"x" * 1472, flags=1, identity=78),
                frames.ip(A, B, 17, b"x" * 528, flags=0, offset=1480, identity=78),
                frames.udp(A6, 4, B6, 5, b"abc"),
                frames.icmp(A, B, 8, 0, 9 << 16 | 3, b"p" * 56),
                frames.icmp(B, A, 0, 0, 9 << 16 | 3, b"p" * 56),
                frames.icmp(A6, B6, 128, 0, 9 << 16 | 3, b"p" * 56),
                frames.icmp(A6, B6, 129, 0, 9 << 16 | 3, b"p" * 56),
                frames.icmp(A6, "ff02::2", 133, 0, 0, b""),
                frames.icmp(A6, B6, 135, 0, 0, ip_address(B6).packed),
                frames.icmp(B6, A6, 136, 0, 0x60000000, ip_address(B6).packed),
                frames.ip(A6, B6, 44, b"x" * 500, extensions=fragment),
                frames.ip(A, B, 99, b"x" * 8),
                frames.ip(A, B, 6, frames.tcp(A, 4, B, 5, flags=2)[20:], options=b"\x94\x04\0\0"),
            ),
        ),
        frames.arp(1, A, B),
        frames.arp(2, A, B),
        frames.ethernet(frames.ip(A, B, 132, struct.pack("!HHII", 5, 6, 0, 0) + init)),
    ]


def _errors() -> list[bytes]:
    syn = frames.tcp(A, 40000, B, 80, flags=2, seq=1000)
    udp, udp6 = frames.udp(A, 5, B, 53, b"x"), frames.udp(A6, 4, B6, 53, b"abc")
    kinds = [(3, code, 1400 if code == 4 else 0) for code in range(16)]
    kinds += [(11, 0, 0), (11, 1, 0), (5, 1, 0x0A000001), (12, 0, 0)]
    made = [frames.icmp(B, A, kind, code, rest, syn) for kind, code, rest in kinds]
    made += [frames.icmp(B, A, 3, 3, 0, udp), frames.icmp(B, A, 3, 3, 0, syn[:28])]
    made += [frames.icmp(B6, A6, 1, code, 0, udp6) for code in range(5)]
    made += [frames.icmp(B6, A6, 2, 0, 1280, udp6), frames.icmp(B6, A6, 3, 0, 0, udp6)]
    made += [frames.icmp(B6, A6, 3, 1, 0, udp6), frames.icmp(B6, A6, 4, 1, 40, udp6)]
    return [frames.ethernet(packet) for packet in made]


def packets(data: list[bytes], snap: int = 262144) -> list[CapturedPacket]:
    return [
        CapturedPacket(
            tap=TAP,
            time_ns=START + number * 1_234_567,
            data=frame[:snap],
            original_length=len(frame),
            direction=Direction.IN,
        )
        for number, frame in enumerate(data)
    ]


@pytest.fixture
def tcpdump(tmp_path: Path) -> Callable[..., str]:
    def run(data: list[bytes], *options: str, snap: int = 262144) -> str:
        file = tmp_path / "file.pcap"
        times = [START + number * 1_234_567 for number in range(len(data))]
        file.write_bytes(frames.pcap(list(zip(times, data, strict=True)), snap=snap))
        done = subprocess.run(
            ["tcpdump", "-nr", str(file), *options],
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
            check=True,
        )
        return done.stdout.decode("latin-1")

    return run


def ours(data: list[bytes], style: LineStyle, snap: int = 262144) -> str:
    lines = Lines(style, place=False)
    return "".join(f"{lines.text(packet)}\n" for packet in packets(data, snap))


@pytest.mark.parametrize("kind", [_connection, _others, _errors])
@pytest.mark.parametrize(
    ("options", "style"),
    [
        ((), LineStyle(numeric=True)),
        (("-e",), LineStyle(numeric=True, link=True)),
        (("-S", "-tt"), LineStyle(numeric=True, absolute=True, time=TimeStyle.EPOCH)),
    ],
)
def test_lines_are_tcpdumps(
    tcpdump: Callable[..., str],
    kind: Callable[[], list[bytes]],
    options: tuple[str, ...],
    style: LineStyle,
) -> None:
    assert _same_sctp(ours(kind(), style)) == _same_sctp(tcpdump(kind(), *options))


def _same_sctp(text: str) -> str:
    """What tcpdump decodes of SCTP's chunks beyond their names is not ours."""
    return "".join(
        f"{line.partition('] [')[0].rstrip(']')}\n" if "sctp" in line else f"{line}\n"
        for line in text.splitlines()
    )


@pytest.mark.parametrize("style", ["t", "tt", "ttt", "tttt", "ttttt"])
def test_times(tcpdump: Callable[..., str], style: str) -> None:
    data = _connection()[:4]
    written = ours(data, LineStyle(numeric=True, time=TimeStyle(style)))
    assert written == tcpdump(data, f"-{style}")


@pytest.mark.parametrize(
    ("option", "style"),
    [
        ("-x", LineStyle(numeric=True, hex=1)),
        ("-xx", LineStyle(numeric=True, hex=2)),
        ("-X", LineStyle(numeric=True, hex_ascii=1)),
        ("-XX", LineStyle(numeric=True, hex_ascii=2)),
    ],
)
def test_bytes_in_hexadecimal(tcpdump: Callable[..., str], option: str, style: LineStyle) -> None:
    data = _connection()
    assert ours(data, style) == tcpdump(data, option)


def test_text(tcpdump: Callable[..., str]) -> None:
    data = _connection()[3:4]
    written = ours(data, LineStyle(numeric=True, ascii=True))
    assert written.strip() == tcpdump(data, "-A").strip()


def test_verbose(tcpdump: Callable[..., str]) -> None:
    data = [*_connection()[:3], *_connection()[6:], *_others()[:4], *_others()[14:16]]
    assert ours(data, LineStyle(numeric=True, verbose=1)) == tcpdump(data, "-v")


def test_headers_only(tcpdump: Callable[..., str]) -> None:
    data = [frame for frame in _connection() if len(frame) > 60]
    assert ours(data, LineStyle(numeric=True), snap=96) == tcpdump(data, snap=96)
    cut = [frame for frame in _connection() if frame[12:14] == b"\x08\0"][:1]
    for snap in (10, 30, 40):
        assert ours(cut, LineStyle(numeric=True), snap=snap) == tcpdump(cut, snap=snap)
    assert "[|tcp]" in ours(cut, LineStyle(numeric=True), snap=60)


def test_node_interface_and_pod_are_named() -> None:
    pod = Tap(
        node="n1",
        netns=NetnsRef(node="n1", kind=NetnsKind.POD, pod="shop/web-0"),
        interface="eth0",
        link_type=LinkType.ETHERNET,
        ifindex=2,
    )
    lines = Lines(
        LineStyle(time=TimeStyle.NONE),
        names={ip_address(B): "web-0"},
        short={"n1": "2jdh"}.__getitem__,
    )
    lines.reserve(TAP, pod)
    first, second = packets(_connection()[:2])
    inside = CapturedPacket(
        tap=pod,
        time_ns=1,
        data=second.data,
        original_length=second.original_length,
        direction=Direction.OUT,
    )
    assert [lines.text(first), lines.text(inside)] == [
        "2jdh eth0       In  IP 10.0.0.1.40000 > 10.0.0.2.80(web-0): Flags [S], seq 1000, "
        "win 64240, options [mss 1460,sackOK,TS val 1 ecr 0,nop,wscale 7], length 0",
        "2jdh web-0:eth0 Out IP 10.0.0.2.80(web-0) > 10.0.0.1.40000: Flags [S.], seq 5000, "
        "ack 1001, win 64240, options [mss 1460,sackOK,TS val 1 ecr 0,nop,wscale 7], length 0",
    ]


def test_any_names_the_interface_that_a_packet_passed(tmp_path: Path) -> None:
    """Live, and read back; one that came later has no name."""
    tap = Tap(
        node="n1",
        netns=NetnsRef(node="n1"),
        interface="any",
        link_type=LinkType.LINUX_SLL2,
        interfaces={2: "eth0", 7: "cbr0"},
    )
    ip = next(frame for frame in _connection() if frame[12:14] == b"\x08\0")[14:]
    heads = [struct.pack(">HHIHBB8x", 0x0800, 0, index, 1, 0, 6) for index in (7, 2, 9)]
    made = [
        CapturedPacket(
            tap=tap,
            time_ns=number,
            data=head + ip,
            original_length=len(head + ip),
            direction=Direction.IN,
        )
        for number, head in enumerate(heads)
    ]
    sink = FileSink(str(tmp_path / "any.pcapng"))
    sink.write(Chunk(batches=(batch_from_packets(tap, made),)))
    sink.finish(Outcome())
    with closing(CaptureReader(str(tmp_path / "any.pcapng"))) as reader:
        again = list(reader)
    for found in (made, again):
        lines = Lines(LineStyle(numeric=True, time=TimeStyle.NONE))
        assert [lines.text(one).split(" IP ")[0] for one in found] == [
            "n1 cbr0 In ",
            "n1 eth0 In ",
            "n1 any  In ",
        ]


def test_sequence_numbers_are_relative_at_each_tap() -> None:
    """NAT rewrites ports, not sequence numbers: but another tap may have begun later."""
    elsewhere = Tap(node="n2", netns=NetnsRef(node="n2"), interface="eth0", link_type=1)
    lines = Lines(LineStyle(numeric=True))
    for packet in packets(_connection()[:3]):
        lines.text(packet)
    ack = packets(_connection()[:3])[2]
    late = CapturedPacket(tap=elsewhere, time_ns=1, data=ack.data, original_length=66)
    assert "ack 5001" in lines.text(late)
    assert "ack 1," in lines.text(ack)
