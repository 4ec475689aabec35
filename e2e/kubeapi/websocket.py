"""RFC 6455, the server's side, without any I/O: bytes in, messages out, and the reverse."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["BINARY", "CLOSE", "PING", "PONG", "TEXT", "Decoder", "ProtocolError", "accept", "frame"]

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MAX_MESSAGE = 32 << 20


class ProtocolError(Exception):
    """The peer broke the protocol; ``code`` is the close code to answer with."""

    def __init__(self, why: str, code: int = 1002) -> None:
        super().__init__(why)
        self.code = code


def accept(key: str) -> str:
    """The Sec-WebSocket-Accept value for a Sec-WebSocket-Key."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()


def frame(opcode: int, *parts: bytes) -> bytes:
    """One final, unmasked frame."""
    size = sum(map(len, parts))
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 127, size)
    return b"".join((head, *parts))


def _unmask(payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    repeated = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload) ^ int.from_bytes(repeated)).to_bytes(size)


@dataclass(slots=True)
class Decoder:
    """Puts messages together from the client's frames, fragments joined."""

    _buffer: bytearray = field(default_factory=bytearray)
    _fragments: list[bytes] = field(default_factory=list)
    _opcode: int = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (opcode, payload) of each message that ``data`` completes.

        Raises: ProtocolError.
        """
        self._buffer += data
        while (got := self._next_frame()) is not None:
            final, opcode, payload = got
            if opcode in (CLOSE, PING, PONG):
                if not final or len(payload) > 125:
                    raise ProtocolError("fragmented or oversized control frame")
                yield opcode, payload
                continue
            if (opcode == _CONTINUATION) != bool(self._fragments):
                raise ProtocolError("continuation frame out of place")
            if opcode not in (_CONTINUATION, TEXT, BINARY):
                raise ProtocolError(f"unknown opcode {opcode}")
            if opcode != _CONTINUATION:
                self._opcode = opcode
            self._fragments.append(payload)
            if sum(map(len, self._fragments)) > MAX_MESSAGE:
                raise ProtocolError("message too big", 1009)
            if final:
                message = b"".join(self._fragments)
                self._fragments.clear()
                yield self._opcode, message

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        first, second = buffer[0], buffer[1]
        if first & 0x70:
            raise ProtocolError("reserved bits set without an extension")
        if not second & 0x80:
            raise ProtocolError("client frame is not masked")
        size, offset = second & 0x7F, 2
        if size >= 126:
            width = 2 if size == 126 else 8
            if len(buffer) < offset + width:
                return None
            size = int.from_bytes(buffer[offset : offset + width])
            offset += width
        if size > MAX_MESSAGE:
            raise ProtocolError("message too big", 1009)
        if len(buffer) < offset + 4 + size:
            return None
        mask = bytes(buffer[offset : offset + 4])
        payload = _unmask(bytes(buffer[offset + 4 : offset + 4 + size]), mask)
        del buffer[: offset + 4 + size]
        return bool(first & 0x80), first & 0x0F, payload
