"""One network namespace as a walk uses it: its hooks as data, its links, routing and sysctls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gketrace.citing import cite_link
from gketrace.packet import IPAddress, Packet
from gketrace.ruleset import BaseChain, Ruleset
from gketrace.ruleset.model import ChainType
from gketrace.simulate.order import in_order
from gketrace.simulate.recall import Recall
from gketrace.simulate.routing import Fib
from gketrace.simulate.state import Ternary
from gketrace.simulate.station import Station, StationKind
from gketrace.snapshot import (
    IpSet,
    Link,
    Maybe,
    NetnsSnapshot,
    RecentEntry,
    Unavailable,
)
from gketrace.trace import Citation, Hook, NetnsRef, Source

__all__ = ["Namespace"]


_LAST: Final = 2**31 - 1
BUILT_IN: Final[Mapping[Hook, tuple[tuple[StationKind, int], ...]]] = {
    Hook.PREROUTING: ((StationKind.CONNTRACK, -200), (StationKind.NAT, -100)),
    Hook.INPUT: ((StationKind.NAT, 100), (StationKind.CONFIRM, _LAST)),
    Hook.FORWARD: (),
    Hook.OUTPUT: ((StationKind.CONNTRACK, -200), (StationKind.NAT, -100)),
    Hook.POSTROUTING: ((StationKind.NAT, 100), (StationKind.CONFIRM, _LAST)),
}
"""ipv4_conntrack_ops and nf_nat_ipv4_ops; all chains of type nat hang on the latter, whatever
their own priority is (nf_nat_register_fn)."""

_CILIUM: Final = ("cilium_host", "cilium_net")
"""Links of Cilium and of GKE Dataplane V2."""


class Namespace:
    """A `NetnsSnapshot` with its indexes; also the `Environment` that matches ask."""

    def __init__(self, snapshot: NetnsSnapshot) -> None:
        self.snapshot: Final = snapshot
        self.fib: Final = Fib(snapshot)
        links = () if isinstance(snapshot.links, Unavailable) else snapshot.links
        self.links: Final = {link.name: link for link in links}
        self.by_index: Final = {link.ifindex: link for link in links}
        self._stations: dict[tuple[Hook, int], tuple[Station, ...]] = {}
        self._tracks: dict[int, bool] = {}
        self._translates: dict[int, bool] = {}
        self._cited: dict[int, tuple[Link, Citation]] = {}
        self.recall: Recall | None = None
        """Since a walk has forked here: what chains made of its packets."""
        self.unread: Final = tuple(r for r in snapshot.rulesets if isinstance(r, Unavailable))
        """The rule sets that could not be read."""

    @property
    def netns(self) -> NetnsRef:
        return self.snapshot.netns

    def cite(self, link: Link) -> Citation:
        """`cite_link`, made once for each of this namespace's links."""
        known = self._cited.get(link.ifindex)
        if known is None or known[0] is not link:
            known = self._cited[link.ifindex] = (link, cite_link(link))
        return known[1]

    def forks(self) -> None:
        """Several packets go on that have much in common."""
        if self.recall is None:
            self.recall = Recall()

    def rulesets(self, family: int) -> tuple[Ruleset, ...]:
        return tuple(
            r
            for r in self.snapshot.rulesets
            if not isinstance(r, Unavailable) and r.family in (0, family)
        )

    def stations(self, hook: Hook, family: int) -> tuple[Station, ...]:
        """What stands on `hook`, in the order in which a packet of `family` meets it."""
        known = self._stations.get((hook, family))
        if known is None:
            found = [Station(kind=kind, priority=at) for kind, at in BUILT_IN[hook]]
            nat_at = next((s.priority for s in found if s.kind is StationKind.NAT), 0)
            for ruleset in self.rulesets(family):
                for chain in ruleset.base_chains(hook):
                    if not _sees(ruleset, chain, family):
                        continue
                    nat = chain.type is ChainType.NAT
                    found.append(
                        Station(
                            kind=StationKind.NAT_CHAIN if nat else StationKind.CHAIN,
                            priority=nat_at if nat else chain.priority,
                            order=chain.priority,
                            ruleset=ruleset,
                            chain=chain,
                        )
                    )
            known = self._stations[hook, family] = in_order(found)
        return known

    def tracks(self, family: int) -> bool:
        """Whether connection tracking is on here: it is while some rule needs it."""
        known = self._tracks.get(family)
        if known is None:
            known = any(r.needs_conntrack(family) for r in self.rulesets(family))
            self._tracks[family] = known
        return known

    def translates(self, family: int) -> bool:
        """Whether NAT's hooks are there: they are while some chain of type nat is."""
        known = self._translates.get(family)
        if known is None:
            known = self._translates[family] = any(
                chain.type is ChainType.NAT and _sees(ruleset, chain, family)
                for ruleset in self.rulesets(family)
                for hook in Hook
                for chain in ruleset.base_chains(hook)
            )
        return known

    def bridge_netfilter(self, bridge: Link, family: int) -> Maybe[Citation | None]:
        """Why frames on `bridge` pass iptables; None: they do not (br_nf_pre_routing)."""
        suffix = "iptables" if family == 4 else "ip6tables"
        name = f"net.bridge.bridge-nf-call-{suffix}"
        value = self.sysctl(name)
        if isinstance(value, Unavailable):
            return value
        if value is None:
            # Without br_netfilter the sysctl is absent, and the bridge's flag has no effect.
            return None
        if value != "0":
            return Citation(source=Source.SYSCTL, text=f"{name} = {value}")
        own = bridge.bridge_nf_call_iptables if family == 4 else bridge.bridge_nf_call_ip6tables
        if own:
            return Citation(source=Source.LINK, text=f"{bridge.name}: nf_call_{suffix} 1")
        return None

    @property
    def hidden_by(self) -> Link | None:
        """A link that shows that eBPF programs forward here, past all that can be seen."""
        return next((self.links[name] for name in _CILIUM if name in self.links), None)

    def virtual_server(self, address: IPAddress) -> Link | None:
        """The IPVS link that has `address`: IPVS then takes the packet in INPUT."""
        link = self.links.get("kube-ipvs0")
        addresses = self.snapshot.addresses
        if link is None or isinstance(addresses, Unavailable):
            return None
        mine = (a.address for a in addresses if a.ifindex == link.ifindex)
        return link if address in mine else None

    # What matches ask (`Environment`).

    @property
    def now(self) -> float:
        return self.snapshot.taken_at

    def sysctl(self, name: str) -> Maybe[str | None]:
        if isinstance(self.snapshot.sysctls, Unavailable):
            return self.snapshot.sysctls
        return self.snapshot.sysctls.get(name)

    def address_type(self, address: IPAddress, interface: str | None) -> Maybe[str]:
        found = self.fib.address_type(address, interface)
        if found is None:
            return Unavailable(reason=f"the type of {address} is not known")
        return found.upper()

    def reverse_path(
        self, packet: Packet, interface: str, *, loose: bool, validmark: bool, accept_local: bool
    ) -> Maybe[bool]:
        answer = self.fib.reverse_path(
            packet, interface, loose=loose, validmark=validmark, accept_local=accept_local
        )
        if answer is Ternary.UNKNOWN:
            return Unavailable(reason=f"the reverse path to {packet.src} is not known")
        return answer is Ternary.YES

    def recent(self, name: str) -> Maybe[tuple[RecentEntry, ...]]:
        if isinstance(self.snapshot.recent, Unavailable):
            return self.snapshot.recent
        return self.snapshot.recent.get(name, ())

    def ipset(self, name: str) -> Maybe[IpSet]:
        if isinstance(self.snapshot.ipsets, Unavailable):
            return self.snapshot.ipsets
        found = self.snapshot.ipsets.get(name)
        return Unavailable(reason=f"the ipset {name} was not there") if found is None else found


def _sees(ruleset: Ruleset, chain: BaseChain, family: int) -> bool:
    """Whether packets of `family` pass `chain`: nftables tables carry their own family."""
    if ruleset.family:
        return True
    of_table = chain.table.partition(" ")[0]
    return of_table == "inet" or of_table == ("ip" if family == 4 else "ip6")
