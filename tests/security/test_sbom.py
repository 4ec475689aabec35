"""``scripts/sbom``: what is shipped, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/sbom.py"


def test_it_names_what_is_shipped() -> None:
    printed = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    document = json.loads(printed.stdout)
    names = {one["name"] for one in document["components"]}
    assert {"grpcio", "protobuf", "pyroute2", "cryptography"} <= names
    assert not {"pytest", "mypy", "hypothesis"} & names
    assert all(one["purl"].startswith("pkg:pypi/") for one in document["components"])
    known = {one["ref"] for one in document["dependencies"]}
    assert all(set(one["dependsOn"]) <= known for one in document["dependencies"])
