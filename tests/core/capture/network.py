"""A network that hands packets over taps, and knows the truth about each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gketrace.capture.packets import CapturedPacket, Direction, LinkType, Tap
from gketrace.trace import NetnsKind, NetnsRef
from tests.core.capture import frames

START = 1_700_000_000 * 10**9
IN, OUT = Direction.IN, Direction.OUT
MS, US = 10**6, 10**3
SYN, FIN, RST, PSH, ACK = 2, 1, 4, 8, 16

End = tuple[str, int]


def tap(node: str, interface: str, pod: str = "") -> Tap:
    kind = NetnsKind.POD if pod else NetnsKind.HOST
    return Tap(
        node=node,
        netns=NetnsRef(node=node, kind=kind, pod=pod),
        interface=interface,
        link_type=LinkType.ETHERNET,
        mtu=1500,
    )


ENTRY, INSIDE = "n33", "n2j"
POD = "default/hello"
TAPS = {
    "entry": tap(ENTRY, "eth0"),
    "node": tap(INSIDE, "eth0"),
    "bridge": tap(INSIDE, "cbr0"),
    "veth": tap(INSIDE, "veth1"),
    "pod": tap(INSIDE, "eth0", POD),
}


@dataclass(frozen=True)
class Place:
    """A tap on the client's way; the answers pass it the other way."""

    tap: Tap
    direction: Direction
    translated: bool
    """Behind the NAT."""
    hops: int
    """Routers before it, seen from the client."""
    hops_back: int
    """And from the server."""


NODE_PORT = (
    Place(TAPS["entry"], IN, False, 1, 2),
    Place(TAPS["entry"], OUT, True, 2, 1),
    Place(TAPS["node"], IN, True, 2, 1),
    Place(TAPS["bridge"], OUT, True, 3, 0),
    Place(TAPS["veth"], OUT, True, 3, 0),
    Place(TAPS["pod"], IN, True, 3, 0),
)


@dataclass
class Network:
    """Sends packets; `captured` is what the taps saw, `truth` which transmission each was."""

    places: tuple[Place, ...] = NODE_PORT
    skew: dict[str, int] = field(default_factory=dict)
    """Node → nanoseconds that its clock is ahead."""
    delay: int = 20 * US
    captured: list[CapturedPacket] = field(default_factory=list)
    truth: list[tuple[str, int]] = field(default_factory=list)
    """(connection, transmission) of each."""
    reach: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    """(connection, transmission) → the places that it passed."""
    sent: int = 0

    def __repr__(self) -> str:
        return f"Network(skew={self.skew}, delay={self.delay}, reach={self.reach})"

    def sorted(self) -> tuple[list[CapturedPacket], list[tuple[str, int]]]:
        order = sorted(range(len(self.captured)), key=lambda n: self.captured[n].time_ns)
        return [self.captured[n] for n in order], [self.truth[n] for n in order]

    def hand_over(
        self,
        name: str,
        time: int,
        segment: dict[str, object],
        outside: tuple[End, End],
        inside: tuple[End, End],
        *,
        back: bool = False,
        until: int | None = None,
        unseen: Iterable[int] = (),
        begin: int = 0,
        build: object = None,
    ) -> int:
        """One packet; `until`: how many places it passes before it is lost.  → its number."""
        self.sent += 1
        key = (name, self.sent)
        way = list(enumerate(self.places))
        if back:
            way.reverse()
        if until is not None:
            way = way[:until]
        self.reach[key] = tuple(n for n, _ in way)
        when = START + time
        before = None
        for number, place in way[begin:]:
            ends = inside if place.translated else outside
            source, target = ends[::-1] if back else ends
            ttl = 64 - (place.hops_back if back else place.hops)
            if begin:  # it is made there
                ttl += way[begin][1].hops_back if back else way[begin][1].hops
            when += self.delay if before is None or before != place.tap.node else 2 * self.delay
            before = place.tap.node
            if number in unseen:
                continue
            make = frames.tcp if build is None else build
            packet = make(*source, *target, ttl=ttl, **segment)  # type: ignore[operator]
            direction = place.direction
            if back:
                direction = IN if direction is OUT else OUT
            frame = frames.ethernet(packet)
            self.captured.append(
                CapturedPacket(
                    tap=place.tap,
                    time_ns=when + self.skew.get(place.tap.node, 0),
                    data=frame,
                    original_length=len(frame),
                    direction=direction,
                )
            )
            self.truth.append(key)
        return self.sent


def stamp(value: int) -> bytes:
    return b"\x01\x01\x08\x0a" + value.to_bytes(4, "big") + bytes(4)


def syn_options(value: int) -> bytes:
    head = bytes.fromhex("020405b4 0402 080a")
    return head + value.to_bytes(4, "big") + bytes(4) + b"\x01\x03\x03\x07"
