"""See scripts/audit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

FINE, VULNERABLE, UNKNOWN = 0, 1, 3
_SHOWN = 8
"""Names in a line."""


def judge(printed: str, complaints: str) -> tuple[int, list[str]]:
    """The exit status, and what to say, by what ``pip-audit --format json`` printed.

    pip-audit itself ends with 0 when its source knows of no package that it was asked about, and
    with 1 both when it found something and when it could ask nobody.
    """
    try:
        found = json.loads(printed)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = [line.strip() for line in complaints.splitlines() if line.strip()]
        return UNKNOWN, [f"could not tell: {lines[-1] if lines else 'pip-audit said nothing'}"]
    said = [_vulnerability(one, v) for one in found for v in one.get("vulns", ())]
    skipped = sorted(one["name"] for one in found if "skip_reason" in one)
    status = VULNERABLE if said else FINE
    if skipped or not found:
        rest = "" if len(skipped) <= _SHOWN else f" and {len(skipped) - _SHOWN} more"
        said.append(
            f"could not tell of {len(skipped)} of {len(found)} packages, as the advisories asked "
            f"know nothing of them: {', '.join(skipped[:_SHOWN])}{rest}"
        )
        return status or UNKNOWN, said
    return status, said or [f"no vulnerability is known of {len(found)} packages"]


def _vulnerability(package: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    fixed = ", ".join(one.get("fix_versions", ())) or "none yet"
    return f"{package['name']} {package['version']}: {one['id']}; fixed in: {fixed}"


def main() -> int:
    program, *more = sys.argv[1:]
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as frozen:
        subprocess.run([*freeze, "--disable-pip-version-check"], stdout=frozen, check=True)
        argv = [program, "--requirement", frozen.name, "--no-deps", "--disable-pip"]
        argv += ["--format", "json", "--progress-spinner", "off", *more]
        done = subprocess.run(argv, capture_output=True, text=True)
    status, said = judge(done.stdout, done.stderr)
    for line in said:
        print(f"audit: {line}", file=sys.stderr if status == UNKNOWN else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
