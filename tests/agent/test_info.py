"""Which data plane, by which signs."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from gketrace.snapshot import Address, Link, NetnsSnapshot, Unavailable
from gketrace.trace import NetnsRef
from gketrace_agent.info import detect_data_plane, own_addresses
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.nfnetlink import NftTable
from gketrace_agent.observe.iptables import IptablesDump, IptablesDumps
from gketrace_agent.observe.nftables import NftablesDump
from gketrace_agent.observe.snapshot import Observation

ABSENT = Unavailable(reason="not asked for")
KUBE = b"*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n:KUBE-SVC-B - [0:0]\nCOMMIT\n"


def _observation(
    *,
    legacy: bytes | Unavailable = b"",
    nft: bytes = b"",
    primary: str = "iptables-nft",
    tables: tuple[str, ...] = (),
    links: tuple[str, ...] = (),
    ipvs_addresses: int = 0,
) -> Observation:
    dumps: list[IptablesDump | Unavailable] = []
    for backend, text in (("iptables-legacy", legacy), ("iptables-nft", nft)):
        if isinstance(text, Unavailable):
            dumps.append(text)
        elif text:
            dumps.append(
                IptablesDump(backend=backend, family=4, text=text, source="", seconds=0, taken_at=0)
            )
    names = ("eth0", *links)
    return Observation(
        snapshot=NetnsSnapshot(
            netns=NetnsRef(node="n"),
            links=tuple(Link(ifindex=i, name=name) for i, name in enumerate(names, 1)),
            addresses=tuple(
                Address(ifindex=len(names), address=ip_address(f"10.0.0.{n}"), prefixlen=32)
                for n in range(1, ipvs_addresses + 1)
            ),
            routes=ABSENT,
            rules=ABSENT,
            neighbours=ABSENT,
            fdb=ABSENT,
            sysctls=ABSENT,
            sockets=ABSENT,
            rulesets=(),
            conntrack=ABSENT,
        ),
        seconds={},
        failures={},
        iptables=IptablesDumps(dumps=tuple(dumps), primary=primary, both=False),
        nftables=NftablesDump(
            tables=tuple((NftTable(family="ip", name=name), b"{}") for name in tables),
            generation=1,
            source="",
            taken_at=0,
        ),
    )


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    return HostPaths(sys=tmp_path)


@pytest.mark.parametrize(
    ("seen", "name", "backend", "reason"),
    [
        (
            {"nft": KUBE},
            "iptables",
            "iptables-nft",
            "iptables-nft has KUBE-SERVICES and 2 KUBE-SVC chains",
        ),
        (
            {"legacy": KUBE, "primary": "iptables-legacy"},
            "iptables",
            "iptables-legacy",
            "iptables-legacy has KUBE-SERVICES and 2 KUBE-SVC chains",
        ),
        (
            {"legacy": KUBE, "nft": KUBE, "primary": "iptables-legacy"},
            "iptables",
            "iptables-legacy",
            "iptables-legacy has KUBE-SERVICES and 2 KUBE-SVC chains; "
            "iptables-nft has KUBE-SERVICES and 2 KUBE-SVC chains",
        ),
        ({"tables": ("kube-proxy",)}, "nftables", "", "nftables has table ip kube-proxy"),
        (
            {"nft": KUBE, "links": ("kube-ipvs0",), "ipvs_addresses": 3},
            "ipvs",
            "iptables-nft",
            "kube-ipvs0 holds 3 addresses",
        ),
        (
            {"nft": KUBE, "links": ("kube-ipvs0",)},
            "iptables",
            "iptables-nft",
            "iptables-nft has KUBE-SERVICES and 2 KUBE-SVC chains",
        ),
        (
            {"links": ("cilium_net", "cilium_host")},
            "dataplane-v2",
            "",
            "link cilium_host, link cilium_net, and no kube-proxy rules in any backend",
        ),
        (
            {"nft": KUBE, "tables": ("kube-proxy",)},
            "unknown",
            "iptables-nft",
            "rules of several kube-proxy modes: iptables-nft has KUBE-SERVICES and 2 KUBE-SVC "
            "chains; nftables has table ip kube-proxy",
        ),
        (
            {},
            "unknown",
            "",
            "no KUBE-SERVICES chain, no nftables table kube-proxy, no kube-ipvs0, "
            "no sign of Cilium",
        ),
        (
            {"legacy": Unavailable(reason="it broke")},
            "unknown",
            "",
            "not all could be read: it broke",
        ),
    ],
)
def test_signs(seen: dict, name: str, backend: str, reason: str, paths: HostPaths) -> None:
    plane = detect_data_plane(_observation(**seen), paths)
    assert (plane.name, plane.iptables_backend, plane.reason) == (name, backend, reason)


def test_pinned_maps(paths: HostPaths) -> None:
    maps = paths.sys / "fs/bpf/tc/globals"
    maps.mkdir(parents=True)
    (maps / "cilium_lxc").touch()
    plane = detect_data_plane(_observation(), paths)
    assert plane.name == "dataplane-v2"
    assert plane.reason.startswith("1 pinned cilium_ maps")


def test_cilium_beside_kube_proxy_is_missing(paths: HostPaths) -> None:
    plane = detect_data_plane(_observation(nft=KUBE, links=("cilium_host",)), paths)
    assert plane.name == "iptables"
    assert [(m.what, m.node) for m in plane.missing] == [("ebpf", "n")]


def test_own_addresses() -> None:
    links = (
        Link(ifindex=1, name="lo", flags=("LOOPBACK", "UP")),
        Link(ifindex=2, name="eth0"),
        Link(ifindex=3, name="kube-ipvs0", kind="dummy"),
        Link(ifindex=4, name="vetha", kind="veth"),
        Link(ifindex=5, name="vethb", kind="veth"),
    )
    addresses = tuple(
        Address(ifindex=index, address=ip_address(text), prefixlen=length, scope=scope, flags=flags)
        for index, text, length, scope, flags in (
            (1, "127.0.0.1", 8, "host", ()),
            (1, "10.9.9.9", 32, "global", ()),
            (2, "10.0.0.1", 24, "global", ("permanent",)),
            (2, "fd00::1", 64, "global", ()),
            (2, "fd00::2", 64, "global", ("tentative",)),
            (2, "fe80::1", 64, "link", ()),
            (3, "10.43.0.1", 32, "global", ()),
            (4, "10.40.0.1", 32, "global", ()),
            (5, "10.40.0.1", 32, "global", ()),
        )
    )
    host = replace(_observation().snapshot, links=links, addresses=addresses)
    found = [(str(one.address), name) for one, name in own_addresses(host)]
    assert found == [("10.0.0.1", "eth0"), ("fd00::1", "eth0")]
    assert own_addresses(replace(host, addresses=ABSENT)) == ()
