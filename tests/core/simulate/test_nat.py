"""Setting up and carrying out NAT: tuples only."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from gketrace.conntrack import CtState, CtStatus
from gketrace.packet import Packet, Protocol, Tuple5
from gketrace.simulate.nat import Manip, NatSetup, initialized, null_binding, rewrite, set_up
from gketrace.simulate.state import CtInfo, Direction, NatRequest
from tests.core.simulate.nodes import tcp


def fresh(packet: Packet) -> CtInfo:
    tuple5 = packet.tuple5
    return CtInfo(state=CtState.NEW, orig=tuple5, reply=tuple5.inverted())


def source(low: str = "", high: str = "", **more: object) -> NatRequest:
    addresses = (ip_address(low), ip_address(high or low)) if low else None
    return NatRequest(source=True, addresses=addresses, **more)  # type: ignore[arg-type]


def destination(low: str = "", high: str = "", **more: object) -> NatRequest:
    addresses = (ip_address(low), ip_address(high or low)) if low else None
    return NatRequest(source=False, addresses=addresses, **more)  # type: ignore[arg-type]


def done(
    packet: Packet,
    request: NatRequest,
    *,
    selected: str = "",
    taken: frozenset[Tuple5] = frozenset(),
) -> list[str]:
    """The packet after, for each way that the request can be carried out."""
    manip = Manip.SRC if request.source else Manip.DST
    address = ip_address(selected) if selected else None
    found = set_up(fresh(packet), request, address=address, taken=lambda t: t in taken)
    return [s.problem or str(rewrite(packet, s.ct, manip)) for s in found]


PACKET = tcp("10.0.0.1:4000", "10.0.0.2:80")


@pytest.mark.parametrize(
    ("request_", "after"),
    [
        (destination("10.9.9.9", ports=(8080, 8080)), ["10.0.0.1:4000 → 10.9.9.9:8080 tcp"]),
        (destination("10.9.9.9"), ["10.0.0.1:4000 → 10.9.9.9:80 tcp"]),
        (destination(ports=(70, 90)), ["10.0.0.1:4000 → 10.0.0.2:80 tcp"]),
        (destination(ports=(8000, 8003)), ["10.0.0.1:4000 → 10.0.0.2:8000 tcp"]),
        (
            destination(ports=(8000, 8001), random=True),
            ["10.0.0.1:4000 → 10.0.0.2:8000 tcp", "10.0.0.1:4000 → 10.0.0.2:8001 tcp"],
        ),
        (
            destination(ports=(8000, 8099), base_port=75),
            ["10.0.0.1:4000 → 10.0.0.2:8005 tcp"],
        ),
        (source("10.9.9.9"), ["10.9.9.9:4000 → 10.0.0.2:80 tcp"]),
        (source("10.9.9.9", ports=(5000, 5000)), ["10.9.9.9:5000 → 10.0.0.2:80 tcp"]),
        (source("10.9.9.9", ports=(5000, 5999)), ["10.9.9.9:* → 10.0.0.2:80 tcp"]),
        (source("10.9.9.9", ports=(3000, 5999)), ["10.9.9.9:4000 → 10.0.0.2:80 tcp"]),
        (source("10.9.9.9", random_fully=True), ["10.9.9.9:* → 10.0.0.2:80 tcp"]),
        (
            source("10.9.9.8", "10.9.9.9"),
            ["10.9.9.8:4000 → 10.0.0.2:80 tcp", "10.9.9.9:4000 → 10.0.0.2:80 tcp"],
        ),
        (
            source("10.9.0.0", "10.9.9.9"),
            ["the kernel picks one of the 2314 addresses 10.9.0.0-10.9.9.9 by a hash"],
        ),
        (
            destination("192.168.5.0", "192.168.5.255", netmap=True),
            ["10.0.0.1:4000 → 192.168.5.2:80 tcp"],
        ),
    ],
)  # fmt: skip
def test_requests(request_: NatRequest, after: list[str]) -> None:
    assert done(PACKET, request_) == after


def test_masquerade_and_redirect_need_their_address() -> None:
    masquerade = NatRequest(source=True, masquerade=True)
    assert done(PACKET, masquerade, selected="10.9.9.9") == ["10.9.9.9:4000 → 10.0.0.2:80 tcp"]
    assert done(PACKET, masquerade) == ["the address that MASQUERADE selects is not known"]
    redirect = NatRequest(source=False, redirect=True, ports=(3128, 3128))
    assert done(PACKET, redirect, selected="10.0.0.9") == ["10.0.0.1:4000 → 10.0.0.9:3128 tcp"]


def test_a_source_port_that_is_taken_is_not_known() -> None:
    taken = frozenset({tcp("10.9.9.9:4000", "10.0.0.2:80").tuple5})
    assert done(PACKET, source("10.9.9.9"), taken=taken) == ["10.9.9.9:* → 10.0.0.2:80 tcp"]


def test_several_ways_have_no_known_chance() -> None:
    ways = set_up(
        fresh(PACKET), source("10.9.9.8", "10.9.9.9"), address=None, taken=lambda _: False
    )
    assert [way.chance for way in ways] == [None, None]
    assert [way.because for way in ways] == [
        "address 10.9.9.8 of the range",
        "address 10.9.9.9 of the range",
    ]


def both() -> CtInfo:
    (dnat,) = set_up(
        fresh(PACKET),
        destination("10.9.9.9", ports=(8080, 8080)),
        address=None,
        taken=lambda _: False,
    )
    (snat,) = set_up(dnat.ct, source("10.0.0.8"), address=None, taken=lambda _: False)
    assert isinstance(snat, NatSetup)
    return snat.ct


def test_both_sides_and_the_answer() -> None:
    ct = both()
    assert ct.status == (
        CtStatus.SRC_NAT | CtStatus.DST_NAT | CtStatus.SRC_NAT_DONE | CtStatus.DST_NAT_DONE
    )
    routed = rewrite(PACKET, ct, Manip.DST)
    assert str(routed) == "10.0.0.1:4000 → 10.9.9.9:8080 tcp"
    sent = rewrite(routed, ct, Manip.SRC)
    assert str(sent) == "10.0.0.8:4000 → 10.9.9.9:8080 tcp"
    assert str(ct.reply) == "10.9.9.9:8080 → 10.0.0.8:4000 tcp"
    answer = CtInfo(
        state=CtState.ESTABLISHED,
        direction=Direction.REPLY,
        orig=ct.orig,
        reply=ct.reply,
        status=ct.status,
    )
    back = rewrite(sent.reply(), answer, Manip.DST)
    assert str(back) == "10.9.9.9:8080 → 10.0.0.1:4000 tcp"
    assert str(rewrite(back, answer, Manip.SRC)) == "10.0.0.2:80 → 10.0.0.1:4000 tcp"


def test_a_null_binding_settles_a_side_and_changes_nothing() -> None:
    ct = fresh(PACKET)
    assert not initialized(ct, Manip.DST)
    bound = null_binding(ct, Manip.DST, taken=lambda _: True)
    assert not bound.note
    assert initialized(bound.ct, Manip.DST)
    assert not initialized(bound.ct, Manip.SRC)
    assert rewrite(PACKET, bound.ct, Manip.DST) is PACKET


def test_a_null_binding_changes_the_port_that_another_connection_has() -> None:
    ct = fresh(PACKET)
    bound = null_binding(ct, Manip.SRC, taken=lambda tuple5: tuple5 == PACKET.tuple5)
    assert bound.note == "port 4000 is taken by another connection; the kernel picks one"
    after = rewrite(PACKET, bound.ct, Manip.SRC)
    assert (after.src, after.sport) == (PACKET.src, None)
    assert null_binding(ct, Manip.SRC, taken=None).ct.reply == ct.reply


def test_the_identifier_of_an_echo_is_its_port() -> None:
    echo = Packet(
        src=ip_address("10.0.0.1"),
        dst=ip_address("10.0.0.2"),
        protocol=Protocol.ICMP,
        icmp_type=8,
        icmp_id=7,
    )
    (kept,) = set_up(fresh(echo), source("10.9.9.9"), address=None, taken=lambda _: False)
    assert rewrite(echo, kept.ct, Manip.SRC).icmp_id == 7
    (picked,) = set_up(
        fresh(echo), source("10.9.9.9", random_fully=True), address=None, taken=lambda _: False
    )
    after = rewrite(echo, picked.ct, Manip.SRC)
    assert (str(after.src), after.icmp_id) == ("10.9.9.9", None)
