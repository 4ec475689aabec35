"""See scripts/sbom."""

from __future__ import annotations

import json
import sys
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = ("gketrace", frozenset({"agent"}))


def closure() -> dict[str, set[str]]:
    """Distribution → what it needs, beginning with our own."""
    needs: dict[str, set[str]] = {}
    waiting = [ROOT]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        mine = needs.setdefault(name, set())
        for text in metadata.distribution(name).requires or ():
            wanted = Requirement(text)
            marker = wanted.marker
            if marker and not any(marker.evaluate({"extra": one}) for one in (extras or {""})):
                continue
            needed = canonicalize_name(wanted.name)
            if needed != name:
                mine.add(needed)
            waiting.append((needed, frozenset(wanted.extras)))
    return needs


def reference(name: str) -> str:
    return f"pkg:pypi/{name}@{metadata.version(name)}"


def component(name: str) -> dict[str, Any]:
    about = metadata.metadata(name)
    made: dict[str, Any] = {
        "type": "application" if name == ROOT[0] else "library",
        "bom-ref": reference(name),
        "name": name,
        "version": metadata.version(name),
        "purl": reference(name),
    }
    if expression := about.get("License-Expression"):
        made["licenses"] = [{"expression": expression}]
    else:
        prefix = "License :: "
        listed = [c for c in about.get_all("Classifier") or () if c.startswith(prefix)]
        names = [one.rpartition(" :: ")[2] for one in listed] or [about.get("License") or ""]
        short = [one.splitlines()[0][:100] for one in names if one]
        made["licenses"] = [{"license": {"name": one}} for one in short]
    if summary := about.get("Summary"):
        made["description"] = summary
    return made


def main() -> None:
    needs = closure()
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": component(ROOT[0]),
        },
        "components": [component(name) for name in sorted(needs) if name != ROOT[0]],
        "dependencies": [
            {"ref": reference(name), "dependsOn": sorted(map(reference, needed))}
            for name, needed in sorted(needs.items())
        ],
    }
    text = json.dumps(document, indent=2) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
