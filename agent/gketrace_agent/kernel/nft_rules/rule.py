"""One rule: from nf_tables expressions to the line that iptables-nft-save -c prints.

iptables-nft writes addresses, interfaces, protocols, ports, marks and rates as nf_tables' own
expressions, and all else as xtables' matches and targets inside of them.  Which of both differs
between its versions; what is in the kernel is read, whoever wrote it, as long as it is one of the
forms below.  Anything else raises `NotRendered`.

Source: kernel net/netfilter/nf_tables_api.c, nft_*.c, nft_compat.c (the dump functions);
include/uapi/linux/netfilter/nf_tables.h; iptables 1.8.9 iptables/nft-shared.c, nft-ipv4.c,
nft-ipv6.c, nft.c (add_match, add_action), xshared.c (save_rule_details).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from typing import Final

from gketrace_agent.kernel.nft_rules import compares
from gketrace_agent.kernel.nft_rules.matches import MATCHES
from gketrace_agent.kernel.nft_rules.places import Places, expressions, number, numbers, places
from gketrace_agent.kernel.nft_rules.reading import Load, Reading
from gketrace_agent.kernel.nft_rules.sets import SetNames
from gketrace_agent.kernel.nft_rules.targets import TARGETS, nflog_text
from gketrace_agent.kernel.nft_rules.template import Template, Value
from gketrace_agent.kernel.nft_rules.words import NotRendered, quoted, rate, string

__all__ = ["RuleReader"]

_HANDLE, _EXPRESSIONS, _POSITION, _USERDATA = 3, 4, 6, 7
"""NFTA_RULE_*."""
_ACCEPT, _DROP, _JUMP, _GOTO, _RETURN = 1, 0, -3, -4, -5
"""NF_* and NFT_*."""
_KEPT: Final = 4096
"""Texts of different matches and targets that are remembered."""
_SHAPES: Final = 2048
"""Templates that are kept; more of the same length than this are not tried."""
_SHAPES_OF_LENGTH: Final = 64


class RuleReader:
    """Reads the rules of one IP version of one namespace."""

    def __init__(self, family: int, sets: SetNames) -> None:
        self._family = family
        self._sets = sets
        self._templates: dict[int, list[Template]] = {}
        self._count = 0
        self._shows: dict[tuple[str, str, int], Callable[[bytes], str]] = {}

    def line(self, data: bytes, chain: str) -> str:
        """The line of a rule of `chain`; `data`: its attributes behind those of table and chain.

        Raises `NotRendered` for what is not known, and for bytes that are no rule.
        """
        try:
            for template in self._templates.get(len(data), ()):
                line = template.line(data, chain)
                if line is not None:
                    return line
        except NotRendered:
            pass  # a value that its shape does not fit: it may have a shape of its own
        try:
            template = self._read(data)
        except (KeyError, IndexError, ValueError, struct.error) as error:
            raise NotRendered(f"an expression of another form: {error}") from None
        line = template.line(data, chain)
        assert line is not None  # it was made from these bytes
        self._keep(len(data), template)
        return line

    def _keep(self, length: int, template: Template) -> None:
        if self._count >= _SHAPES:
            self._templates.clear()
            self._count = 0
        of_length = self._templates.setdefault(length, [])
        if len(of_length) < _SHAPES_OF_LENGTH:
            of_length.append(template)
            self._count += 1

    def _read(self, data: bytes) -> Template:
        rule = Reading()
        parts = places(data, 0, len(data))
        if set(parts) - {_HANDLE, _EXPRESSIONS, _POSITION, _USERDATA}:
            raise NotRendered(f"a rule with attributes {sorted(parts)}")
        for name, attributes in expressions(data, *parts[_EXPRESSIONS]):
            if rule.end is not None:
                raise NotRendered(f"expression {name} behind the target")
            if compare := _COMPARES.get(name):
                compare(self._family, rule, data, attributes)
            elif read := _READERS.get(name):
                read(self, rule, data, attributes)
            else:
                raise NotRendered(f"expression {name}")
        if _USERDATA in parts:
            comment = _comment(data[slice(*parts[_USERDATA])])
            if comment is not None:
                rule.matches.append([f" -m comment --comment {quoted(comment[:255])}"])
        unseen = [Value(*parts[key], bytes) for key in (_HANDLE, _POSITION) if key in parts]
        return Template(data, rule.counters, rule.rest(), unseen)

    def _counter(self, rule: Reading, data: bytes, attributes: Places) -> None:
        octets, packets = attributes[1], attributes[2]
        sizes = {attribute.end - attribute.start for attribute in (octets, packets)}
        if rule.counters is not None or sizes != {8} or set(attributes) - {1, 2, 3}:
            raise NotRendered("counter of another kind")
        rule.counters = Value(*packets, None), Value(*octets, None)

    def _match(self, rule: Reading, data: bytes, attributes: Places) -> None:
        rule.matches.append([self._extension("match", data, attributes)])

    def _target(self, rule: Reading, data: bytes, attributes: Places) -> None:
        rule.finish(self._extension("target", data, attributes))

    def _extension(self, kind: str, data: bytes, attributes: Places) -> Value:
        """A match or target of xtables: name, revision, struct."""
        if set(attributes) != {1, 2, 3}:
            raise NotRendered(f"{kind} with attributes {sorted(attributes)}")
        name = string(data[attributes[1].start : attributes[1].end])
        revision = number(data, attributes[2])
        known = MATCHES if kind == "match" else TARGETS[self._family]
        size, render = known.get((name, revision), (0, None))
        info = attributes[3]
        if render is None:
            raise NotRendered(f"{kind} {name} of revision {revision}")
        if info.end - info.start != size:
            raise NotRendered(f"{kind} {name} of {info.end - info.start} bytes")
        show = self._shows.get((kind, name, revision))
        if show is None:
            remembered: dict[bytes, str] = {}
            family, sets = self._family, self._sets

            def show(found: bytes) -> str:
                text = remembered.get(found)
                if text is None:
                    text = render(found, family, sets)
                    if len(remembered) < _KEPT:
                        remembered[found] = text
                return text

            self._shows[kind, name, revision] = show
        return Value(info.start, info.end, show)

    def _limit(self, rule: Reading, data: bytes, attributes: Places) -> None:
        found = numbers(data, attributes, {1, 2, 3, 4, 5, 6}, "limit")
        if found.get(4, 0) or found.get(5, 0) or not found[1]:
            raise NotRendered("limit of another kind")
        average = 10000 * found[2] // found[1]
        if average > 0xFFFFFFFF:
            raise NotRendered("limit beyond a day")
        burst = f" --limit-burst {found[3]}" * (found[3] != 5)
        rule.matches.append([f" -m limit --limit {rate(average, 10000)[0]}{burst}"])

    def _log(self, rule: Reading, data: bytes, attributes: Places) -> None:
        if 1 not in attributes or set(attributes) - {1, 2, 3, 4}:
            raise NotRendered("log of another kind")
        prefix = string(data[slice(*attributes[2])]) if 2 in attributes else ""
        group, size, threshold = (
            number(data, attributes[key]) if key in attributes else None for key in (1, 3, 4)
        )
        if len(prefix) > 127:
            raise NotRendered("log with a longer prefix")
        rule.finish(nflog_text(prefix, group or 0, size, threshold or 0))

    def _immediate(self, rule: Reading, data: bytes, attributes: Places) -> None:
        if set(attributes) != {1, 2}:
            raise NotRendered("immediate of another kind")
        inner = places(data, *attributes[2])
        if 1 in inner:
            value = int.from_bytes(data[slice(*inner[1])], sys.byteorder)
            # Whatever it overlaps is not held any more.
            rule.registers = {number(data, attributes[1]): Load("immediate", (value,))}
            return
        verdict = places(data, *inner[2])
        code = number(data, verdict[1])
        code -= (code >> 31) << 32
        if code in (_JUMP, _GOTO):
            rule.finish(" -g " if code == _GOTO else " -j ")
            assert rule.end is not None
            name = data[slice(*verdict[2])]
            if name.find(b"\0") != len(name) - 1:
                raise NotRendered("a verdict with a chain's name of another kind")
            rule.end.append(Value(verdict[2].start, verdict[2].end - 1, _latin))
        elif code in (_ACCEPT, _DROP, _RETURN):
            rule.finish(f" -j {({_ACCEPT: 'ACCEPT', _DROP: 'DROP', _RETURN: 'RETURN'})[code]}")
        else:
            raise NotRendered(f"verdict {code}")


_COMPARES: Final[Mapping[str, Callable[[int, Reading, bytes, Places], None]]] = {
    "meta": compares.read_meta,
    "payload": compares.read_payload,
    "bitwise": compares.read_bitwise,
    "cmp": compares.read_cmp,
    "range": compares.read_range,
}
_READERS: Final[Mapping[str, Callable[[RuleReader, Reading, bytes, Places], None]]] = {
    "counter": RuleReader._counter,
    "match": RuleReader._match,
    "target": RuleReader._target,
    "limit": RuleReader._limit,
    "log": RuleReader._log,
    "immediate": RuleReader._immediate,
}


def _latin(data: bytes) -> str:
    return data.decode("latin-1")


def _comment(userdata: bytes) -> str | None:
    """The comment that a rule carries in its user data, None for none.

    Type, length, value, one byte each but the value; libnftnl NFTNL_UDATA_RULE_COMMENT.
    """
    offset, comment = 0, None
    while offset + 2 <= len(userdata):
        kind, length = userdata[offset], userdata[offset + 1]
        value = userdata[offset + 2 : offset + 2 + length]
        if len(value) != length:
            raise NotRendered("user data of another kind")
        if kind == 0:
            if not value.endswith(b"\0"):
                raise NotRendered("a comment without an end")
            comment = string(value)
        offset += 2 + length
    return comment
