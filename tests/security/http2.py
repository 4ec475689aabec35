"""HTTP/2 frames by hand (RFC 9113), right ones and wrong ones: no library would send the latter."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["MALFORMED", "PREFACE", "SETTINGS", "data", "frame", "headers", "message", "request"]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RESET, _SETTINGS, _PUSH, _PING, _AWAY, _WINDOW, _MORE = range(10)
_END_STREAM, _END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, body: bytes, length: int = -1) -> bytes:
    """`length`: what the frame says, if it is to lie."""
    size = len(body) if length < 0 else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + body


SETTINGS: Final = frame(_SETTINGS, 0, 0, b"")


def _text(text: bytes) -> bytes:
    """A string literal of HPACK, not Huffman-coded (RFC 7541, 5.2)."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, found = len(text) - 127, bytearray([127])
    while rest >= 128:
        found.append(rest % 128 + 128)
        rest //= 128
    found.append(rest)
    return bytes(found) + text


def headers(
    stream: int, fields: Sequence[tuple[str, str]], *, ends: bool = False, whole: bool = True
) -> bytes:
    """A HEADERS frame; not `whole`: CONTINUATION frames must follow."""
    block = b"".join(b"\0" + _text(k.encode()) + _text(v.encode()) for k, v in fields)
    return frame(_HEADERS, _END_HEADERS * whole | _END_STREAM * ends, stream, block)


def data(stream: int, body: bytes, *, ends: bool = False) -> bytes:
    return frame(_DATA, _END_STREAM * ends, stream, body)


def message(body: bytes, *, compressed: int = 0, length: int = -1) -> bytes:
    """gRPC's framing of one message; `length`: what it says, if it is to lie."""
    return struct.pack(">BI", compressed, len(body) if length < 0 else length) + body


def request(stream: int, method: str, *more: tuple[str, str]) -> bytes:
    """The headers of a call of the agent."""
    fields = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", method if method.startswith("/") else f"/gketrace.v1alpha1.Agent/{method}"),
        (":authority", "agent"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    return headers(stream, [*fields, *more])


def _noise(rng: random.Random, token: tuple[str, str]) -> bytes:
    return rng.randbytes(rng.randint(1, 4000))


def _noise_in_frames(rng: random.Random, token: tuple[str, str]) -> bytes:
    return b"".join(
        frame(
            rng.randrange(12),
            rng.randrange(256),
            rng.choice((0, 1, 2, 3, 1 << 30)),
            rng.randbytes(rng.choice((0, 1, 4, 8, 100, 16_000))),
        )
        for _ in range(rng.randint(1, 20))
    )


def _no_message(rng: random.Random, token: tuple[str, str]) -> bytes:
    """Whole by gRPC's framing; no message of the call's type."""
    body = message(rng.randbytes(rng.randint(1, 2000)))
    return request(1, rng.choice(_METHODS), token) + data(1, body, ends=True)


def _huge(rng: random.Random, token: tuple[str, str]) -> bytes:
    """It says four gigabytes and sends some."""
    begins = message(b"\0" * 16_000, length=(1 << 32) - 1)
    return request(1, "ResolvePod", token) + data(1, begins) + data(1, b"\0" * 16_000)


def _compressed(rng: random.Random, token: tuple[str, str]) -> bytes:
    """It says that it is compressed, and is not, or by nobody knows what."""
    how = ("grpc-encoding", rng.choice(("gzip", "deflate", "zstd", "x" * 100)))
    body = message(rng.randbytes(500), compressed=rng.choice((1, 2, 255)))
    return request(1, "GetNetns", token, how) + data(1, body, ends=True)


def _cut(rng: random.Random, token: tuple[str, str]) -> bytes:
    """The stream ends in the middle of a message."""
    return request(1, "Walk", token) + data(1, message(b"\0" * 50, length=5000), ends=True)


def _many_messages(rng: random.Random, token: tuple[str, str]) -> bytes:
    """To calls that take one."""
    return request(1, "GetInfo", token) + data(1, message(b"") * 2000, ends=True)


def _long_headers(rng: random.Random, token: tuple[str, str]) -> bytes:
    more = [(f"x-{n}", "y" * 1000) for n in range(14)]
    return b"".join(request(2 * n + 1, "GetInfo", *more) for n in range(20))


def _endless_headers(rng: random.Random, token: tuple[str, str]) -> bytes:
    """CONTINUATION without an end (CVE-2024-27316 and its like)."""
    more = b"\0" + _text(b"x-more") + _text(b"y" * 100)
    return headers(1, [(":method", "POST")], whole=False) + frame(_MORE, 0, 1, more) * 200


def _resets(rng: random.Random, token: tuple[str, str]) -> bytes:
    """Calls that are taken back at once (CVE-2023-44487)."""
    cancel = struct.pack(">I", 8)
    return b"".join(
        request(stream, "Walk", token) + frame(_RESET, 0, stream, cancel)
        for stream in range(1, 400, 2)
    )


def _pings(rng: random.Random, token: tuple[str, str]) -> bytes:
    return frame(_PING, 0, 0, b"12345678") * 1000


def _settings(rng: random.Random, token: tuple[str, str]) -> bytes:
    values = b"".join(
        struct.pack(">HI", rng.randrange(10), rng.getrandbits(32)) for _ in range(100)
    )
    return frame(_SETTINGS, 0, 0, values) + SETTINGS * 500


def _windows(rng: random.Random, token: tuple[str, str]) -> bytes:
    most = struct.pack(">I", (1 << 31) - 1)
    return request(1, "Snapshot", token) + frame(_WINDOW, 0, 1, most) * 3


def _wrong_headers(rng: random.Random, token: tuple[str, str]) -> bytes:
    """No method, a path of noise, control characters."""
    path = "".join(chr(rng.randrange(1, 128)) for _ in range(rng.randint(0, 200)))
    fields = [(":path", path), (":method", rng.choice(("GET", "PUT", "")))]
    rng.shuffle(fields)
    return headers(1, fields, ends=True) + frame(_HEADERS, 5, 3, rng.randbytes(200))


_METHODS: Final = ("GetInfo", "ResolvePod", "GetNetns", "Walk", "Capture", "ListConntrack", "None")
MALFORMED: Final[tuple[Callable[[random.Random, tuple[str, str]], bytes], ...]] = (
    _noise,
    _noise_in_frames,
    _no_message,
    _huge,
    _compressed,
    _cut,
    _many_messages,
    _long_headers,
    _endless_headers,
    _resets,
    _pings,
    _settings,
    _windows,
    _wrong_headers,
)
"""Each gives what is sent after the preface; the header is the token's."""
