"""Which socket takes a packet: raw sockets, and SCTP with and without the kernel's own."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from gketrace.packet import Packet, Protocol
from gketrace.simulate.delivery import Delivery, deliver
from gketrace.snapshot import NetnsSnapshot, Socket, Unavailable
from gketrace.trace import Disposition
from tests.core.simulate.networks import network

D = Disposition
POD = "10.40.0.6"
LOADED = {"net.sctp.max_burst": "4"}


def packet(protocol: int, dst: str = POD) -> Packet:
    src = "10.40.0.9" if "." in dst else "fd00:40::9"
    ports = protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP, Protocol.DCCP)
    return Packet(
        src=ip_address(src),
        dst=ip_address(dst),
        protocol=protocol,
        sport=4000 if ports else None,
        dport=3868 if ports else None,
    )


def raw(protocol: int, address: str = "0.0.0.0") -> Socket:
    at = ip_address(address)
    return Socket(
        family=at.version, protocol=protocol, address=at, port=0, state="RAW", process="dia", pid=7
    )


def listener(port: int) -> Socket:
    at = ip_address("0.0.0.0")
    return Socket(family=4, protocol=Protocol.SCTP, address=at, port=port, process="dia", pid=7)


def end(sent: Packet, *sockets: Socket, values: dict[str, str] | None = None) -> Delivery:
    shot: NetnsSnapshot = replace(network(values=values or {}), sockets=sockets)
    return deliver(sent, snapshot=shot, in_iface="eth0", flows=())


def test_sctp_without_a_kernels_own_goes_to_a_raw_socket() -> None:
    ended = end(packet(Protocol.SCTP), raw(Protocol.SCTP))
    assert (ended.outcome.disposition, ended.missing) == (D.DELIVERED, ())
    assert ended.outcome.citation is not None
    assert ended.outcome.citation.text == "sctp RAW 0.0.0.0:* dia (pid 7)"
    assert "takes every SCTP packet, on any port" in ended.outcome.detail


@pytest.mark.parametrize(
    ("dst", "other", "answer"),
    [
        (POD, raw(Protocol.SCTP, "10.40.0.7"), "protocol unreachable"),
        (POD, raw(Protocol.SCTP, "::"), "protocol unreachable"),
        (POD, raw(Protocol.GRE), "protocol unreachable"),
        ("fd00:40::6", raw(Protocol.SCTP), "parameter problem (next header)"),
    ],
)
def test_sctp_that_nobody_takes(dst: str, other: Socket, answer: str) -> None:
    ended = end(packet(Protocol.SCTP, dst), other)
    assert ended.outcome.disposition is D.REFUSED
    assert ended.outcome.detail == f"nobody takes SCTP here: the kernel answers ICMP {answer}"


def test_the_kernels_own_sctp_has_listeners() -> None:
    taken = end(packet(Protocol.SCTP), listener(3868), values=LOADED)
    assert taken.outcome.disposition is D.DELIVERED
    refused = end(packet(Protocol.SCTP), listener(3869), values=LOADED)
    assert refused.outcome.disposition is D.REFUSED
    assert "the kernel answers ABORT" in refused.outcome.detail
    both = end(packet(Protocol.SCTP), raw(Protocol.SCTP), values=LOADED)
    assert [m.what for m in both.missing] == ["sockets"]


def test_what_could_not_be_read_is_said() -> None:
    shot = replace(network(), sockets=(), sysctls=Unavailable(reason="EPERM"))
    ended = deliver(packet(Protocol.SCTP), snapshot=shot, in_iface="eth0", flows=())
    assert [m.why for m in ended.missing] == [
        "whether this kernel has SCTP of its own is not known: EPERM"
    ]
    blind = replace(shot, sockets=Unavailable(reason="EACCES"))
    ended = deliver(packet(Protocol.SCTP), snapshot=blind, in_iface="eth0", flows=())
    assert [m.why for m in ended.missing] == ["EACCES"]


def test_other_protocols() -> None:
    assert end(packet(Protocol.GRE), raw(Protocol.GRE)).outcome.disposition is D.DELIVERED
    assert [m.what for m in end(packet(Protocol.GRE)).missing] == ["sockets"]
    assert end(packet(Protocol.DCCP), raw(Protocol.DCCP)).outcome.disposition is D.DELIVERED
    # A copy for a raw socket does not keep TCP from answering.
    assert end(packet(Protocol.TCP), raw(Protocol.TCP)).outcome.disposition is D.REFUSED
