"""Bundle ↔ file: a zip of JSON, rule texts as they are, and packed connections.

Nothing is ever unpacked to disk.  What a file says of itself is checked before it is believed:
names, sizes, check sums, shapes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from gketrace.conntrack_records import RECORD
from gketrace.errors import GketraceError, UsageError
from gketrace_cli.agents import wrong_address
from gketrace_cli.bundle.model import (
    Bundle,
    Listed,
    NodeRecord,
    Table,
    error_document,
    error_from_document,
)
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = ["FORMAT", "VERSION", "read_bundle", "read_members", "write_bundle", "write_members"]

FORMAT: Final = "gketrace-bundle"
VERSION: Final = 1
_MANIFEST: Final = "manifest.json"
_NAME: Final = re.compile(
    r"objects\.json|nodes/\d{5}/(node\.json|rules/\d{5}\.txt|conntrack/\d{5}\.records)"
)
MAX_MEMBERS: Final = 200_000
MAX_MEMBER: Final = 512 << 20
MAX_TOTAL: Final = 4 << 30
"""Bytes, unpacked."""

M = TypeVar("M", bound=Message)
Members = dict[str, bytes]
_WRONG: Final = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a way of compression that zipfile does not know
    RuntimeError,  # encrypted
    RecursionError,
    OverflowError,  # Infinity where a whole number should be
    SystemError,  # of protobuf, for a field's name that is half of a UTF-16 pair
    ParseError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
)


# writing


def write_bundle(bundle: Bundle, path: str) -> int:
    """Writes it whole or not at all, for its owner alone; its size in bytes.

    Raises: `UsageError` when it cannot be written there.
    """
    return write_members(to_members(bundle), path)


def write_members(members: Members, path: str) -> int:
    try:
        target = Path(path).resolve()
    except (OSError, RuntimeError):  # the latter is what Python up to 3.12 says of a loop
        raise UsageError(f"cannot write {path}: {os.strerror(errno.ELOOP)}") from None
    try:
        if target.exists() and not target.is_file():
            # A directory, or /dev/null, in whose place a file would be put.
            raise UsageError(f"cannot write {path}: it is there already, and is no regular file")
        # mkstemp makes it with mode 0600.
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
                for member, data in members.items():
                    archive.writestr(member, data)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(name, target)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)
    return size


def to_members(bundle: Bundle) -> Members:
    """File name → content, the manifest first."""
    members: Members = {
        "objects.json": _json(
            {
                name: {"error": error_document(one.error)}
                if one.error is not None
                else {"items": one.items}
                for name, one in bundle.lists.items()
            }
        )
    }
    for number, node in enumerate(bundle.nodes.values()):
        members |= _node_members(node, f"nodes/{number:05}")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "gketrace": bundle.gketrace,
        "created": bundle.created,
        "context": bundle.context,
        "namespace": bundle.namespace,
        "scope": list(bundle.scope),
        "redacted": bundle.redacted,
        "nodes": list(bundle.nodes),
        "members": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }
    return {_MANIFEST: _json(manifest), **members}


def _json(document: Any) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def _message(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _either(value: Message | GketraceError) -> dict[str, Any]:
    if isinstance(value, GketraceError):
        return {"error": error_document(value)}
    return {"reply": _message(value)}


def _node_members(node: NodeRecord, folder: str) -> Members:
    document: dict[str, Any] = {"node": node.node, "how": node.how, "address": node.address}
    if node.error is not None:
        document["error"] = error_document(node.error)
    document |= {"hidden": node.hidden, "info": _message(node.info)}
    members: Members = {}
    replies = []
    for reply in node.replies:
        if reply.HasField("rules"):
            name = f"{folder}/rules/{len(members):05}.txt"
            members[name] = reply.rules.text
            head = pb.SnapshotReply()
            head.CopyFrom(reply)
            head.rules.ClearField("text")
            replies.append({"reply": _message(head), "text": name})
        else:
            replies.append({"reply": _message(reply)})
    document["snapshot"] = replies
    if node.snapshot_error is not None:
        document["snapshot_error"] = error_document(node.snapshot_error)
    document["pods"] = {key: _either(reply) for key, reply in node.pods.items()}
    tables = {}
    for number, (key, table) in enumerate(node.tables.items()):
        name = f"{folder}/conntrack/{number:05}.records"
        members[name] = b"".join(reply.records for reply in table.entries)
        tables[key] = _table_document(table, name)
    document["conntrack"] = tables
    return {f"{folder}/node.json": _json(document), **members}


def _table_document(table: Table, name: str) -> dict[str, Any]:
    document: dict[str, Any] = {
        "records": name,
        "entries": [_message(entry) for reply in table.entries for entry in reply.entries],
    }
    for reply in table.entries:
        if reply.HasField("summary"):
            document["summary"] = _message(reply.summary)
    if table.entries_error is not None:
        document["error"] = error_document(table.entries_error)
    if table.statistics is not None:
        document["statistics"] = _either(table.statistics)
    return document


# reading


def read_bundle(path: str) -> Bundle:
    """Raises: `UsageError`, one line, for what is no bundle, damaged, or of another version."""
    members = read_members(path)
    try:
        return from_members(members)
    except _WRONG as error:
        raise UsageError(f"{path} is a damaged bundle: {_brief(error)}") from error


def read_members(path: str) -> Members:
    """The file's parts, as its manifest names them.  Raises: `UsageError`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            # A zip file's end is looked for: of a device there may be none.
            raise UsageError(f"cannot read the bundle {path}: it is no regular file")
        with zipfile.ZipFile(path) as archive:
            return dict(_checked(path, archive))
    except OSError as error:
        raise UsageError(f"cannot read the bundle {path}: {error.strerror}") from error
    except GketraceError:
        raise
    except _WRONG as error:
        raise UsageError(f"{path} is no bundle, or cut short: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _checked(path: str, archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS or sum(info.file_size for info in infos) > MAX_TOTAL:
        raise UsageError(f"{path} is too large for a bundle")
    by_name = {info.filename: info for info in infos}
    if _MANIFEST not in by_name:
        raise UsageError(f"{path} is no bundle: it has no {_MANIFEST}")
    raw = _content(path, archive, by_name[_MANIFEST])
    manifest = json.loads(raw)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{path} is no bundle: its {_MANIFEST} is of something else")
    if manifest.get("version") != VERSION:
        raise UsageError(
            f"{path} is a bundle of version {manifest.get('version')!r:.20}, "
            f"this program reads version {VERSION}",
            hint="use the version of gketrace that made it",
        )
    listed = manifest["members"]
    for name in by_name:
        if name != _MANIFEST and (name not in listed or not _NAME.fullmatch(name)):
            raise UsageError(f"{path} holds {name!r:.80}, which no bundle has")
    yield _MANIFEST, raw
    for name, digest in listed.items():
        if name not in by_name:
            raise UsageError(f"{path} is damaged: {name!r:.80} is not in it")
        data = _content(path, archive, by_name[name])
        if hashlib.sha256(data).hexdigest() != digest:
            raise UsageError(f"{path} is damaged: {name!r:.80} is not what the manifest says")
        yield name, data


def _content(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Never more than the bound, whatever the file says of its size."""
    if info.file_size > MAX_MEMBER:
        raise UsageError(f"{path}: {info.filename!r:.80} is too large for a bundle")
    with archive.open(info) as file:
        data = file.read(MAX_MEMBER + 1)
    if len(data) > MAX_MEMBER:
        raise UsageError(f"{path}: {info.filename!r:.80} is too large for a bundle")
    return data


def from_members(members: Members) -> Bundle:
    """Raises: any of `_WRONG`."""
    manifest = _document(members[_MANIFEST])
    bundle = Bundle(
        created=float(manifest["created"]),
        gketrace=str(manifest["gketrace"]),
        context=str(manifest["context"]),
        namespace=str(manifest["namespace"]),
        scope=tuple(map(str, manifest["scope"])),
        redacted=bool(manifest["redacted"]),
    )
    for name, one in _document(members["objects.json"]).items():
        error = error_from_document(one["error"]) if "error" in one else None
        items = list(one.get("items", ()))
        for item in items:
            meta = item["metadata"]
            labels = meta.get("labels")
            if not isinstance(meta["name"], str) or not isinstance(labels, dict | None):
                raise TypeError(f"one of its {name} has no name, or labels that are none")
        bundle.lists[name] = Listed(items=items, error=error)
    for number, name in enumerate(manifest["nodes"]):
        folder = f"nodes/{number:05}"
        node = _node(_document(members[f"{folder}/node.json"]), members)
        if node.node != name:
            raise ValueError(f"{folder} is of another node")
        bundle.nodes[name] = node
    return bundle


def _document(raw: bytes) -> Any:
    """Raises ValueError: no JSON, or half of a UTF-16 pair in it, which is no text to anybody."""
    document = json.loads(raw)
    if b"\\u" in raw:  # bundles are written without
        json.dumps(document, ensure_ascii=False).encode()
    return document


def _parse(cls: type[M], document: Any) -> M:
    return ParseDict(document, cls())


def _other(cls: type[M], document: Any) -> M | GketraceError:
    if "error" in document:
        return error_from_document(document["error"])
    return _parse(cls, document["reply"])


def _node(document: Any, members: Members) -> NodeRecord:
    node = NodeRecord(
        node=str(document["node"]),
        how=str(document["how"]),
        address=str(document["address"]),
        hidden=str(document["hidden"]),
        error=error_from_document(document["error"]) if "error" in document else None,
        info=_parse(pb.GetInfoReply, document["info"]),
    )
    if (text := wrong_address(node.info)) is not None:
        raise ValueError(f"{text!r:.60} is no address")
    if "snapshot_error" in document:
        node.snapshot_error = error_from_document(document["snapshot_error"])
    for one in document["snapshot"]:
        reply = _parse(pb.SnapshotReply, one["reply"])
        if "text" in one:
            reply.rules.text = members[one["text"]]
        node.replies.append(reply)
    for key, one in document["pods"].items():
        node.pods[key] = _other(pb.GetNetnsReply, one)
    for key, one in document["conntrack"].items():
        node.tables[key] = _table(one, members)
    return node


def _table(document: Any, members: Members) -> Table:
    table = Table()
    if "error" in document:
        table.entries_error = error_from_document(document["error"])
    else:
        reply = pb.ListConntrackReply(records=members[document["records"]])
        if len(reply.records) % RECORD.size:
            raise ValueError(f"{document['records']} is cut short")
        reply.entries.extend(_parse_entry(one) for one in document["entries"])
        if "summary" in document:
            reply.summary.CopyFrom(_parse(pb.ConntrackSummary, document["summary"]))
        table.entries = [reply]
    if "statistics" in document:
        table.statistics = _other(pb.GetConntrackStatsReply, document["statistics"])
    return table


def _parse_entry(document: Any) -> Any:
    from gketrace_proto.v1alpha1 import packet_pb2

    return _parse(packet_pb2.ConntrackEntry, document)


__all__ += ["from_members", "to_members"]
