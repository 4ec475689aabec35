"""Other namespaces' addresses and names out of a reply.

Every string of every message is searched, so a field that is new is masked, too.  An address that
is not known to be visible gets another in its place, out of 0.0.0.0/8 or 100::/64, which no packet
ever carries (RFC 1122 3.2.1.3, RFC 6666).  Within one call the same address gets the same one; two
calls have nothing in common, so that nothing can be joined by it.  Networks of more than 16
addresses stay: they name nobody.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from gketrace.packet import IPAddress

__all__ = ["Masker", "is_masked"]

_V4: Final = r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)"
_MAC: Final = r"(?<![0-9a-fA-F:])(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}(?![0-9a-fA-F:])"
_V6: Final = r"(?<![0-9a-zA-Z:])(?=[0-9a-fA-F]*:[0-9a-fA-F:.]*:)[0-9a-fA-F:]+(?:\d+(?:\.\d+){3})?"
_FOUND: Final = re.compile(rf"(?P<mac>{_MAC})|(?P<ip>{_V6}|{_V4})(?P<length>/\d{{1,3}})?")
_COMMENT: Final = re.compile(r'(comment\s+\\?"?)([a-z0-9][-a-z0-9]*)/([a-z0-9][-a-z0-9.]*)')
"""kube-proxy's comments: ``NAMESPACE/SERVICE:PORT``."""
_CHAIN: Final = re.compile(r"-([a-z0-9][-a-z0-9]*)/([a-z0-9][-a-z0-9.]*)(?=/(?:tcp|udp|sctp)/)")
"""kube-proxy's nftables chains: ``service-HASH-NAMESPACE/SERVICE/tcp/PORT``."""
_CNI_MAC: Final = "0a:58:"
"""CNI plugins make a pod's MAC of this and its IPv4 address (utils/hwaddr)."""
_WIDE: Final = 4
"""A network with more host bits than this names nobody."""
_NOBODY: Final = "masked"


def is_masked(address: IPAddress) -> bool:
    if isinstance(address, IPv4Address):
        return int(address) >> 24 == 0 and int(address) != 0
    return int(address) >> 64 == 0x0100 << 48


class Masker:
    """For one call."""

    def __init__(
        self,
        visible: Callable[[IPAddress], bool],
        namespaces: tuple[str, ...],
        before: Masker | None = None,
    ) -> None:
        """`before`: of the same call, whose stand-ins and counts stay."""
        self._visible = visible
        self._namespaces = namespaces
        self._key: bytes = secrets.token_bytes(16) if before is None else before._key
        self._made: dict[IPAddress, IPAddress] = {} if before is None else before._made
        self.withheld: int = 0 if before is None else before.withheld
        """Entries left out whole; counted by who leaves them out."""

    @property
    def masked(self) -> int:
        """Addresses that got another in their place."""
        return len(self._made)

    def address(self, address: IPAddress) -> IPAddress:
        if _harmless(address) or self._visible(address):
            return address
        if address not in self._made:
            digest = hashlib.blake2b(address.packed, key=self._key, digest_size=8).digest()
            number = int.from_bytes(digest)
            self._made[address] = (
                IPv4Address(number % 0xFFFFFF + 1)
                if address.version == 4
                else IPv6Address((0x0100 << 112) | number)
            )
        return self._made[address]

    def text(self, text: str) -> str:
        """`text` with every address and every Service's name seen to."""
        if "/" in text:
            text = _COMMENT.sub(self._comment, text)
            text = _CHAIN.sub(self._chain, text)
        return _FOUND.sub(self._found, text)

    def message(self, message: Message) -> None:
        """In place, all the way down.  Bytes are text, or are left out."""
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                self._messages(field, value)
            elif field.type == FieldDescriptor.TYPE_STRING:
                if field.is_repeated:
                    value[:] = [self.text(one) for one in value]
                else:
                    setattr(message, field.name, self.text(value))
            elif field.type == FieldDescriptor.TYPE_BYTES:
                if field.name == "text":
                    setattr(message, field.name, self.text(value.decode(errors="replace")).encode())
                else:
                    message.ClearField(field.name)

    def _messages(self, field: FieldDescriptor, value: Any) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of = field.message_type.fields_by_name["value"]
            for key in list(value):
                if of.type == FieldDescriptor.TYPE_STRING:
                    value[key] = self.text(value[key])
                elif of.type == FieldDescriptor.TYPE_MESSAGE:
                    self.message(value[key])
        elif field.is_repeated:
            for one in value:
                self.message(one)
        else:
            self.message(value)

    def _found(self, found: re.Match[str]) -> str:
        whole = found[0]
        if found["mac"]:
            if not whole.lower().startswith(_CNI_MAC):
                return whole
            inside = IPv4Address(bytes.fromhex(whole.replace(":", ""))[2:])
            if _harmless(inside) or self._visible(inside):
                return whole
            packed = self.address(inside).packed
            return _CNI_MAC + ":".join(f"{byte:02x}" for byte in packed)
        try:
            address = ip_address(found["ip"])
        except ValueError:
            return whole
        if found["length"]:
            try:
                network = ip_network(whole)
            except ValueError:
                pass  # host bits are set, or a port follows the slash: an address
            else:
                if network.max_prefixlen - network.prefixlen > _WIDE:
                    return whole
        made = self.address(address)
        return whole if made == address else f"{made}{found['length'] or ''}"

    def _comment(self, found: re.Match[str]) -> str:
        if found[2] in self._namespaces:
            return found[0]
        return f"{found[1]}{_NOBODY}/{_NOBODY}"

    def _chain(self, found: re.Match[str]) -> str:
        # HASH-NAMESPACE: the namespace is what follows the first dash, or the second.
        if any(found[1] == ns or found[1].endswith(f"-{ns}") for ns in self._namespaces):
            return found[0]
        return f"-{_NOBODY}/{_NOBODY}"


def _harmless(address: IPAddress) -> bool:
    return (
        address.is_loopback
        or address.is_unspecified
        or address.is_multicast
        or address.is_link_local
        or int(address) == 0xFFFFFFFF
    )
