"""Files that are no bundles, and bundles that somebody changed."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from gketrace.errors import UsageError
from gketrace_cli.bundle import store
from gketrace_cli.bundle.model import Bundle, NodeRecord
from gketrace_cli.bundle.store import read_bundle, write_bundle, write_members


@pytest.fixture
def good(tmp_path: Path) -> Path:
    bundle = Bundle(created=1.0, gketrace="0", context="c", namespace="default", scope=("-A",))
    bundle.nodes["n1"] = NodeRecord(node="n1")
    path = tmp_path / "good.gkt"
    write_bundle(bundle, str(path))
    return path


def altered(path: Path, changes: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()} | changes
    bad = path.with_name("bad.gkt")
    with zipfile.ZipFile(bad, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    return str(bad)


def resealed(path: Path, name: str, document: object) -> str:
    """With another document in it, and the check sum of that."""
    data = json.dumps(document).encode()
    manifest = json.loads(zipfile.ZipFile(path).read("manifest.json"))
    manifest["members"][name] = hashlib.sha256(data).hexdigest()
    return altered(path, {name: data, "manifest.json": json.dumps(manifest).encode()})


def test_what_was_written_is_read(good: Path) -> None:
    assert list(read_bundle(str(good)).nodes) == ["n1"]
    assert good.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in good.parent.iterdir()] == ["good.gkt"]


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_truncated(good: Path, keep: int) -> None:
    bad = good.with_name("short.gkt")
    bad.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(UsageError, match="no bundle, or cut short"):
        read_bundle(str(bad))


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "nodes/00000/../../x", "other"])
def test_foreign_names(good: Path, name: str) -> None:
    with pytest.raises(UsageError, match="which no bundle has"):
        read_bundle(altered(good, {name: b"x"}))


def test_another_version(good: Path) -> None:
    manifest = json.loads(zipfile.ZipFile(good).read("manifest.json"))
    manifest["version"] = 99
    with pytest.raises(UsageError, match="version 99"):
        read_bundle(altered(good, {"manifest.json": json.dumps(manifest).encode()}))


def test_changed_content(good: Path) -> None:
    with pytest.raises(UsageError, match="not what the manifest says"):
        read_bundle(altered(good, {"objects.json": b"{}  "}))


@pytest.mark.parametrize(
    "objects",
    [
        {"pods": {"items": ["x"]}},
        {"pods": {"items": [{"metadata": "x"}]}},
        {"pods": {"items": [{"metadata": {"name": 7}}]}},
        {"pods": {"items": [{"metadata": {"name": "x", "labels": 7}}]}},
        {"pods": {"items": [{"metadata": {"name": "\ud800"}}]}},
        {"pods": {"items": 7}},
        {"pods": None},
        [],
    ],
)
def test_objects_that_are_none(good: Path, objects: object) -> None:
    with pytest.raises(UsageError, match="damaged bundle"):
        read_bundle(resealed(good, "objects.json", objects))


@pytest.mark.parametrize(
    "told",
    [
        {"\ud800": 1},
        {"node": "\ud800"},
        {"addresses": [{"address": ""}]},
        {"addresses": [{"address": "::", "prefixlen": float("inf")}]},
    ],
)
def test_what_an_agent_never_said(good: Path, told: dict[str, object]) -> None:
    """Half of a UTF-16 pair is a SystemError of protobuf."""
    name = "nodes/00000/node.json"
    node = json.loads(zipfile.ZipFile(good).read(name))
    with pytest.raises(UsageError, match="damaged bundle"):
        read_bundle(resealed(good, name, node | {"info": told}))


def test_too_large(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_MEMBER", 10)
    with pytest.raises(UsageError, match="too large"):
        read_bundle(str(good))


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    """/dev/zero filled the memory, and a pipe waited for somebody to write to it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in ("/dev/zero", str(pipe), str(tmp_path)):
        with pytest.raises(UsageError, match="is no regular file"):
            read_bundle(path)


def test_a_device_is_not_replaced_and_a_link_is_followed(tmp_path: Path) -> None:
    pipe, link, real = tmp_path / "pipe", tmp_path / "link.gkt", tmp_path / "real.gkt"
    os.mkfifo(pipe)
    link.symlink_to(real)
    for path in (pipe, tmp_path):
        with pytest.raises(UsageError, match="is no regular file"):
            write_members({}, str(path))
    assert pipe.is_fifo()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="Too many levels of symbolic links"):
        write_members({}, str(loop))
    assert write_members({}, str(link)) == real.stat().st_size
    assert link.is_symlink()
