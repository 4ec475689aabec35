"""Rule sets of our own making, for what random ones reach too seldom."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIXED", "FixedSet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSet:
    """One set, IPv4."""

    name: str
    text: str
    cases: int
    """Packets sent through it."""
    load: tuple[str, ...] = ("iptables-nft-restore",)
    """The command that reads `text`."""
    table: str = ""
    """The table of nftables that it makes; none: tables of iptables."""


_TRANSLATIONS = """\
*raw
-A PREROUTING -p sctp -j NOTRACK
-A OUTPUT -p sctp -j NOTRACK
COMMIT
*nat
-A PREROUTING -p udp -m udp --dport 53 -j REDIRECT --to-ports 8080
-A PREROUTING -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.40.0.6:8080
-A PREROUTING -d 10.142.0.0/24 -p tcp -m tcp --dport 80 -j NETMAP --to 10.40.0.0/24
-A OUTPUT -p udp -m udp --dport 80 -j REDIRECT
-A OUTPUT -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.40.0.10
-A POSTROUTING -o eth0 -p tcp -j SNAT --to-source 10.142.0.8
-A POSTROUTING -o eth1 -p udp -j MASQUERADE
-A POSTROUTING -p sctp -j MASQUERADE
COMMIT
*filter
-A FORWARD -m conntrack --ctstate UNTRACKED -j ACCEPT
-A FORWARD -m conntrack --ctstate DNAT
-A FORWARD -m conntrack --ctstate SNAT
COMMIT
"""

_TEMPLATES = """\
*raw
-A PREROUTING -j CT --zone 5
-A PREROUTING -m conntrack --ctstate NEW
-A PREROUTING -m conntrack --ctstate INVALID
-A PREROUTING -m conntrack --ctstatus CONFIRMED
-A PREROUTING -m conntrack --ctstatus NONE
-A PREROUTING -m conntrack --ctorigsrc 0.0.0.0/1
-A PREROUTING -m conntrack ! --ctrepldst 10.0.0.0/8
-A PREROUTING -p tcp -m conntrack ! --ctproto 6
-A PREROUTING -m conntrack --ctdir ORIGINAL
-A PREROUTING -m state --state UNTRACKED
-A PREROUTING -j NOTRACK
-A PREROUTING -m state --state UNTRACKED
-A OUTPUT -p tcp -j NOTRACK
-A OUTPUT -j CT --zone 5
-A OUTPUT -m state --state UNTRACKED
-A OUTPUT -m state --state NEW
COMMIT
"""
"""What a CT target attaches before tracking looks."""

_NFT_TEMPLATES = """\
table ip gktemplates {
  chain in { type filter hook prerouting priority -299;
    ct zone set 5
    ct state new
    ct state invalid
    ct direction original
    ct status confirmed
    ct zone 5
    ct l3proto ipv4
    ct original ip saddr 0.0.0.0
    ct mark set 0x5
    ct mark 0x5
    notrack
    ct state untracked
  }
  chain out { type filter hook output priority -299;
    notrack
    ct zone set 5
    ct state untracked
    ct state new
  }
  chain post { type filter hook postrouting priority 0;
    ct state untracked
    ct state new
    ct zone 5
    ct mark 0x5
  }
}
"""

FIXED = (
    FixedSet(name="translations", text=_TRANSLATIONS, cases=120),
    FixedSet(name="templates", text=_TEMPLATES, cases=25),
    FixedSet(
        name="nftables templates",
        text=_NFT_TEMPLATES,
        cases=25,
        load=("nft", "-f", "-"),
        table="ip gktemplates",
    ),
)
