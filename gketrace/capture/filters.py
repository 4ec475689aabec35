"""Conversations → capture filters in libpcap's language (pcap-filter(7)).

A `Term` is one conversation as it looks at one place: the asking side may be open, the answering
side is what was asked for.  A filter takes both directions, and the ICMP errors about it, which
come from anybody and are told by the packet that they quote.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gketrace.packet import PORT_PROTOCOLS, IPAddress, Packet, Protocol

__all__ = ["Term", "filter_of", "term_of"]

_NAMES: Final = {Protocol.TCP: "tcp", Protocol.UDP: "udp", Protocol.SCTP: "sctp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One conversation at one place.  None: any."""

    family: int
    protocol: int
    client: IPAddress | None = None
    client_port: int | None = None
    server: IPAddress | None = None
    server_port: int | None = None

    def covers(self, other: Term) -> bool:
        """All that `other` takes is taken by this one."""
        return (self.family, self.protocol) == (other.family, other.protocol) and all(
            mine is None or mine == theirs
            for mine, theirs in (
                (self.client, other.client),
                (self.client_port, other.client_port),
                (self.server, other.server),
                (self.server_port, other.server_port),
            )
        )

    def takes(self, packet: Packet, *, back: bool = False) -> bool:
        """Whether a packet belongs to it; `back`: as an answer."""
        return self.covers(term_of(packet, back=back))


def term_of(packet: Packet, *, back: bool = False, client: bool = True, port: bool = True) -> Term:
    """The conversation of a packet; `back`: it is an answer.  `client` and `port`: whether the
    asking side's address and port count."""
    ends = ((packet.src, packet.sport), (packet.dst, packet.dport))
    asking, answering = ends[::-1] if back else ends
    ports = packet.protocol in PORT_PROTOCOLS
    return Term(
        family=packet.family,
        protocol=packet.protocol,
        client=asking[0] if client else None,
        client_port=asking[1] if client and port and ports else None,
        server=answering[0],
        server_port=answering[1] if ports else None,
    )


def filter_of(terms: Iterable[Term]) -> str:
    """The union.  Empty without a term, which to libpcap means everything."""
    left = _needed(terms)
    groups: dict[tuple[int, int], list[Term]] = {}
    for term in left:
        groups.setdefault((term.family, term.protocol), []).append(term)
    parts: list[str] = []
    for (family, protocol), members in groups.items():
        parts.append(_group(family, protocol, members))
        if family == 4 and protocol == Protocol.UDP:
            parts.append(_fragments(members))
    parts += _errors(left)
    return parts[0] if len(parts) == 1 else " or ".join(f"({part})" for part in parts)


def _needed(terms: Iterable[Term]) -> list[Term]:
    """Without those that others cover; in order."""
    distinct = list(dict.fromkeys(terms))
    return [
        term
        for term in distinct
        if not any(other is not term and other.covers(term) for other in distinct)
    ]


def _group(family: int, protocol: int, members: list[Term]) -> str:
    name = _NAMES.get(Protocol(protocol)) if protocol in _NAMES else None
    if protocol in (Protocol.ICMP, Protocol.ICMPV6):
        name = "icmp" if protocol == Protocol.ICMP else "icmp6"
    elif name is None:
        name = f"{'ip' if family == 4 else 'ip6'} proto {protocol}"
    conversations = [text for text in map(_conversation, members) if text]
    if len(conversations) < len(members):  # one of them is open on both sides
        return name
    if len(conversations) == 1:
        return f"{name} and {conversations[0]}"
    return f"{name} and ({' or '.join(f'({text})' for text in conversations)})"


def _conversation(term: Term) -> str:
    words: list[str] = []
    for address, port in ((term.client, term.client_port), (term.server, term.server_port)):
        if address is not None and f"host {address}" not in words:
            words.append(f"host {address}")
        if port is not None and f"port {port}" not in words:
            words.append(f"port {port}")
    return " and ".join(words)


def _fragments(members: list[Term]) -> str:
    """Later fragments have no ports."""
    hosts = dict.fromkeys(f"host {term.server}" for term in members if term.server is not None)
    where = " or ".join(hosts)
    if len(hosts) > 1:
        where = f"({where})"
    return "udp and ip[6:2] & 0x1fff != 0" + (f" and {where}" if where else "")


def _errors(terms: list[Term]) -> list[str]:
    """ICMP errors that quote a packet from or to the answering side."""
    parts: list[str] = []
    quoted = [t.server for t in terms if t.family == 4 and t.protocol != Protocol.ICMP]
    if quoted:
        numbers = dict.fromkeys(f"0x{int(server):08x}" for server in quoted if server is not None)
        # The quoted header begins at 8: its source is at 20, its destination at 24.
        places = [f"icmp[{at}:4] == {number}" for number in numbers for at in (24, 20)]
        kinds = "icmp[0] == 3 or icmp[0] == 11 or icmp[0] == 12"
        where = f" and ({' or '.join(places)})" if len(numbers) == len(set(quoted)) else ""
        parts.append(f"icmp and ({kinds}){where}")
    if any(t.family == 6 and t.protocol != Protocol.ICMPV6 for t in terms):
        parts.append("icmp6 and ip6[40] < 128")
    return parts
