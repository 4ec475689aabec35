"""What differs between two bundles, part by part, without what ticks by itself.

Left out are counters, ages, identities that say nothing about packets (inodes, PIDs, resource
versions), learned bridge entries, and neighbours that went from one usable state to another.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.ruleset.nft_text import rule_text
from gketrace.snapshot import Link, NetnsSnapshot, Unavailable
from gketrace_cli.bundle.model import HOST, Bundle, NodeRecord
from gketrace_cli.bundle.namespaces import SavedNode

__all__ = ["Difference", "Part", "differences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What can be exchanged between two bundles as a whole."""

    noun: str
    """``rules``, ``routes``, ``sysctls`` … of a namespace; ``services``, ``pods`` … of the API;
    ``agent``."""
    node: str = ""
    """Empty: an object of the API."""
    pod: str = ""
    """The pod whose namespace it is; empty: the node's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing."""

    part: Part
    kind: str
    """``added``, ``removed`` or ``changed``."""
    name: str
    """What it is, in one line: the rule, the route, ``net.ipv4.ip_forward``."""
    before: str = ""
    after: str = ""
    table: str = ""
    """Of a rule."""


Items = Mapping[tuple[str, str], str]
"""(table, name) → value."""


def differences(before: Bundle, after: Bundle) -> tuple[Difference, ...]:
    """In the order: objects, then node by node."""
    return (*_objects(before, after), *_nodes(before, after))


# objects


def _objects(before: Bundle, after: Bundle) -> Iterator[Difference]:
    for name in dict.fromkeys((*before.lists, *after.lists)):
        one, two = before.lists.get(name), after.lists.get(name)
        if one is None or two is None or one.error is not None or two.error is not None:
            continue
        yield from _compare(Part(noun=name), _flat(one.items), _flat(two.items))


def _flat(items: Iterable[Mapping[str, Any]]) -> Items:
    """Each object's fields as ``namespace/name: path`` → value."""
    found: dict[tuple[str, str], str] = {}
    for item in items:
        metadata = item["metadata"]
        name = "/".join(filter(None, (metadata.get("namespace"), metadata["name"])))
        rest = {key: value for key, value in item.items() if key != "metadata"}
        rest["labels"] = metadata.get("labels")
        rest["deletionTimestamp"] = metadata.get("deletionTimestamp")
        found["", name] = "there"
        for path, value in _leaves(rest, ""):
            found[name, path] = value
    return found


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            # By what they say: the order of endpoints and conditions means nothing.
            text = item if isinstance(item, str) else json.dumps(item, sort_keys=True)
            yield f"{path}[{text}]", "there"
    elif value is not None:
        yield path, str(value)


# nodes


def _nodes(before: Bundle, after: Bundle) -> Iterator[Difference]:
    for name in dict.fromkeys((*before.nodes, *after.nodes)):
        one, two = before.nodes.get(name), after.nodes.get(name)
        part = Part(noun="agent", node=name)
        yield from _compare(part, _agent(one), _agent(two))
        if one is None or two is None or one.error is not None or two.error is not None:
            continue
        first, second = SavedNode(one), SavedNode(two)
        keys = dict.fromkeys((*first.snapshots, *second.snapshots))
        for key in keys:
            yield from _namespace(name, key, first, second)


def _agent(node: NodeRecord | None) -> Items:
    if node is None:
        return {}
    if node.error is not None:
        return {("", "the agent does not answer"): node.error.message}
    info = node.info
    return {
        ("", "agent's version"): info.version,
        ("", "kernel"): info.kernel,
        ("", "data plane"): info.data_plane,
        ("", "iptables backend"): info.iptables_backend,
        ("", "container runtime"): info.runtime,
    }


def _namespace(node: str, key: str, first: SavedNode, second: SavedNode) -> Iterator[Difference]:
    one, two = first.snapshots.get(key), second.snapshots.get(key)
    if not isinstance(one, NetnsSnapshot) or not isinstance(two, NetnsSnapshot):
        part = Part(noun="namespace", node=node, pod=key)
        yield from _compare(part, _presence(one), _presence(two))
        return
    for noun, read in _NOUNS.items():
        part = Part(noun=noun, node=node, pod=key)
        yield from _compare(part, read(one), read(two))
    part = Part(noun="rulesets", node=node, pod=key)
    yield from _compare(part, _rules(first.record, key), _rules(second.record, key))
    part = Part(noun="conntrack", node=node, pod=key)
    entries = _entries(first.conntrack(key).entries), _entries(second.conntrack(key).entries)
    yield from _compare(part, *entries)


def _presence(shot: NetnsSnapshot | Unavailable | None) -> Items:
    if isinstance(shot, Unavailable):
        return {("", "the namespace"): shot.reason}
    return {} if shot is None else {("", "the namespace"): "there"}


def _links(shot: NetnsSnapshot) -> Items:
    if isinstance(shot.links, Unavailable):
        return {("", "links"): shot.links.reason}
    names = {link.ifindex: link.name for link in shot.links}
    found: dict[tuple[str, str], str] = {}
    for link in shot.links:
        found["", link.name] = "there"
        values = {
            "kind": link.kind,
            "mac": link.mac,
            "mtu": link.mtu,
            "flags": " ".join(sorted(link.flags)),
            "operstate": link.operstate,
            "master": _index(names, link.master),
            "bridge_nf_call_iptables": link.bridge_nf_call_iptables,
            "bridge_nf_call_ip6tables": link.bridge_nf_call_ip6tables,
            **_port(link),
        }
        for what, value in values.items():
            if value not in ("", None):
                found[link.name, what] = str(value)
    return found


def _port(link: Link) -> dict[str, Any]:
    if link.port is None:
        return {}
    return {f"bridge port {one.name}": getattr(link.port, one.name) for one in fields(link.port)}


def _index(names: Mapping[int, str], index: int | None) -> str:
    return "" if index is None else names.get(index, str(index))


def _addresses(shot: NetnsSnapshot) -> Items:
    if isinstance(shot.addresses, Unavailable):
        return {("", "addresses"): shot.addresses.reason}
    names = _names(shot)
    return {
        (_index(names, one.ifindex), f"{one.address}/{one.prefixlen}"): " ".join(one.flags)
        for one in shot.addresses
    }


def _names(shot: NetnsSnapshot) -> dict[int, str]:
    links = shot.links if not isinstance(shot.links, Unavailable) else ()
    return {link.ifindex: link.name for link in links}


def _texts(noun: str) -> Callable[[NetnsSnapshot], Items]:
    def read(shot: NetnsSnapshot) -> Items:
        value = getattr(shot, noun)
        if isinstance(value, Unavailable):
            return {("", noun): value.reason}
        return {("", one.text or str(one)): "there" for one in value}

    return read


def _sysctls(shot: NetnsSnapshot) -> Items:
    if isinstance(shot.sysctls, Unavailable):
        return {("", "sysctls"): shot.sysctls.reason}
    return {
        ("", name): value
        for name, value in shot.sysctls.items()
        if not name.endswith(("nf_conntrack_count", "nf_conntrack_buckets"))
    }


_BROKEN: Final = frozenset({"FAILED", "INCOMPLETE"})


def _neighbours(shot: NetnsSnapshot) -> Items:
    """Those that were asked for and do not answer, and each usable one's link address."""
    if isinstance(shot.neighbours, Unavailable):
        return {("", "neighbours"): shot.neighbours.reason}
    names = _names(shot)
    return {
        (_index(names, one.ifindex), str(one.address)): one.state
        if one.state in _BROKEN or one.state == "PERMANENT"
        else one.mac
        for one in shot.neighbours
    }


def _fdb(shot: NetnsSnapshot) -> Items:
    if isinstance(shot.fdb, Unavailable):
        return {("", "fdb"): shot.fdb.reason}
    names = _names(shot)
    return {
        (_index(names, one.ifindex), one.mac): " ".join(sorted(one.flags))
        for one in shot.fdb
        if {"permanent", "static"} & set(one.flags)
    }


def _sockets(shot: NetnsSnapshot) -> Items:
    if isinstance(shot.sockets, Unavailable):
        return {("", "sockets"): shot.sockets.reason}
    return {
        ("", f"{one.state} {one.address}:{one.port} protocol {one.protocol}"): one.process
        + (", accept queue full" if one.backlog and (one.queue or 0) >= one.backlog else "")
        for one in shot.sockets
    }


def _recent(shot: NetnsSnapshot) -> Items:
    if isinstance(shot.recent, Unavailable):
        return {("", "recent"): shot.recent.reason}
    return {
        (name, str(one.address)): "there" for name, listed in shot.recent.items() for one in listed
    }


def _ipsets(shot: NetnsSnapshot) -> Items:
    if isinstance(shot.ipsets, Unavailable):
        return {("", "ipsets"): shot.ipsets.reason}
    return {
        (name, ",".join(entry.parts)): "nomatch" if entry.nomatch else "there"
        for name, one in shot.ipsets.items()
        for entry in one.entries
    }


_NOUNS: Final[dict[str, Callable[[NetnsSnapshot], Items]]] = {
    "links": _links,
    "addresses": _addresses,
    "routes": _texts("routes"),
    "rules": _texts("rules"),
    "neighbours": _neighbours,
    "fdb": _fdb,
    "sysctls": _sysctls,
    "sockets": _sockets,
    "recent": _recent,
    "ipsets": _ipsets,
}


def _entries(entries: Iterable[ConntrackEntry]) -> Items:
    return {
        (f"zone {one.zone}" if one.zone else "", f"{one.orig} reply {one.reply}"): "there"
        for one in entries
    }


def _rules(record: NodeRecord, key: str) -> Items:
    """Each rule of each table, with how often it stands there, and in which order."""
    found: Counter[tuple[str, str]] = Counter()
    values: dict[tuple[str, str], str] = {}
    here = HOST
    for reply in record.replies:
        if reply.HasField("pod"):
            here = f"{reply.pod.namespace}/{reply.pod.name}"
        if here != key or not reply.HasField("rules"):
            continue
        rules = reply.rules
        kind = f"{rules.backend} IPv{rules.family}" if rules.family else rules.backend
        if rules.unavailable:
            values[kind, "the rules cannot be read"] = rules.unavailable
        elif rules.backend == "nftables":
            for chain, text in _nft_lines(rules.text):
                found[f"{kind} {rules.table} {chain}".strip(), text] += 1
        else:
            for table, text in _save_lines(rules.text):
                found[f"{kind} {table}", text] += 1
    return values | {name: str(count) for name, count in found.items()}


def _save_lines(text: bytes) -> Iterator[tuple[str, str]]:
    table = ""
    for line in text.decode(errors="replace").splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            yield table, line.rpartition(" ")[0]
        elif line.startswith(("-A ", "[")):
            yield table, line[line.index("-A ") :]


def _nft_lines(text: bytes) -> Iterator[tuple[str, str]]:
    for item in json.loads(text)["nftables"]:
        if "rule" in item:
            rule = item["rule"]
            said = [one for one in rule.get("expr", ()) if "counter" not in one]
            yield rule["chain"], rule_text(said, rule.get("comment", ""), rule["family"])
        for kind in ("set", "map"):
            for element in item.get(kind, {}).get("elem", ()):
                if isinstance(element, dict) and "elem" in element:
                    element = element["elem"].get("val")
                yield f"{kind} {item[kind]['name']}", json.dumps(element, sort_keys=True)
        if "chain" in item and "policy" in item["chain"]:
            yield item["chain"]["name"], f"policy {item['chain']['policy']}"


# all


def _compare(part: Part, before: Items, after: Items) -> Iterator[Difference]:
    """Where a thing as a whole came or went, not each of its fields."""
    came = {name for table, name in after if not table and (table, name) not in before}
    went = {name for table, name in before if not table and (table, name) not in after}
    for key in dict.fromkeys((*before, *after)):
        one, two = before.get(key), after.get(key)
        table, name = key
        if one == two or (table and part.noun != "rulesets" and table in came | went):
            continue
        yield Difference(
            part=part,
            kind="added" if one is None else "removed" if two is None else "changed",
            name=name if not table or part.noun == "rulesets" else f"{table}: {name}",
            before="" if one in (None, "there") else str(one),
            after="" if two in (None, "there") else str(two),
            table=table if part.noun == "rulesets" else "",
        )
