"""The lab's container images: files of this machine's Debian packages, in OCI layout archives.

There is no registry.  `pause` is one static program; `hello-app` is Debian's Python with just the
modules that server.py imports, at the places where the packages have them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from e2e.netlab.errors import LabError

__all__ = ["HELLO_IMAGE", "PAUSE_IMAGE", "build_images"]

PAUSE_IMAGE = "gketrace.dev/lab/pause:1"
HELLO_IMAGE = "gketrace.dev/lab/hello-app:1"
_PYTHON = "/usr/bin/python3.11"
_HERE = Path(__file__).parent
_MODULES = ("server.py", "sctp.py", "errors.py")
_PAUSE = r"""
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int number) { (void)number; _exit(0); }
static void reap(int number) { (void)number; while (waitpid(-1, NULL, WNOHANG) > 0) {} }

int main(void) {
  signal(SIGINT, end);
  signal(SIGTERM, end);
  signal(SIGCHLD, reap);
  for (;;) pause();
}
"""
_MAIN = """\
import json
import os
import sys

from e2e.netlab.server import serve

config = json.loads(sys.argv[1])
log = os.open(config["log"], os.O_WRONLY | os.O_APPEND)
serve(config["pod"], config["node"], tuple(map(tuple, config["ports"])), log)
"""
_LOADED = """
import sys
sys.path.insert(0, {path!r})
import json, e2e.netlab.server, encodings.idna
print(json.dumps([m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)]))
"""


def build_images(folder: Path) -> tuple[Path, ...]:
    """Writes an archive of each image into `folder`, for `ctr images import`.

    Raises LabError when a program of this machine is missing.
    """
    return (_pause(folder / "pause.tar"), _hello(folder / "hello-app.tar"))


def _pause(archive: Path) -> Path:
    with tempfile.TemporaryDirectory() as work:
        program = Path(work, "pause")
        _run(["gcc", "-Os", "-static", "-s", "-x", "c", "-o", str(program), "-"], _PAUSE)
        layer = {"pause": program.read_bytes()}
    _write(archive, PAUSE_IMAGE, layer, {}, ["/pause"])
    return archive


def _hello(archive: Path) -> Path:
    """A symbolic link named hello-app starts Python, so that ps shows that name."""
    with tempfile.TemporaryDirectory() as work:
        package = Path(work, "e2e", "netlab")
        package.mkdir(parents=True)
        for part in (package, package.parent):
            (part / "__init__.py").touch()
        for name in _MODULES:
            (package / name).write_bytes((_HERE / name).read_bytes())
        (Path(work) / "main.py").write_text(_MAIN)
        text = _run([_PYTHON, "-I", "-S", "-B", "-c", _LOADED.format(path=work)])
        loaded = [path for path in json.loads(text) if not path.startswith(work)]
        files = {
            f"app/{path.relative_to(work)}": path.read_bytes() for path in Path(work).rglob("*.py")
        }
    programs = [_PYTHON, *(path for path in loaded if path.endswith(".so"))]
    for path in (*programs, *loaded, *_libraries(programs)):
        files[path.lstrip("/")] = Path(path).read_bytes()
    _write(archive, HELLO_IMAGE, files, {"hello-app": _PYTHON}, ["/hello-app"])
    return archive


def _libraries(programs: Iterable[str]) -> set[str]:
    """The shared libraries that the programs are linked to, and the loader."""
    text = _run(["ldd", *programs])
    return set(re.findall(r"(?:=> |^\t)(/\S+)", text, re.MULTILINE))


def _write(
    archive: Path, name: str, files: dict[str, bytes], links: dict[str, str], command: list[str]
) -> None:
    """An OCI image layout (image-spec image-layout.md) of one layer.  `files` and `links` by path
    without its leading slash; the linker's own folders below /usr keep their symbolic links."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        merged = {path.split("/")[0] for path in files} & {"lib", "lib64", "bin", "sbin"}
        for path in sorted(merged):
            _add_link(tar, path, f"usr/{path}")
        for path in sorted(files):
            where = f"usr/{path}" if path.split("/")[0] in merged else path
            item = tarfile.TarInfo(where)
            item.size = len(files[path])
            item.mode = 0o755
            tar.addfile(item, io.BytesIO(files[path]))
        for path, target in sorted(links.items()):
            _add_link(tar, path, target)
    content = layer.getvalue()
    blobs: dict[str, bytes] = {}

    def descriptor(kind: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

    config = {
        "architecture": _architecture(),
        "os": "linux",
        "config": {"Entrypoint": command, "Env": ["PATH=/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", json.dumps(config).encode()),
        "layers": [descriptor("layer.v1.tar", content)],
    }
    entry = descriptor("manifest.v1+json", json.dumps(manifest).encode())
    entry["annotations"] = {"io.containerd.image.name": name}
    index = {"schemaVersion": 2, "manifests": [entry]}
    with tarfile.open(archive, "w") as tar:
        members = {
            "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
            "index.json": json.dumps(index).encode(),
            **{f"blobs/sha256/{digest}": data for digest, data in blobs.items()},
        }
        for path, data in members.items():
            item = tarfile.TarInfo(path)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))


def _add_link(tar: tarfile.TarFile, path: str, target: str) -> None:
    item = tarfile.TarInfo(path)
    item.type = tarfile.SYMTYPE
    item.linkname = target
    tar.addfile(item)


def _architecture() -> str:
    """As Go names it."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _run(argv: list[str], stdin: str = "") -> str:
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is missing: run scripts/setup") from error
    if done.returncode != 0:
        raise LabError(f"{argv[0]}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout
