"""A bundle with its addresses and names masked, of which every verdict is the same.

Names are masked where names stand (fields of objects and messages) and as whole words in comments
and sentences.  kube-proxy's chains and affinity lists are named by hashes of names: those are made
anew from the masked names, so that what is compared with them still agrees.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import RECORD, entry_from_record, record_of, records_from_bytes
from gketrace.errors import UnsupportedError
from gketrace.kubenames import (
    ChainRole,
    ServicePort,
    endpoint_chain,
    endpoint_text,
    nft_endpoint_chain,
    nft_service_chain,
    service_chain,
)
from gketrace.packet import Tuple5
from gketrace_cli.bundle.masks import ADDRESS, MAC, Masks
from gketrace_cli.bundle.model import Bundle
from gketrace_cli.bundle.objects import KINDS
from gketrace_cli.bundle.store import Members, from_members, to_members
from gketrace_cli.object_json import parse_endpoints, parse_endpointslice, parse_service

__all__ = ["redact_bundle"]

_STANDARD: Final = frozenset(
    {"default", "kube-system", "kube-public", "kube-node-lease", "kubernetes", "localhost"}
)
"""Names that every cluster has."""
_NAME_KEYS: Final = frozenset(
    {"node", "nodeName", "hostname", "externalName", "process", "command", "netns_path"}
)
"""Fields whose whole value is a name."""
_RANGE: Final = re.compile(
    r"\d+(?:\.\d+){3}-\d+(?:\.\d+){3}|[0-9A-Fa-f]*:[0-9A-Fa-f:]+-[0-9A-Fa-f]*:[0-9A-Fa-f:]+"
)
_BASE32: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_HASHED: Final = re.compile(r"\bKUBE-(?:SVC|SVL|SEP|FW|EXT|XLB)-([A-Z2-7]{16})\b")
_NFT: Final = re.compile(
    r"\b((?:service|local|external|firewall|endpoint|affinity)-)([A-Z2-7]{8})-([\w./-]+)"
)


def redact_bundle(bundle: Bundle) -> Bundle:
    """Raises: `UnsupportedError` for a rule whose meaning masks would change."""
    members = to_members(bundle)
    words = _Words(bundle)
    originals = set(_addresses(members))
    while True:
        masks = Masks(secrets.token_bytes(32))
        # A masked address that is another one's original would look like it was left.
        if not originals & {str(masks.address(ip_address(one))) for one in originals}:
            break
    redacted = from_members(_Redaction(bundle, words, masks).members(members))
    redacted.redacted = True
    return redacted


def _addresses(members: Members) -> Iterator[str]:
    """Whole addresses that masks change."""
    still = Masks(b"any")
    for name, data in members.items():
        if name.endswith(".records"):
            for record in records_from_bytes(data):
                entry = entry_from_record(record)
                for one in (entry.orig.src, entry.orig.dst, entry.reply.src, entry.reply.dst):
                    if still.address(one) != one:
                        yield str(one)
            continue
        for match in ADDRESS.finditer(MAC.sub("", data.decode(errors="replace"))):
            text = match[0]
            try:
                one = ip_address(text)
            except ValueError:
                continue
            if still.address(one) != one:
                yield str(one)


class _Words:
    """The names that a bundle holds."""

    def __init__(self, bundle: Bundle) -> None:
        found: set[str] = {bundle.context, bundle.namespace}
        for name, listed in bundle.lists.items():
            found.add(name.partition("@")[2])
            for item in listed.items:
                found |= set(_names_of(name.partition("@")[0], item))
        for node in bundle.nodes.values():
            found.add(node.node)
        parts = {word for name in found for word in (name, name.partition(".")[0])}
        self.names: Final = frozenset(w for w in parts if w and w not in _STANDARD)
        ordered = sorted(self.names, key=len, reverse=True)
        pattern = "|".join(map(re.escape, ordered)) or r"(?!)"
        self.pattern: Final = re.compile(rf"(?<![\w.-])(?:{pattern})(?![\w-]|\.\w)")


def _names_of(plural: str, item: Mapping[str, Any]) -> Iterator[str]:
    metadata = item["metadata"]
    yield from (metadata.get("name") or "", metadata.get("namespace") or "")
    if plural == "nodes":
        for one in (item.get("status") or {}).get("addresses") or []:
            if not ADDRESS.fullmatch(one["address"]):
                yield one["address"]
    for key in ("targetRef",):
        for end in item.get("endpoints") or []:
            yield (end.get(key) or {}).get("name") or ""
            yield end.get("nodeName") or ""
    for key in ("containers", "initContainers", "ephemeralContainers"):
        for one in (item.get("spec") or {}).get(key) or []:
            yield one.get("name") or ""


class _Redaction:
    """The masks of one bundle's names and addresses."""

    def __init__(self, bundle: Bundle, words: _Words, masks: Masks) -> None:
        self._words = words
        self._masks = masks
        self._chains = dict(self._hashes(bundle))

    def members(self, members: Members) -> Members:
        made: Members = {}
        for name, data in members.items():
            if name.endswith(".json"):
                document = self._tree(json.loads(data), ())
                made[name] = json.dumps(document, ensure_ascii=False).encode()
            elif name.endswith(".records"):
                made[name] = b"".join(
                    RECORD.pack(*self._record(entry_from_record(one)))
                    for one in records_from_bytes(data)
                )
            else:
                made[name] = self._rules(data.decode(errors="replace")).encode()
        return made

    # names

    def _name(self, name: str) -> str:
        return name if name in _STANDARD or not name else self._masks.name(name)

    def _key(self, key: str) -> str:
        """``namespace/name``."""
        return "/".join(map(self._name, key.split("/")))

    def _sentence(self, text: str) -> str:
        """Names as whole words, hashes and addresses."""
        text = _NFT.sub(self._nft, text)
        text = _HASHED.sub(self._hashed, text)
        text = self._words.pattern.sub(lambda m: self._name(m[0]), text)
        return self._masks.text(text)

    def _hashes(self, bundle: Bundle) -> Iterator[tuple[str, str]]:
        """Each chain that kube-proxy would make → its masked name."""
        services = [parse_service(i) for i in _items(bundle, "services")]
        ends = [e for i in _items(bundle, "endpointslices") for e in parse_endpointslice(i)]
        ends += [e for i in _items(bundle, "endpoints") for e in parse_endpoints(i)]
        for service in services:
            for port in service.ports:
                old = ServicePort(
                    namespace=service.namespace,
                    service=service.name,
                    port=port.name,
                    protocol=port.protocol.lower(),
                )
                new = replace(
                    old,
                    namespace=self._name(old.namespace),
                    service=self._name(old.service),
                    # A port may be called as a Service or a container is.
                    port=self._words.pattern.sub(lambda m: self._name(m[0]), old.port),
                )
                for role in ChainRole:
                    if role is not ChainRole.ENDPOINT:
                        yield service_chain(role, old), service_chain(role, new)
                for prefix in ("service-", "local-", "external-", "firewall-"):
                    yield nft_service_chain(prefix, old), nft_service_chain(prefix, new)
                for end in ends:
                    if (end.namespace, end.service) != (service.namespace, service.name):
                        continue
                    masked = str(self._masks.address(ip_address(end.address)))
                    yield (
                        endpoint_chain(old, endpoint_text(end.address, end.port)),
                        endpoint_chain(new, endpoint_text(masked, end.port)),
                    )
                    for prefix in ("endpoint-", "affinity-"):
                        yield (
                            nft_endpoint_chain(old, end.address, end.port, prefix),
                            nft_endpoint_chain(new, masked, end.port, prefix),
                        )

    def _hashed(self, match: re.Match[str]) -> str:
        known = self._chains.get(match[0])
        return known or match[0][: -len(match[1])] + self._masks.letters(match[1], _BASE32)

    def _nft(self, match: re.Match[str]) -> str:
        known = self._chains.get(match[0])
        if known is not None:
            return known
        base, sep, end = match[3].partition("__")
        words = base.split("/")
        rest = "/".join([*map(self._name, words[:2]), *words[2:]])
        if sep:
            address, slash, port = end.rpartition("/")
            rest += f"__{self._masks.letters(address, _BASE32.lower())}{slash}{port}"
        return f"{match[1]}{self._masks.letters(match[2], _BASE32)}-{rest}"

    # rules

    def _rules(self, text: str) -> str:
        if text.lstrip().startswith("{"):
            return json.dumps(self._nft_tree(json.loads(text)))
        return "".join(self._line(line) for line in text.splitlines(keepends=True))

    def _line(self, line: str) -> str:
        if _RANGE.search(line):
            raise UnsupportedError(
                f"a rule has a range of addresses, which masks would break: {line.strip()[:80]}",
                hint="save it without --redact",
            )
        # Names stand in comments and, as hashes, in chains; elsewhere a word is syntax.
        parts = re.split(r'(--comment (?:"(?:[^"\\]|\\.)*"|\S+))', line)
        return "".join(
            self._sentence(part) if part.startswith("--comment ") else self._syntax(part)
            for part in parts
        )

    def _syntax(self, text: str) -> str:
        return self._masks.text(_HASHED.sub(self._hashed, text))

    def _nft_tree(self, value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"prefix"}:
                inner = value["prefix"]
                if isinstance(inner["addr"], str):
                    whole = self._masks.text(f"{inner['addr']}/{inner['len']}")
                    inner = {**inner, "addr": whole.partition("/")[0]}
                return {"prefix": inner}
            if set(value) == {"range"} and any(
                isinstance(end, str) and ADDRESS.fullmatch(end) for end in value["range"]
            ):
                raise UnsupportedError(
                    f"a rule has a range of addresses, which masks would break: {value}",
                    hint="save it without --redact",
                )
            return {key: self._nft_tree(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._nft_tree(item) for item in value]
        if isinstance(value, str):
            return self._sentence(value) if "/" in value or " " in value else self._syntax(value)
        return value

    # connections

    def _record(self, entry: ConntrackEntry) -> Any:
        masked = replace(entry, orig=self._tuple(entry.orig), reply=self._tuple(entry.reply))
        record = record_of(masked)
        assert record is not None  # it came from one
        return record

    def _tuple(self, one: Tuple5) -> Tuple5:
        masks = self._masks
        return replace(one, src=masks.address(one.src), dst=masks.address(one.dst))

    # documents

    def _tree(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            if path and path[-1] in ("labels", "selector"):
                return {self._label(k): self._labelled(k, v) for k, v in value.items()}
            if path and path[-1] == "members":
                return value
            return {self._document_key(k): self._tree(v, (*path, k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self._tree(item, path) for item in value]
        return self._leaf(value, path) if isinstance(value, str) else value

    def _document_key(self, key: str) -> str:
        """Keys of maps by pod, node or list."""
        kind, at, namespace = key.partition("@")
        if at and kind in KINDS:
            return f"{kind}@{self._name(namespace)}"
        if "/" in key and key.count("/") == 1 and "." not in key.partition("/")[0]:
            return self._key(key)
        return self._sentence(key) if "KUBE-" in key or "-" in key else key

    def _label(self, key: str) -> str:
        prefix = key.partition("/")[0]
        return key if prefix.endswith(("kubernetes.io", "k8s.io")) else self._masks.name(key)

    def _labelled(self, key: str, value: Any) -> str:
        text = str(value)
        if key == "kubernetes.io/service-name":
            return self._name(text)
        return text if text in _STANDARD or not text else self._masks.name(text)

    def _leaf(self, text: str, path: tuple[str, ...]) -> str:
        key = path[-1] if path else ""
        inside = path[-2] if len(path) > 1 else ""
        if key in _NAME_KEYS or key in ("context", "namespace", "nodes"):
            return self._name(text) if not ADDRESS.fullmatch(text) else self._masks.text(text)
        if key == "pod" and "/" in text:
            return self._key(text)
        if key == "name" and inside in _NAMED:
            return self._name(text)
        if key in ("address", "how", "hidden", "detail", "message", "why", "note", "providerID"):
            if inside == "addresses" and not ADDRESS.fullmatch(text):
                return self._name(text)
            return self._unpath(self._sentence(text))
        if key in ("uid", "sandbox_id", "containerID", "id", "kubernetes.io/config.hash"):
            return self._identity(text)
        return self._sentence(text)

    def _unpath(self, text: str) -> str:
        """Paths and pods' IDs in sentences."""
        return re.sub(r"[0-9a-f]{64}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", self._id, text)

    def _id(self, match: re.Match[str]) -> str:
        return self._identity(match[0])

    def _identity(self, text: str) -> str:
        head, mark, rest = text.rpartition("://")
        return head + mark + self._masks.letters(rest, "0123456789abcdef") if rest else text


_NAMED: Final = frozenset(
    {"metadata", "targetRef", "pod", "containers", "initContainers", "ephemeralContainers",
     "containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"}
)  # fmt: skip


def _items(bundle: Bundle, plural: str) -> Iterable[Mapping[str, Any]]:
    for name, listed in bundle.lists.items():
        if name.partition("@")[0] == plural:
            yield from listed.items
