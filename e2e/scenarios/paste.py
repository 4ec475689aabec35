"""A finding's command, pasted as it stands to where it says that it is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

from e2e.answers import run_cli
from e2e.netlab import Lab

__all__ = ["is_elsewhere", "paste"]

_PLACE = re.compile(r"  # (?:in pod (?P<pod>\S+) )?on node (?P<node>\S+)$")
_NO_SUCH = re.compile(r"unknown (?:command|flag|shorthand)|invalid argument|required flag")
"""What kubectl says of a line that it does not take.  That the lab has no such pod is no fault."""


def is_elsewhere(command: str) -> bool:
    """Whether it is run on a node or in a pod."""
    return _PLACE.search(command) is not None


def paste(lab: Lab, command: str) -> str:
    """What went wrong; empty: nothing did."""
    place = _PLACE.search(command)
    if place is not None:
        where = f"pod/{place['pod']}" if place["pod"] else f"node/{place['node']}"
        done = lab.exec(where, ["bash", "-c", command])
        return f"{command}: exit {done.returncode}: {done.stderr}" if done.returncode else ""
    words = shlex.split(command)
    if words[0] == "gketrace":
        ran = run_cli(lab, *words[1:])
        return f"{command}: exit {ran.code}: {ran.err}" if ran.code == 2 else ""
    if words[0] != "kubectl":
        return f"{command}: nobody knows where to run it"
    env = {**os.environ, "KUBECONFIG": str(lab.kubeconfig), "EDITOR": "true"}
    ran_it = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=30)
    return f"{command}: {ran_it.stderr}" if _NO_SUCH.search(ran_it.stderr) else ""
