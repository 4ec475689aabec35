"""Helm itself, as a library, on an API server of the lab's; prints the manifests as JSON.

    HELM_DRIVER=memory python -m tests.deploy.charts KUBECONFIG NAMESPACE VALUES...

VALUES are JSON; the first installs, each further one upgrades.  Releases are kept in memory
(HELM_DRIVER), as the lab's API server takes no protobuf.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import helm_sdkpy

CHART = Path(__file__).resolve().parents[2] / "deploy/helm/gketrace"


async def release(kubeconfig: str, namespace: str, values: list[dict[str, Any]]) -> list[str]:
    """The manifest of each release, the first an installation and the others upgrades."""
    made = []
    with helm_sdkpy.Configuration(namespace=namespace, kubeconfig=kubeconfig) as configuration:
        actions = [helm_sdkpy.Install(configuration)]
        actions += [helm_sdkpy.Upgrade(configuration) for _ in values[1:]]
        for action, given in zip(actions, values, strict=True):
            done = await action.run("gketrace", str(CHART), given, wait=False, timeout=30)
            made.append(done["manifest"])
    return made


def main(kubeconfig: str, namespace: str, *values: str) -> int:
    try:
        made = asyncio.run(release(kubeconfig, namespace, [json.loads(one) for one in values]))
    except helm_sdkpy.HelmError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
