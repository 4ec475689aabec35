"""Matches: what ``-m NAME`` (and the options before any ``-m``) ask of a packet.

To add one: a class in a file here with its options, `parse`, `evaluate` and `render`; its line in
`MATCHES`; a test in tests/core/simulate.  A module that is not in `MATCHES` becomes an
`UnknownMatch`, which answers UNKNOWN with the text of the rule.
"""

from __future__ import annotations

from typing import Final

from gketrace.ruleset.model import Match
from gketrace.simulate.matches.addresses import AddrtypeMatch, IprangeMatch
from gketrace.simulate.matches.always import CommentMatch, NfacctMatch
from gketrace.simulate.matches.base import UnknownMatch
from gketrace.simulate.matches.conntrack import ConntrackMatch, StateMatch
from gketrace.simulate.matches.device import MacMatch, OwnerMatch, PhysdevMatch, RpfilterMatch
from gketrace.simulate.matches.fields import (
    DscpMatch,
    EcnMatch,
    HlMatch,
    LengthMatch,
    TosMatch,
    TtlMatch,
)
from gketrace.simulate.matches.header import (
    Destination,
    Fragment,
    InInterface,
    OutInterface,
    ProtocolIs,
    Source,
)
from gketrace.simulate.matches.icmp import Icmp6Match, IcmpMatch
from gketrace.simulate.matches.ipset import SetMatch
from gketrace.simulate.matches.mark import ConnmarkMatch, MarkMatch
from gketrace.simulate.matches.ports import (
    DccpMatch,
    MultiportMatch,
    SctpMatch,
    TcpMatch,
    UdpliteMatch,
    UdpMatch,
)
from gketrace.simulate.matches.recent import RecentMatch
from gketrace.simulate.matches.statistic import StatisticMatch
from gketrace.simulate.matches.undecided import UNDECIDED

__all__ = ["HEADER", "MATCHES", "Match", "UnknownMatch", "implied_match"]

HEADER: Final[tuple[type[Match], ...]] = (
    Source,
    Destination,
    InInterface,
    OutInterface,
    ProtocolIs,
    Fragment,
)
"""Options that need no ``-m``."""

MATCHES: Final[tuple[type[Match], ...]] = (
    AddrtypeMatch,
    CommentMatch,
    ConnmarkMatch,
    ConntrackMatch,
    DccpMatch,
    DscpMatch,
    EcnMatch,
    HlMatch,
    Icmp6Match,
    IcmpMatch,
    IprangeMatch,
    LengthMatch,
    MacMatch,
    MarkMatch,
    MultiportMatch,
    NfacctMatch,
    OwnerMatch,
    PhysdevMatch,
    RecentMatch,
    RpfilterMatch,
    SctpMatch,
    SetMatch,
    StateMatch,
    StatisticMatch,
    TcpMatch,
    TosMatch,
    TtlMatch,
    UdpMatch,
    UdpliteMatch,
    *UNDECIDED,
)
"""Every match that is understood, by its name after ``-m``."""

_IMPLIED: Final[dict[str, str]] = {
    "tcp": "tcp", "6": "tcp", "udp": "udp", "17": "udp", "sctp": "sctp", "132": "sctp",
    "udplite": "udplite", "136": "udplite", "dccp": "dccp", "33": "dccp", "icmp": "icmp",
    "1": "icmp", "icmpv6": "icmp6", "ipv6-icmp": "icmp6", "icmp6": "icmp6", "58": "icmp6",
}  # fmt: skip


def implied_match(protocol: str) -> str | None:
    """The match that ``-p PROTOCOL`` loads by itself: ``-p tcp --dport 80`` is understood."""
    return _IMPLIED.get(protocol)
