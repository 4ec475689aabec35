"""Link addresses: whose they are, and behind which port of a bridge."""

from __future__ import annotations

from dataclasses import dataclass

from gketrace.citing import cite_fdb, cite_link, cite_neighbour
from gketrace.packet import IPAddress
from gketrace.simulate.cursor import Context
from gketrace.simulate.namespace import Namespace
from gketrace.snapshot import FdbEntry, Link, Neighbour, Unavailable
from gketrace.trace import Citation

__all__ = ["PortChoice", "choose_port", "neighbour_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PortChoice:
    """Behind which port of a bridge an address is."""

    port: Link | None = None
    """None: not known, or nobody has it (`failed`)."""
    neighbour: Neighbour | None = None
    """What the namespace's neighbour table says."""
    fdb: FdbEntry | None = None
    """What the bridge has learned."""
    why: str = ""
    failed: bool = False
    """True: it is known that nobody answers."""

    def neighbour_citation(self, link: Link | None) -> Citation | None:
        if self.neighbour is None:
            return None
        return cite_neighbour(self.neighbour, link.name if link is not None else "")

    def port_citation(self) -> Citation | None:
        if self.port is None:
            return None
        return cite_fdb(self.fdb, self.port.name) if self.fdb is not None else cite_link(self.port)


def choose_port(context: Context, space: Namespace, bridge: Link, target: IPAddress) -> PortChoice:
    """The port of `bridge` that a frame for `target` goes out by (br_forward, or the flood).

    The neighbour table and the FDB say it where traffic has passed; else the owner answers the
    ARP request or neighbour solicitation, so the namespaces behind the ports are asked for it.
    """
    near = neighbour_of(space, bridge, target)
    if near is not None and near.state == "FAILED":
        return PortChoice(
            neighbour=near, failed=True, why=f"{target} does not answer on {bridge.name}"
        )
    if near is not None and near.mac:
        found = _learned(space, bridge, near.mac)
        if isinstance(found, str):
            return PortChoice(neighbour=near, why=found)
        if found is not None and (port := space.by_index.get(found.ifindex)) is not None:
            return PortChoice(port=port, neighbour=near, fdb=found)
    ports = [link for link in space.links.values() if link.master == bridge.ifindex]
    unseen: list[str] = []
    for port in ports:
        peer = port.peer.netns if port.peer is not None else None
        behind = context.space(peer) if peer is not None else None
        if behind is None or isinstance(behind, Unavailable):
            unseen.append(port.name)
            continue
        far = behind.by_index.get(port.peer.ifindex) if port.peer is not None else None
        if far is None or isinstance(behind.snapshot.addresses, Unavailable):
            unseen.append(port.name)
            continue
        for address in behind.snapshot.addresses:
            if address.ifindex == far.ifindex and address.address == target:
                if near is not None and near.mac and far.mac and near.mac != far.mac:
                    continue
                fdb = _learned(space, bridge, far.mac) if far.mac else None
                if isinstance(fdb, str):
                    return PortChoice(neighbour=near, why=fdb)
                return PortChoice(
                    port=port, neighbour=near, fdb=fdb, why=f"{target} is behind {port.name}"
                )
    if unseen:
        shown = ", ".join(unseen[:4]) + (", …" if len(unseen) > 4 else "")
        why = f"behind which port of {bridge.name} {target} is, is not known ({shown} not seen)"
        return PortChoice(neighbour=near, why=why)
    return PortChoice(
        neighbour=near, failed=True, why=f"no port of {bridge.name} has {target} behind it"
    )


def neighbour_of(space: Namespace, link: Link, target: IPAddress) -> Neighbour | None:
    """The neighbour entry of `target` on `link`, or None."""
    if isinstance(space.snapshot.neighbours, Unavailable):
        return None
    for entry in space.snapshot.neighbours:
        if entry.ifindex == link.ifindex and entry.address == target:
            return entry
    return None


def _learned(space: Namespace, bridge: Link, mac: str) -> FdbEntry | str | None:
    """The bridge's entry for a station behind a port; None: there is none; text: why not known."""
    if isinstance(space.snapshot.fdb, Unavailable):
        return None
    found: dict[int, FdbEntry] = {}
    for entry in space.snapshot.fdb:
        if entry.mac != mac or "self" in entry.flags or "permanent" in entry.flags:
            # NUD_PERMANENT: an address of the bridge or of a port itself (is_local).
            continue
        port = space.by_index.get(entry.ifindex)
        if port is not None and port.master == bridge.ifindex:
            found.setdefault(entry.ifindex, entry)
    if len(found) > 1:
        return f"{mac} is on several ports of {bridge.name}, by VLAN"
    return next(iter(found.values()), None)
