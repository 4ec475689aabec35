"""`e2e/packaged`: the agents from their image, with what deploy/daemonset.yaml gives them.

`suite` runs the end-to-end tests with such agents, or those of its files that are named after the
archive; its last line is a JSON object.

`capabilities` takes each added capability away in turn, restarts the agents and runs one command of
each kind: either the agent does not start and its log says why, or each command that is affected
names the capability.  What it prints is the table in docs/capabilities.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import yaml

from e2e.answers import Ran, run_cli
from e2e.netlab import Lab, LabError
from e2e.netlab.api import AGENT_IMAGE_VARIABLE
from e2e.netlab.state import runtime_dir

__all__ = ["main"]

_HERE = Path(__file__).parent
_SUITE = (
    "test_access.py",
    "test_answers.py",
    "test_bundle.py",
    "test_capture.py",
    "test_chains.py",
    "test_conntrack.py",
    "test_containerd.py",
    "test_follow.py",
    "test_follow_packets.py",
    "test_node_addresses.py",
    "test_pinned.py",
    "test_sctp.py",
    "test_wrong_input.py",
)
"""Tests of what gketrace says."""
_OF_PROCESSES = "its expectations name what pods that are processes in the lab's cgroups look like"
_OF_THE_LAB = "it tests the lab, not gketrace"
_LEFT_OUT = {
    "test_docs.py": f"{_OF_PROCESSES}: PIDs, namespaces, commands in the documents' output",
    "test_kubeapi.py": f"{_OF_THE_LAB}: its API server, without agents",
    "test_kubeapi_portforward.py": f"{_OF_THE_LAB}: its API server, without agents",
    "test_lab.py": f"{_OF_THE_LAB}: how it is built of processes",
    "test_lab_traffic.py": f"{_OF_THE_LAB}: how packets go through it, without agents",
    "test_scenarios.py": f"{_OF_PROCESSES}: findings of the untouched lab, and faults made there",
}
"""Tests that say nothing of the packaged agent, and why."""
_COMMANDS = (
    ("status",),
    ("pod", "web-0"),
    ("service", "web-affinity"),
    ("rules", "node/2jdh"),
    ("rules", "pod/web-0"),
    ("conntrack", "-L"),
    ("connections", "--pods"),
    ("capture", "pod/web-0", "--duration", "1"),
    ("check",),
)


def _capabilities() -> tuple[str, ...]:
    text = (_HERE.parent / "deploy/daemonset.yaml").read_text()
    spec = next(one for one in yaml.safe_load_all(text) if one["kind"] == "DaemonSet")["spec"]
    container = spec["template"]["spec"]["containers"][0]
    return tuple(container["securityContext"]["capabilities"]["add"])


def _words(ran: Ran) -> str:
    return " ".join((ran.out + ran.err).split())


def _names(ran: Ran) -> str:
    """Which capability the command says that the agent needs."""
    found = sorted(set(re.findall(r"the agent needs ([A-Z_]+)", _words(ran))))
    return ", ".join(found)


def _last_logged(lab: Lab) -> str:
    """The last line of the log of the agent that was started last and failed."""
    logs = runtime_dir(lab.name).glob("logs/*/gketrace-system_*/agent/*.log")
    newest = max(logs, key=lambda path: path.stat().st_mtime)
    return newest.read_text().splitlines()[-1].split(" F ", 1)[-1]


def _suite(archive: str, more: Sequence[str]) -> int:
    """Runs the tests; the last line is a JSON object with what came of them, and what was left out
    and why.  1 when one failed, or a file of tests is neither run nor left out."""
    unknown = sorted(
        path.name
        for path in _HERE.glob("test_*.py")
        if path.name not in _SUITE and path.name not in _LEFT_OUT
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        argv = [sys.executable, "-m", "pytest", f"--junitxml={report}", *more]
        if not any(word.partition("::")[0].endswith(".py") for word in more):
            argv += [str(_HERE / name) for name in _SUITE]
        done = subprocess.run(
            argv, env={**os.environ, AGENT_IMAGE_VARIABLE: os.path.abspath(archive)}, check=False
        )
        told = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    counts = {} if told is None else dict(told.attrib)
    failed = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
    result = {
        "tests": int(counts.get("tests", 0)),
        "failed": failed,
        "skipped": int(counts.get("skipped", 0)),
        "seconds": round(float(counts.get("time", 0))),
        "left_out": _LEFT_OUT,
        "neither_run_nor_left_out": unknown,
    }
    print(json.dumps(result), flush=True)
    return int(bool(done.returncode or unknown))


def _run_commands(lab: Lab) -> dict[str, Ran]:
    return {" ".join(words): run_cli(lab, *words, timeout=180) for words in _COMMANDS}


def _without_each(lab: Lab) -> int:
    """Prints a table; how many capabilities are missed without a word."""
    silent = 0
    complete = _run_commands(lab)
    print("| without | command | exit, was | says |\n|---|---|---|---|", flush=True)
    for name in _capabilities():
        try:
            lab.restart_agents(without=[name])
        except LabError:
            said = _last_logged(lab)
            silent += name not in said
            print(f"| {name} | the agent does not start | | {said} |", flush=True)
            continue
        affected = 0
        for command, ran in _run_commands(lab).items():
            named = _names(ran)
            if not named and ran.code == complete[command].code:
                continue
            affected += 1
            silent += name not in named
            said = f"the agent needs {named}" if named else _words(ran)[:200]
            print(f"| {name} | {command} | {ran.code}, {complete[command].code} | {said} |")
        if not affected:
            print(f"| {name} | none of these is affected | | |", flush=True)
    lab.restart_agents()
    return silent


def _under_profile(lab: Lab) -> int:
    """Prints which commands end otherwise under the runtime's seccomp profile; how many."""
    complete = _run_commands(lab)
    lab.restart_agents(seccomp="RuntimeDefault")
    differing = 0
    for command, ran in _run_commands(lab).items():
        same = ran.code == complete[command].code
        differing += not same
        told = "as without" if same else f"exit {ran.code}, was {complete[command].code}"
        print(f"{command}: {told}", flush=True)
    return differing


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 when all is as promised."""
    parser = argparse.ArgumentParser(prog="e2e/packaged", description=__doc__)
    parser.add_argument("what", choices=("suite", "capabilities", "seccomp"))
    parser.add_argument("archive")
    parser.add_argument("--topology", default="ptp")
    parser.add_argument("--era", default="1.36")
    parser.add_argument("--backend")
    parser.add_argument("--lab", default="", help="use this lab, which is up")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.what == "suite":
        return _suite(arguments.archive, rest)
    lab = Lab(
        arguments.lab or f"packaged-{os.getpid()}",
        topology=arguments.topology,
        era=arguments.era,
        backend=arguments.backend,
        pods="containerd",
        agent_image=arguments.archive,
    )
    run = {"capabilities": _without_each, "seccomp": _under_profile}[arguments.what]
    if arguments.lab:
        return int(run(lab) > 0)
    with lab:
        return int(run(lab) > 0)


if __name__ == "__main__":
    sys.exit(main())
