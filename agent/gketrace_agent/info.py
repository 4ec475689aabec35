"""Which data plane this node has, and by which signs (iptables-wrappers' detect.go, and the marks
that kube-proxy's modes and Cilium leave)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

from gketrace.snapshot import Address, NetnsSnapshot, Unavailable
from gketrace.trace import Missing
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.observe.iptables import IptablesDump, IptablesDumps
from gketrace_agent.observe.nftables import NftablesDump
from gketrace_agent.observe.snapshot import Observation

__all__ = ["NOUNS", "DataPlane", "detect_data_plane", "own_addresses"]

NOUNS: Final = frozenset({"links", "addresses", "rulesets"})
"""What the host's observation must hold."""
_SERVICES: Final = re.compile(rb"^:KUBE-SERVICES ", re.M)
_SERVICE: Final = re.compile(rb"^:KUBE-SVC-", re.M)
_IPVS: Final = "kube-ipvs0"
_NOT_YET: Final = frozenset({"tentative", "dadfailed"})
"""Addresses that the kernel does not answer to."""
_CILIUM: Final = ("cilium_host", "cilium_net")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlane:
    """What programs Services on this node."""

    name: str
    """``iptables``, ``nftables``, ``ipvs``, ``dataplane-v2`` or ``unknown``."""
    reason: str
    iptables_backend: str = ""
    """Where KUBE-SERVICES is; empty: nowhere."""
    missing: tuple[Missing, ...] = ()


def detect_data_plane(host: Observation, paths: HostPaths) -> DataPlane:
    """By what the kernel holds now.  Contradicting signs give ``unknown``, with both."""
    node = host.snapshot.netns.node
    backends = _iptables_backends(host)
    nft = _nftables_tables(host)
    ipvs = _ipvs_addresses(host)
    ebpf = _cilium_signs(host, paths)
    primary = next(iter(backends), "")
    missing = list(host.snapshot.missing)
    signs: list[tuple[str, str]] = []
    if ipvs:
        # kube-proxy's IPVS mode keeps KUBE-SERVICES and iptables rules of its own beside it.
        signs.append(("ipvs", f"{_IPVS} holds {ipvs} addresses"))
    elif backends:
        signs.append(("iptables", "; ".join(f"{b} has {n}" for b, n in backends.items())))
    if nft:
        signs.append(("nftables", f"nftables has table {' and '.join(nft)}"))
    if ebpf and not signs:
        signs.append(("dataplane-v2", f"{ebpf}, and no kube-proxy rules in any backend"))
    elif ebpf:
        why = f"{ebpf}: what Cilium's programs do to packets is not visible here"
        missing.append(Missing(what="ebpf", why=why, node=node))
    if len(signs) == 1:
        name, reason = signs[0]
    elif signs:
        name = "unknown"
        reason = "rules of several kube-proxy modes: " + "; ".join(sign for _, sign in signs)
    else:
        name, reason = "unknown", _nothing(host)
    return DataPlane(name=name, reason=reason, iptables_backend=primary, missing=tuple(missing))


def own_addresses(snapshot: NetnsSnapshot) -> tuple[tuple[Address, str], ...]:
    """(address, interface) of what the node alone answers to on its network.

    Left out: loopback and dummies (kube-ipvs0, nodelocaldns), whose addresses every node has, and
    what several interfaces have, as the gateway on each of a node's ptp veths.
    """
    if isinstance(snapshot.links, Unavailable) or isinstance(snapshot.addresses, Unavailable):
        return ()
    names = {
        link.ifindex: link.name
        for link in snapshot.links
        if link.kind != "dummy" and "LOOPBACK" not in link.flags
    }
    often = Counter(address.address for address in snapshot.addresses)
    return tuple(
        (address, names[address.ifindex])
        for address in snapshot.addresses
        if address.ifindex in names
        and address.scope == "global"
        and often[address.address] == 1
        and not _NOT_YET.intersection(address.flags)
    )


def _iptables_backends(host: Observation) -> dict[str, str]:
    """Backend → what it has, the one in use first."""
    if not isinstance(host.iptables, IptablesDumps):
        return {}
    found: dict[str, int] = {}
    for dump in host.iptables.dumps:
        if isinstance(dump, IptablesDump) and _SERVICES.search(dump.text):
            services = sum(1 for _ in _SERVICE.finditer(dump.text))
            found[dump.backend] = found.get(dump.backend, 0) + services
    primary = host.iptables.primary
    order = sorted(found, key=lambda backend: backend != primary)
    return {backend: f"KUBE-SERVICES and {found[backend]} KUBE-SVC chains" for backend in order}


def _nftables_tables(host: Observation) -> list[str]:
    if not isinstance(host.nftables, NftablesDump):
        return []
    return [str(table) for table, _ in host.nftables.tables if table.name == "kube-proxy"]


def _ipvs_addresses(host: Observation) -> int:
    links, addresses = host.snapshot.links, host.snapshot.addresses
    if isinstance(links, Unavailable) or isinstance(addresses, Unavailable):
        return 0
    dummies = {link.ifindex for link in links if link.name == _IPVS}
    return sum(1 for address in addresses if address.ifindex in dummies)


def _cilium_signs(host: Observation, paths: HostPaths) -> str:
    """What shows that Cilium's programs run here; empty: nothing does."""
    signs: list[str] = []
    if not isinstance(host.snapshot.links, Unavailable):
        names = {link.name for link in host.snapshot.links}
        signs += [f"link {name}" for name in _CILIUM if name in names]
    maps = paths.sys / "fs" / "bpf" / "tc" / "globals"
    try:
        count = sum(1 for pinned in maps.iterdir() if pinned.name.startswith("cilium_"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        count = 0
    if count:
        signs.append(f"{count} pinned cilium_ maps")
    return ", ".join(signs)


def _nothing(host: Observation) -> str:
    unread = [str(why) for noun, why in host.failures.items() if noun in NOUNS]
    if isinstance(host.iptables, IptablesDumps):
        unread += [d.reason for d in host.iptables.dumps if isinstance(d, Unavailable)]
    if unread:
        return "not all could be read: " + "; ".join(unread)
    return f"no KUBE-SERVICES chain, no nftables table kube-proxy, no {_IPVS}, no sign of Cilium"
