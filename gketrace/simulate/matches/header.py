"""The conditions before any ``-m``: addresses, interfaces, protocol, fragment.

Source: ip_packet_match() in net/ipv4/netfilter/ip_tables.c, ip6_packet_match(); iptables-nft makes
the same of native expressions (add_addr(), add_iniface() in iptables/nft-shared.c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.packet import IPAddress
from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, integer
from gketrace.simulate.matches.base import negation
from gketrace.simulate.state import NO, YES, Answer, Environment, PacketState

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "Destination",
    "Fragment",
    "InInterface",
    "OutInterface",
    "ProtocolIs",
    "Source",
    "masked_address",
    "masked_text",
    "protocol_number_of",
    "protocol_text",
]


def masked_address(text: str, family: int) -> tuple[IPAddress, int]:
    """``10.0.0.0/8``, ``10.0.0.0/255.0.0.0``, ``fd00::/8`` → network address and mask bits.

    The mask may have holes.  Raises `ValueError`.
    """
    address_text, slash, mask_text = text.partition("/")
    address = ip_address(address_text)
    if address.version != family:
        raise ValueError(f"{address_text} is not IPv{family}")
    bits = 32 if family == 4 else 128
    full = (1 << bits) - 1
    if not slash:
        mask = full
    elif mask_text.isdigit():
        mask = full ^ (full >> integer(mask_text, 0, bits))
    else:
        mask = int(ip_address(mask_text))
    kind = IPv4Address if family == 4 else IPv6Address
    return kind(int(address) & mask), mask


def masked_text(address: IPAddress, mask: int) -> str:
    """As iptables-save prints it: a prefix length where the mask is one."""
    bits = address.max_prefixlen
    full = (1 << bits) - 1
    length = bits - (full ^ mask).bit_length()
    if mask == full ^ (full >> length):
        return f"{address}/{length}"
    return f"{address}/{type(address)(mask)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Match):
    """``-s ADDRESS[/MASK]``."""

    module: ClassVar[str] = "-s"
    OPTIONS: ClassVar[Mapping[str, int]] = {"-s": 1, "--source": 1, "--src": 1}

    address: IPAddress
    mask: int
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        address, mask = masked_address(options[0].value, family)
        return cls(address=address, mask=mask, negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        same = int(state.packet.src) & self.mask == int(self.address)
        return YES if same is not self.negated else NO

    def render(self) -> str:
        return f"{negation(self.negated)}-s {masked_text(self.address, self.mask)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination(Match):
    """``-d ADDRESS[/MASK]``."""

    module: ClassVar[str] = "-d"
    OPTIONS: ClassVar[Mapping[str, int]] = {"-d": 1, "--destination": 1, "--dst": 1}

    address: IPAddress
    mask: int
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        address, mask = masked_address(options[0].value, family)
        return cls(address=address, mask=mask, negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        same = int(state.packet.dst) & self.mask == int(self.address)
        return YES if same is not self.negated else NO

    def render(self) -> str:
        return f"{negation(self.negated)}-d {masked_text(self.address, self.mask)}"


def interface_is(name: str, pattern: str) -> bool:
    """`pattern` ending in ``+`` stands for all names that begin so, the empty one included."""
    if pattern.endswith("+"):
        return name.startswith(pattern[:-1])
    return name == pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class InInterface(Match):
    """``-i NAME``; a packet made here has none, and ``! -i NAME`` then matches."""

    module: ClassVar[str] = "-i"
    OPTIONS: ClassVar[Mapping[str, int]] = {"-i": 1, "--in-interface": 1}

    name: str
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        return cls(name=options[0].value, negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        same = interface_is(state.in_iface, self.name)
        return YES if same is not self.negated else NO

    def render(self) -> str:
        return f"{negation(self.negated)}-i {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutInterface(Match):
    """``-o NAME``."""

    module: ClassVar[str] = "-o"
    OPTIONS: ClassVar[Mapping[str, int]] = {"-o": 1, "--out-interface": 1}

    name: str
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        return cls(name=options[0].value, negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        same = interface_is(state.out_iface, self.name)
        return YES if same is not self.negated else NO

    def render(self) -> str:
        return f"{negation(self.negated)}-o {self.name}"


_PROTOCOLS: Final[dict[str, int]] = {
    "all": 0, "icmp": 1, "igmp": 2, "ggp": 3, "ipencap": 4, "ipip": 4, "st": 5, "tcp": 6, "egp": 8,
    "igp": 9, "pup": 12, "udp": 17, "hmp": 20, "xns-idp": 22, "rdp": 27, "iso-tp4": 29, "dccp": 33,
    "xtp": 36, "ddp": 37, "idpr-cmtp": 38, "ipv6": 41, "ipv6-route": 43, "ipv6-frag": 44,
    "idrp": 45, "rsvp": 46, "gre": 47, "esp": 50, "ipv6-crypt": 50, "ah": 51, "ipv6-auth": 51,
    "skip": 57, "icmpv6": 58, "ipv6-icmp": 58, "icmp6": 58, "ipv6-nonxt": 59, "ipv6-opts": 60,
    "rspf": 73, "vmtp": 81, "eigrp": 88, "ospf": 89, "ax.25": 93, "etherip": 97, "encap": 98,
    "pim": 103, "ipcomp": 108, "vrrp": 112, "l2tp": 115, "isis": 124, "sctp": 132, "fc": 133,
    "mobility-header": 135, "ipv6-mh": 135, "mh": 135, "udplite": 136, "mpls-in-ip": 137,
    "manet": 138, "hip": 139, "shim6": 140, "wesp": 141, "rohc": 142, "ethernet": 143,
}  # fmt: skip
"""Names that iptables-save may print: /etc/protocols and xtables_chain_protos."""
_PRINTED: Final[dict[int, str]] = {
    1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 50: "esp", 51: "ah", 58: "ipv6-icmp", 132: "sctp",
    136: "udplite",
}  # fmt: skip


def protocol_number_of(text: str) -> int:
    """A name of /etc/protocols or a number.  Raises `ValueError`."""
    number = _PROTOCOLS.get(text.lower())
    return integer(text, 0, 255) if number is None else number


def protocol_text(number: int) -> str:
    """As ``-p`` takes it on every machine: a well-known name, else the number."""
    return _PRINTED.get(number, str(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolIs(Match):
    """``-p PROTOCOL``."""

    module: ClassVar[str] = "-p"
    OPTIONS: ClassVar[Mapping[str, int]] = {"-p": 1, "--protocol": 1, "--proto": 1}

    number: int
    """0: any protocol."""
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        return cls(number=protocol_number_of(options[0].value), negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        if not self.number:
            return YES
        return YES if (state.packet.protocol == self.number) is not self.negated else NO

    def render(self) -> str:
        return f"{negation(self.negated)}-p {protocol_text(self.number)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment(Match):
    """``-f``: second and later fragments (IPv4 only)."""

    module: ClassVar[str] = "-f"
    OPTIONS: ClassVar[Mapping[str, int]] = {"-f": 0, "--fragment": 0, "--fragments": 0}

    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        return cls(negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return YES if state.packet.fragment is not self.negated else NO

    def render(self) -> str:
        return f"{negation(self.negated)}-f"
