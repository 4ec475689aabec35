"""Masks for addresses, names and kube-proxy's hashes: one key for a bundle, thrown away after.

The same value is masked the same way everywhere.  Two IP addresses that share their first n bits
share just so many after masking (as Crypto-PAn, Xu et al. 2002), so that routes, rules and the
longest prefix decide as before; an address stays private, public, link-local or multicast.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from gketrace.packet import IPAddress
from gketrace.snapshot import IPNetwork
from gketrace_cli.balancers import EXTERNAL, OTHERS, source

__all__ = ["ADDRESS", "MAC", "Masks"]

_KEPT4: Final = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")
_KEPT6: Final = ("::/96", "ff00::/8")
"""They say the same in every cluster."""
_CLASSES4: Final = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
_CLASSES6: Final = ("fe80::/10", "fc00::/7", "2000::/3")
_SHARED: Final = frozenset({100, 169, 172, 192})
"""First octets that public addresses share with others: of those the second is kept too, so that
no two addresses get one mask."""
_PUBLIC: Final = (
    "8.8.8.8",
    "2001:4860:4860::8888",
    *(source(network) for network in {*EXTERNAL, *OTHERS}),
)
"""What a check takes for addresses outside of the cluster: no bit of them is masked, nor of the
networks that they are in."""

ADDRESS: Final = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4})"
    r"(?:/\d{1,3}(?![\d.]))?(?![\w]|\.\d)"
)
"""A candidate: what does not parse is left."""
MAC: Final = re.compile(r"(?<![0-9A-Fa-f:])[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}(?![0-9A-Fa-f:])")


class Masks:
    """One key's masks."""

    def __init__(self, key: bytes) -> None:
        self._key: Final = key
        self._bit = cache(self._flip)
        self._open: Final = {
            (one.version, f"{int(one):0{one.max_prefixlen}b}"[:at])
            for one in map(ip_address, _PUBLIC)
            for at in range(one.max_prefixlen)
        }
        self._networks: Final = {
            4: ([ip_network(n) for n in _KEPT4], [ip_network(n) for n in _CLASSES4]),
            6: ([ip_network(n) for n in _KEPT6], [ip_network(n) for n in _CLASSES6]),
        }
        self.address = cache(self._address)

    def _digest(self, *parts: str) -> bytes:
        return hmac.digest(self._key, "\0".join(parts).encode(), "sha256")

    def _flip(self, version: int, bits: str) -> int:
        if (version, bits) in self._open:
            return 0
        return self._digest("bit", str(version), bits)[0] & 1

    def _address(self, address: IPAddress) -> IPAddress:
        kept, classes = self._networks[address.version]
        if any(address in network for network in kept):
            return address
        fixed = next((n.prefixlen for n in classes if address in n), 16)
        if address.version == 4 and fixed == 16 and address.packed[0] not in _SHARED:
            fixed = 8
        width = address.max_prefixlen
        bits = f"{int(address):0{width}b}"
        made = bits[:fixed] + "".join(
            str(int(bits[at]) ^ self._bit(address.version, bits[:at])) for at in range(fixed, width)
        )
        number = int(made, 2)
        return IPv4Address(number) if address.version == 4 else IPv6Address(number)

    def network(self, network: IPNetwork) -> IPNetwork:
        """The same length."""
        masked = self.address(network.network_address)
        return ip_network(f"{masked}/{network.prefixlen}", strict=False)

    def text(self, text: str) -> str:
        """Every address, network and hardware address in a text."""
        return ADDRESS.sub(self._candidate, MAC.sub(lambda m: self.mac(m[0]), text))

    def _candidate(self, match: re.Match[str]) -> str:
        text = match[0]
        address, slash, length = text.partition("/")
        try:
            if not slash:
                return str(self.address(ip_address(address)))
            whole = ip_network(text, strict=False)
            if whole.network_address == ip_address(address):
                return str(self.network(whole))
            return f"{self.address(ip_address(address))}/{length}"
        except ValueError:
            return text

    def mac(self, mac: str) -> str:
        """Also unicast, and set by an administrator; a pod's may be made of its IP address."""
        raw = bytes.fromhex(mac.replace(":", ""))
        if raw[0] & 1 or not any(raw):
            return mac
        return "02:" + ":".join(f"{octet:02x}" for octet in self._digest("mac", mac.lower())[:5])

    def name(self, name: str) -> str:
        """Fit to be a Kubernetes name; parts around dots are masked one by one."""
        return ".".join(f"x{self._hex(part, 10)}" if part else "" for part in name.split("."))

    def _hex(self, text: str, length: int) -> str:
        return hashlib.sha256(self._digest("name", text)).hexdigest()[:length]

    def letters(self, text: str, alphabet: str) -> str:
        """As long as `text`, in that alphabet: for hashes whose origin is not known."""
        digest = self._digest("letters", text)
        return "".join(alphabet[digest[at % 32] % len(alphabet)] for at in range(len(text)))
