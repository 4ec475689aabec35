"""What a rule compares: interfaces, protocols, addresses, ports and marks.

iptables-nft loads a field into a register, masks it perhaps, and compares it.  In iptables' words
that is ``-i``, ``-p``, ``-s`` and so on, or one match of tcp, udp or mark.

Source: kernel net/netfilter/nft_meta.c, nft_payload.c, nft_bitwise.c, nft_cmp.c, nft_range.c;
iptables 1.8.9 iptables/nft-shared.c (nft_parse_cmp, nft_parse_transport,
port_match_single_to_range, parse_ifname), nft-ipv4.c and nft-ipv6.c (``parse_payload``).
"""

from __future__ import annotations

import sys
from typing import Final

from gketrace_agent.kernel.nft_rules.matches_header import ports_text, tcp_flags
from gketrace_agent.kernel.nft_rules.places import (
    Place,
    Places,
    numbers,
    value_of,
    value_place,
)
from gketrace_agent.kernel.nft_rules.reading import TCP, UDP, Load, Reading
from gketrace_agent.kernel.nft_rules.template import Pieces, Value
from gketrace_agent.kernel.nft_rules.words import (
    NotRendered,
    address,
    inverted,
    mark_and_mask,
    prefix_length,
    protocol_name,
)

__all__ = ["read_bitwise", "read_cmp", "read_meta", "read_payload", "read_range"]

_EQ, _NEQ, _LT, _LTE, _GT, _GTE = range(6)
"""NFT_CMP_*."""
_META_MARK, _META_IIFNAME, _META_OIFNAME, _META_L4PROTO, _META_NFTRACE = 3, 6, 7, 16, 12
_NETWORK, _TRANSPORT = 1, 2
"""NFT_PAYLOAD_*_HEADER."""
_OFFSETS: Final = {4: (12, 16, 4), 6: (8, 24, 16)}
"""Of source and destination in the IP header, and an address's length."""
_IFNAMSIZ: Final = 16
_REGISTER_SIZE: Final = 16
_NOT_ANY: Final = b"INVAL/D\0"
"""The name that iptables compares with for ``! -i +``: no interface has it."""


def read_meta(family: int, rule: Reading, data: bytes, attributes: Places) -> None:
    """A field of the packet's metadata is loaded; or the trace is turned on, which is a target."""
    found = numbers(data, attributes, {1, 2, 3}, "meta")
    if 3 in found:
        load = rule.registers.get(found[3])
        if found[2] != _META_NFTRACE or load is None or load != Load("immediate", (1,)):
            raise NotRendered(f"meta key {found[2]} set")
        rule.finish(" -j TRACE")
        return
    _hold(rule, found[1], Load("meta", (found[2],)))


def read_payload(family: int, rule: Reading, data: bytes, attributes: Places) -> None:
    """Bytes of a header are loaded."""
    found = numbers(data, attributes, {1, 2, 3, 4}, "payload")
    if found[4] > _REGISTER_SIZE:
        raise NotRendered(f"payload of {found[4]} bytes")
    _hold(rule, found[1], Load("payload", (found[2], found[3], found[4])))


def read_bitwise(family: int, rule: Reading, data: bytes, attributes: Places) -> None:
    """What is loaded is masked."""
    values = {key: attributes[key] for key in attributes if key not in (4, 5)}
    found = numbers(data, values, {1, 2, 3, 6}, "bitwise")
    load = rule.registers.get(found[1])
    mask, xor = (value_of(data, attributes[key]) for key in (4, 5))
    if load is None or load.mask is not None or found.get(6, 0) or any(xor):
        raise NotRendered("bitwise of another kind")
    if len(mask) != found[3]:
        raise NotRendered("bitwise of another length")
    _hold(rule, found[2], load._replace(mask=mask))


def read_cmp(family: int, rule: Reading, data: bytes, attributes: Places) -> None:
    """What is loaded is compared with a value: an option, or a match."""
    values = {key: attributes[key] for key in attributes if key != 3}
    found = numbers(data, values, {1, 2}, "cmp")
    load = rule.registers.get(found[1])
    value = value_place(data, attributes[3])
    if load is None or load.kind == "immediate":
        raise NotRendered("cmp of a register that holds nothing")
    if load.kind == "meta":
        _meta_test(family, rule, data, load, found[2], value)
    elif load.key[0] == _NETWORK:
        _network_test(family, rule, data, load, found[2], value)
    elif load.key[0] == _TRANSPORT:
        _transport_test(family, rule, data, load, found[2], value)
    else:
        raise NotRendered(f"cmp of payload base {load.key[0]}")


def _meta_test(
    family: int, rule: Reading, data: bytes, load: Load, operator: int, at: Place
) -> None:
    (key,) = load.key
    off = inverted(_equality(operator))
    value = data[at.start : at.end]
    if key == _META_MARK and len(value) == 4 == len(load.mask or value):
        mask = 0xFFFFFFFF if load.mask is None else int.from_bytes(load.mask, sys.byteorder)
        mark = int.from_bytes(value, sys.byteorder)
        rule.matches.append([f" -m mark{off} --mark {mark_and_mask(mark, mask)}"])
    elif key in (_META_IIFNAME, _META_OIFNAME) and load.mask is None:
        option = "i" if key == _META_IIFNAME else "o"
        if value == _NOT_ANY and not off:
            rule.put(option, [f" ! -{option} +"])
        else:
            rule.put(option, [f"{off} -{option} ", Value(at.start, at.end, _interface)])
            _interface(value)
    elif key == _META_L4PROTO and load.mask is None and len(value) == 1:
        _protocol(rule, off, value[0])
    else:
        raise NotRendered(f"test of meta key {key}")


def _protocol(rule: Reading, off: str, number: int) -> None:
    if not number:
        raise NotRendered("protocol 0")
    rule.put("p", [f"{off} -p {protocol_name(number)}"])
    rule.protocol = 0 if off else number


def _network_test(
    family: int, rule: Reading, data: bytes, load: Load, operator: int, at: Place
) -> None:
    _, offset, length = load.key
    value, off = data[at.start : at.end], inverted(_equality(operator))
    source, destination, size = _OFFSETS[family]
    if len(value) != length:
        raise NotRendered(f"{len(value)} bytes compared with {length}")
    if offset in (source, destination) and length <= size:
        option = "s" if offset == source else "d"
        rule.put(option, _address(family, load, off, option, value, at))
    elif family == 4 and (offset, length) == (9, 1) and load.mask is None:
        _protocol(rule, off, value[0])
    elif family == 4 and (offset, load.mask, value) == (6, b"\x1f\xff", b"\0\0"):
        # The fragment offset is 0: not a fragment.
        rule.put("f", [" -f" if off else " ! -f"])
    else:
        raise NotRendered(f"test of the IP header at {offset}")


def _address(family: int, load: Load, off: str, option: str, value: bytes, at: Place) -> Pieces:
    size = _OFFSETS[family][2]
    mask = b"\xff" * len(value) if load.mask is None else load.mask
    mask = mask.ljust(size, b"\0")
    if not any(mask):
        raise NotRendered("an address of no bits")
    length = prefix_length(mask)
    behind = f"/{address(mask, family) if length < 0 else length}"

    def show(found: bytes) -> str:
        return address(found.ljust(size, b"\0"), family)

    return [f"{off} -{option} ", Value(at.start, at.end, show), behind]


def _transport_test(
    family: int, rule: Reading, data: bytes, load: Load, operator: int, at: Place
) -> None:
    _, offset, length = load.key
    size = at.end - at.start
    options = _transport(rule)
    if size != length:
        raise NotRendered(f"{size} bytes compared with {length}")
    if (offset, length, rule.protocol) == (13, 1, TCP):
        off = inverted(_equality(operator))
        mask = 0xFF if load.mask is None else load.mask[0]
        if not mask and not off:
            raise NotRendered("tcp flags without a mask")
        text = f"{off} --tcp-flags {tcp_flags(mask, data[at.start])}"
        _once(options, "--tcp-flags", [text])
    elif load.mask is not None:
        raise NotRendered("ports with a mask")
    elif (offset, length) == (0, 4):
        off = inverted(_equality(operator))
        for option, start in (("--sport", at.start), ("--dport", at.start + 2)):
            _once(options, option, [f"{off} {option} ", Value(start, start + 2, None)])
    elif offset in (0, 2) and length == 2:
        option = "--dport" if offset else "--sport"
        _once(options, option, _port(option, operator, data, at))
    else:
        raise NotRendered(f"test of the transport header at {offset}")


def _transport(rule: Reading) -> dict[str, Pieces]:
    if rule.protocol not in (TCP, UDP):
        raise NotRendered(f"ports of protocol {rule.protocol}")
    if rule.transport is None:
        rule.transport = {}
        rule.transport_at = len(rule.matches)
        rule.matches.append([])
    return rule.transport


def read_range(family: int, rule: Reading, data: bytes, attributes: Places) -> None:
    """A port is in a range."""
    values = {key: attributes[key] for key in attributes if key not in (3, 4)}
    found = numbers(data, values, {1, 2}, "range")
    load = rule.registers.get(found[1])
    low, high = (value_of(data, attributes[key]) for key in (3, 4))
    known = load is not None and load.kind == "payload" and load.mask is None
    if load is None or not known or (load.key[0], load.key[2]) != (_TRANSPORT, 2):
        raise NotRendered("range of another kind")
    if load.key[1] not in (0, 2) or len(low) != 2 or len(high) != 2:
        raise NotRendered(f"range of the transport header at {load.key[1]}")
    option = "--dport" if load.key[1] else "--sport"
    off = inverted(_equality(found[2]))
    text = ports_text(int.from_bytes(low, "big"), int.from_bytes(high, "big"))
    _once(_transport(rule), option, [f"{off} {option} {text}"])


def _hold(rule: Reading, register: int, load: Load) -> None:
    """Registers 1 to 4 have 16 bytes each; others lie within them and could overlap."""
    if not 1 <= register <= 4:
        raise NotRendered(f"register {register}")
    rule.registers[register] = load


def _port(option: str, operator: int, data: bytes, at: Place) -> Pieces:
    """A comparison of one port: as iptables makes ranges of those that are not for equality."""
    if operator in (_EQ, _NEQ):
        return [f"{inverted(operator)} {option} ", Value(at.start, at.end, None)]
    port = int.from_bytes(data[at.start : at.end], "big")
    low, high = {
        _LT: (0, max(port - 1, 1)),
        _LTE: (0, port),
        _GT: (min(port + 1, 0xFFFF), 0xFFFF),
        _GTE: (port, 0xFFFF),
    }[operator]
    return [] if (low, high) == (0, 0xFFFF) else [f" {option} {ports_text(low, high)}"]


def _once(options: dict[str, Pieces], option: str, pieces: Pieces) -> None:
    if option in options:
        raise NotRendered(f"two tests for {option}")
    options[option] = pieces


def _equality(operator: int) -> bool:
    """True for "not equal"; of nft_cmp and nft_range alike."""
    if operator > _NEQ:
        raise NotRendered(f"comparison {operator}")
    return operator == _NEQ


def _interface(data: bytes) -> str:
    """``eth0`` of bytes with a NUL, ``eth+`` of those without."""
    if data == _NOT_ANY:
        # As iptables-nft-save: of a comparison for equality this is another text.
        raise NotRendered("an interface of the name for none")
    name, ended, behind = data.partition(b"\0")
    if not name or any(behind) or (not ended and len(name) >= _IFNAMSIZ - 1):
        raise NotRendered("an interface's name of another kind")
    return name.decode("latin-1") + ("" if ended else "+")
