"""``scripts/audit``: what is said when nobody can tell, or something is known."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts/audit.py"


def judge(*dependencies: dict[str, Any]) -> tuple[int, list[str]]:
    found: tuple[int, list[str]] = _module().judge(json.dumps({"dependencies": dependencies}), "")
    return found


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FINE = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found"}
BROKEN = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}


def test_what_is_known() -> None:
    assert judge(FINE) == (0, ["no vulnerability is known of 1 packages"])
    assert judge(FINE, BROKEN) == (1, ["c 2: CVE-1; fixed in: 2.1"])


def test_what_nobody_knows_of_is_not_fine() -> None:
    unknown = "could not tell of 1 of 2 packages, as the advisories asked know nothing of them: b"
    assert judge(FINE, SKIPPED) == (3, [unknown])
    assert judge(SKIPPED, BROKEN) == (1, ["c 2: CVE-1; fixed in: 2.1", unknown])
    assert judge()[0] == 3


def test_nobody_can_be_asked(tmp_path: Path) -> None:
    """A program that ends as pip-audit does then."""
    program = tmp_path / "pip-audit"
    lines = ["Traceback (most recent call last):", "ConnectionError: no way to api.osv.dev", ""]
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit({chr(10).join(lines)!r})\n")
    program.chmod(0o755)
    done = subprocess.run([sys.executable, SCRIPT, program], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == "audit: could not tell: ConnectionError: no way to api.osv.dev\n"
