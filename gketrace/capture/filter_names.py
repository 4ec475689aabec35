"""Whether a capture filter may have names in it that libpcap asks a name server for.

libpcap resolves a host's name while it compiles (pcap_nametoaddrinfo()), and waits as long as the
name server lets it.  A word that is no keyword, number or address may be such a name.  To say so of
one that is not costs a process; so words that are rare are left out of the list.

Source: pcap-filter(7); libpcap scanner.l.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Final

__all__ = ["names_in"]

_KEYWORDS: Final = frozenset(
    """
    and or not
    dst src host net mask port portrange proto protochain gateway type subtype dir direction
    less greater byte broadcast multicast len length inbound outbound ifindex vlan mpls pppoed
    pppoes geneve
    link ether wlan arp rarp ip sctp tcp udp icmp igmp igrp pim vrrp carp ip6 icmp6 ah esp stp
    tcpflags tcp-fin tcp-syn tcp-rst tcp-push tcp-ack tcp-urg tcp-ece tcp-cwr
    icmptype icmpcode icmp-echoreply icmp-unreach icmp-sourcequench icmp-redirect icmp-echo
    icmp-routeradvert icmp-routersolicit icmp-timxceed icmp-paramprob icmp-tstamp icmp-tstampreply
    icmp6type icmp6code icmp6-destinationunreach icmp6-packettoobig icmp6-timeexceeded
    icmp6-parameterproblem icmp6-echo icmp6-echoreply icmp6-routersolicit icmp6-routeradvert
    icmp6-neighborsolicit icmp6-neighboradvert icmp6-redirect
    """.split()
)
_BETWEEN: Final = re.compile(r"[\s!&|()\[\]<>=+*/^~%,]+")
_NUMBER: Final = re.compile(
    r"\d+(\.\d+){0,3}|0x[0-9a-fA-F]+|\d+:\d+|([0-9a-fA-F]{1,2}:){5}[0-9a-fA-F]{1,2}"
)
"""Also networks, slices of packets (``ip[6:2]``) and link addresses."""
_LOCAL: Final = frozenset({"port", "portrange", "proto", "protochain"})
"""What follows one is in /etc/services or /etc/protocols, or unknown."""


def names_in(text: str) -> tuple[str, ...]:
    """The words of a filter that may be names for a name server; empty: none is."""
    found: dict[str, None] = {}
    before = ""
    for word in _BETWEEN.split(text):
        if word and before not in _LOCAL and not _is_known(word):
            found[word] = None
        before = word or before
    return tuple(found)


def _is_known(word: str) -> bool:
    if word in _KEYWORDS or _NUMBER.fullmatch(word):
        return True
    try:
        ip_address(word)
    except ValueError:
        return False
    return True
