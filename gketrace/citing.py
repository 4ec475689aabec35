"""What was observed, as it is cited: roughly as the tool prints it that a user would run."""

from __future__ import annotations

from gketrace.packet import protocol_name
from gketrace.snapshot import FdbEntry, Link, Neighbour, Socket
from gketrace.trace import Citation, Source

__all__ = ["cite_fdb", "cite_link", "cite_neighbour", "cite_socket"]


def cite_link(link: Link) -> Citation:
    """The link, roughly as ``ip -d link`` prints it."""
    peer = ""
    if link.peer is not None:
        where = f" in {link.peer.netns}" if link.peer.netns is not None else ""
        peer = f"@{link.peer.name or f'if{link.peer.ifindex}'}{where}"
    kind = f" {link.kind}" if link.kind else ""
    text = f"{link.ifindex}: {link.name}{peer}: <{','.join(link.flags)}> mtu {link.mtu}{kind}"
    return Citation(source=Source.LINK, text=text)


def cite_socket(socket: Socket) -> Citation:
    """The socket, roughly as ``ss -lnp`` prints it."""
    address = f"[{socket.address}]" if socket.address.version == 6 else str(socket.address)
    end = f"{address}:{socket.port or '*'}"
    parts = [protocol_name(socket.protocol), socket.state, end]
    if socket.interface:
        parts.append(f"dev {socket.interface}")
    if socket.process or socket.pid is not None:
        parts.append(f"{socket.process or '?'} (pid {socket.pid or '?'})")
    return Citation(source=Source.SOCKET, text=" ".join(part for part in parts if part))


def cite_neighbour(entry: Neighbour, interface: str) -> Citation:
    """As ``ip neigh`` prints it."""
    mac = f" lladdr {entry.mac}" if entry.mac else ""
    router = " router" if entry.router else ""
    text = f"{entry.address} dev {interface}{mac}{router} {entry.state}"
    return Citation(source=Source.NEIGHBOUR, text=text)


def cite_fdb(entry: FdbEntry, interface: str) -> Citation:
    """As ``bridge fdb`` prints it, with the age where it is known."""
    vlan = f" vlan {entry.vlan}" if entry.vlan else ""
    flags = f" {' '.join(entry.flags)}" if entry.flags else ""
    age = f", seen {entry.updated:.0f} s ago" if entry.updated is not None else ""
    return Citation(source=Source.FDB, text=f"{entry.mac} dev {interface}{vlan}{flags}{age}")
