"""The command `e2e/lab`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from e2e.netlab.errors import LabError
from e2e.netlab.lifecycle import control, down, running_state, up
from e2e.netlab.network import ROUTER_IP
from e2e.netlab.targets import find_node, resolve
from e2e.netlab.world import TOPOLOGIES

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="e2e/lab",
        description="The tutorial's cluster in network namespaces of this machine.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="lab", help="which lab (default: lab)")

    item = commands.add_parser("up", parents=[common], help="build it; prints its kubeconfig")
    item.add_argument("--topology", choices=TOPOLOGIES, default="bridge")
    item.add_argument("--era", choices=("1.20", "1.30", "1.36"), default="1.36")
    item.add_argument("--backend", choices=("legacy", "nft", "nftables"))
    item.add_argument("--pods", choices=("process", "containerd"), default="process")
    item.add_argument(
        "--agent-image",
        default="",
        metavar="ARCHIVE",
        help="run the agents from this image (scripts/image), as deploy/daemonset.yaml says",
    )
    commands.add_parser("down", parents=[common], help="remove it")
    item = commands.add_parser("status", parents=[common], help="what is there")
    item.add_argument("--json", action="store_const", const="json", dest="output")
    item.add_argument("-o", "--output", choices=("text", "json"), default="text")
    item = commands.add_parser(
        "exec",
        parents=[common],
        help="run a command in it",
        usage="e2e/lab exec [--name NAME] node/NAME|pod/NAME|client[/ADDRESS] -- COMMAND...",
    )
    item.add_argument("target")
    item.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND")
    item = commands.add_parser(
        "lb-target", parents=[common], help="send a load balancer's address to another node"
    )
    item.add_argument("address")
    item.add_argument("node")
    item = commands.add_parser("agent", parents=[common], help="start or stop a node's agent")
    item.add_argument("action", choices=("start", "stop"))
    item.add_argument("node")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except LabError as error:
        print(f"e2e/lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("e2e/lab: interrupted; nothing is left of the lab", file=sys.stderr)
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "up":
        signal.signal(signal.SIGTERM, _interrupt)
        path = up(
            name=arguments.name,
            topology=arguments.topology,
            era=arguments.era,
            backend=arguments.backend,
            pods=arguments.pods,
            agent_image=arguments.agent_image,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
        print(path, flush=True)
    elif arguments.command == "down":
        if not down(arguments.name):
            print(f"lab {arguments.name!r} is not there", file=sys.stderr)
    elif arguments.command == "status":
        _status(arguments.name, arguments.output)
    elif arguments.command == "exec":
        _exec(arguments.name, arguments.target, arguments.argv)
    elif arguments.command == "lb-target":
        state = running_state(arguments.name)
        if arguments.address not in state["lb_targets"]:
            known = ", ".join(state["lb_targets"])
            raise LabError(f"{arguments.address}: not a load balancer's address; have: {known}")
        node = find_node(state, arguments.node)
        control(arguments.name, {"op": "lb-target", "address": arguments.address, "node": node})
    else:
        node = find_node(running_state(arguments.name), arguments.node)
        answer = control(arguments.name, {"op": "agent", "node": node, "action": arguments.action})
        print(f"agent on {node}: {answer['agent']['state']}")
    return 0


def _exec(name: str, target: str, argv: list[str]) -> None:
    command = argv[1:] if argv[:1] == ["--"] else argv
    if not command:
        raise LabError("exec: no command; write it after --")
    place = resolve(running_state(name), target)
    words = place.argv(command, str(Path.cwd()))
    os.execvp(words[0], words)


def _status(name: str, output: str) -> None:
    state = running_state(name)
    live = control(name, {"op": "status"})
    for node, entry in state["nodes"].items():
        entry["agent"] = live["nodes"][node]["agent"]
    for key, pod in state["pods"].items():
        pod["running"] = live["nodes"][pod["node"]]["pods"][key]["running"]
    state["api"] = live["api"]
    if output == "json":
        print(json.dumps(state, indent=1))
        return
    with contextlib.suppress(BrokenPipeError):
        print("\n".join(_status_lines(state)))


def _status_lines(state: dict[str, Any]) -> list[str]:
    lines = [
        f"lab {state['name']}: kube-proxy {state['era']}, {state['backend']},"
        f" topology {state['topology']}, pods {state['pods_backend']}, agents {state['agents']}",
        f"kubeconfig {state['kubeconfig']} (api: {state['api']})",
        "",
        "NODES",
    ]
    for name, node in state["nodes"].items():
        lines += [
            f"  {name}",
            f"    {node['ip']} {node['ip6']}  pods {node['pod_cidr']} {node['pod_cidr6']}"
            f"  pid {node['pid']}  netns {node['netns']}",
            f"    agent: {node['agent']['state']}  {node['agent_socket']}",
        ]
    lines += ["", "PODS"]
    for key, pod in state["pods"].items():
        short = state["nodes"][pod["node"]]["short"]
        running = "" if pod["running"] else "  NOT RUNNING"
        lines.append(
            f"  {key:<40} {pod['ip']:<12} {short}  pid {pod['pid']}  netns {pod['netns']}{running}"
        )
    lines += ["", f"CLIENTS\n  client = client/{ROUTER_IP} (router, default gateway)"]
    lines += [f"  client/{ip}  {ip6}" for ip, ip6 in state["clients"].items()]
    lines += ["", "LOAD BALANCER (address -> node; set with `lb-target`)"]
    for address, node in state["lb_targets"].items():
        lines.append(f"  {address} -> {state['nodes'][node]['short']}")
    lines += ["", "SYNTHETIC (not from the captured cluster)"]
    for item in state["synthetic"]:
        lines += [f"  {item['name']}", f"    where: {item['where']}", f"    why: {item['why']}"]
    return lines
