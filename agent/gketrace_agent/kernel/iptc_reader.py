"""Reads legacy iptables with python-iptables and prints what ``iptables-save -c`` would.

A program of its own, ``python -m gketrace_agent.kernel.iptc_reader 4|6``, for nodes where the save
command is missing: python-iptables keeps one handle for each process across namespaces and
redirects the process's standard output while it works.  It is slow (1 ms a rule) and sees the
legacy backend only.

Tables are opened without autocommit, as python-iptables otherwise writes a table back when it lets
go of it; and only those of ip_tables_names, as opening makes a table that is not there.

The text of matches and targets is what libxtables' modules print themselves (``save``), as in
iptables-save; around it this follows iptables/iptables.c print_rule4().
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["main"]

_NAMES: Final = {"4": "ip_tables_names", "6": "ip6_tables_names"}


def main(arguments: list[str]) -> int:
    """Prints the tables of one family.  1, and a line on stderr, when something is not readable."""
    if len(arguments) != 1 or arguments[0] not in _NAMES:
        sys.stderr.write("usage: iptc_reader 4|6\n")
        return 2
    (family,) = arguments
    names = Path("/proc/thread-self/net", _NAMES[family]).read_text().split()
    try:
        import iptc

        kind = iptc.Table if family == "4" else iptc.Table6
        # All of it first: while a module prints, standard output is not ours.
        lines = [line for name in names for line in _table(kind(name, autocommit=False))]
    except Exception as error:  # noqa: BLE001 - ctypes over libiptc: whatever it is, say it
        sys.stderr.write(f"python-iptables: {type(error).__name__}: {error}\n")
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    return 0


def _table(table: Any) -> Iterator[str]:
    yield f"*{table.name}"
    chains = list(table.chains)
    for chain in chains:
        if chain.is_builtin():
            packets, octets = chain.get_counters()
            yield f":{chain.name} {chain.get_policy().name} [{packets}:{octets}]"
        else:
            yield f":{chain.name} - [0:0]"
    for chain in chains:
        for rule in chain.rules:
            packets, octets = rule.get_counters()
            yield f"[{packets}:{octets}] -A {chain.name}{_header(rule)}{_extensions(rule)}"
    yield "COMMIT"


def _header(rule: Any) -> str:
    words = []
    for option, value in (("-s", rule.src), ("-d", rule.dst)):
        inverted, network = value.startswith("!"), _prefix(value.lstrip("!"))
        if network is not None:
            words.append(f"{'! ' * inverted}{option} {network}")
    for option, value in (("-i", rule.in_interface), ("-o", rule.out_interface)):
        if value:
            words.append(f"{'! ' * value.startswith('!')}{option} {value.lstrip('!')}")
    protocol = rule.protocol
    if protocol.lstrip("!") not in ("ip", "0", "all"):
        words.append(f"{'! ' * protocol.startswith('!')}-p {protocol.lstrip('!')}")
    if getattr(rule, "fragment", False):
        words.append("-f")
    return "".join(f" {word}" for word in words)


def _prefix(value: str) -> str | None:
    """``10.0.0.0/255.0.0.0`` → ``10.0.0.0/8``; None for everything; odd masks stay as they are."""
    address, _, mask = value.partition("/")
    try:
        if ":" in address and not mask.isdigit():
            bits = int(ipaddress.IPv6Address(mask))
            length = bits.bit_count()
            if bits != ((1 << length) - 1) << (128 - length):
                return value
            mask = str(length)
        network = ipaddress.ip_network(f"{address}/{mask}", strict=False)
    except ValueError:
        return value
    return None if network.prefixlen == 0 else f"{address}/{network.prefixlen}"


def _extensions(rule: Any) -> str:
    parts = [f" -m {match.name}{_saved(match, rule)}" for match in rule.matches]
    target = rule.target
    if target is not None and target.name:
        word = "-g" if target.goto else "-j"
        parts.append(f" {word} {target.name}{_saved(target, rule)}")
    return "".join(parts)


def _saved(module: Any, rule: Any) -> str:
    """What the module prints of itself, with a leading blank, or nothing.

    As IPTCModule._get_saved_buf(), which waits for ever for a module that prints nothing
    (``-m tcp``) and cuts at 1,024 bytes: here the output goes to a file in memory.
    """
    if not module._module or not module._module.save:
        return ""
    sys.stdout.flush()
    ours = os.dup(1)
    memory = os.memfd_create("iptc")
    try:
        os.dup2(memory, 1)
        module._xt.save(module._module, rule.get_ip(), module._ptr)
        os.dup2(ours, 1)
        size = os.lseek(memory, 0, os.SEEK_CUR)
        text = os.pread(memory, size, 0).decode("utf-8", "backslashreplace").strip()
    finally:
        os.close(memory)
        os.close(ours)
    return f" {text}" if text else ""


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # Not sys.exit: python-iptables' finalizers have nothing to do here and must not commit.
    os._exit(code)
