"""ipsets, as ``ipset save`` prints them.

Source: kernel net/netfilter/ipset/ip_set_core.c; ipset lib/session.c (save output).
"""

from __future__ import annotations

from collections.abc import Iterator

from gketrace.snapshot import IpSet, IpSetEntry, Maybe, Unavailable
from gketrace_agent.kernel.nfnetlink import ipset_names
from gketrace_agent.kernel.process import find_program, run
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.observe.iptables import Programs

__all__ = ["observe_ipsets", "parse_ipset_save"]


def observe_ipsets(reader: KernelReader, programs: Programs) -> Maybe[dict[str, IpSet]]:
    """Set name → set.  Nothing is asked of a kernel that has not loaded ip_set."""
    if not (reader.paths.sys / "module" / "ip_set").exists():
        return {}
    names = ipset_names(reader.netfilter)
    if not names:
        return {}
    program = find_program(*programs.ipset)
    if program is None:
        return Unavailable(
            reason=f"{len(names)} ipsets exist and none of {', '.join(programs.ipset)} is installed"
        )
    result = run((program, "save"), timeout=programs.timeout, limit=programs.limit)
    if not result.ok:
        return Unavailable(reason=result.failure())
    return parse_ipset_save(result.stdout.decode("utf-8", "backslashreplace"))


def parse_ipset_save(text: str) -> dict[str, IpSet]:
    """``create NAME TYPE OPTIONS`` and ``add NAME ELEMENT OPTIONS`` lines → sets.

    Raises ValueError for any other line.
    """
    headers: dict[str, tuple[str, dict[str, str]]] = {}
    entries: dict[str, list[IpSetEntry]] = {}
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "create" and len(words) >= 3:
            headers[words[1]] = (words[2], dict(_options(words[3:])))
            entries[words[1]] = []
        elif words[0] == "add" and len(words) >= 3 and words[1] in entries:
            options = dict(_options(words[3:]))
            entries[words[1]].append(
                IpSetEntry(
                    parts=tuple(words[2].split(",")),
                    nomatch="nomatch" in options,
                    timeout=int(options["timeout"]) if "timeout" in options else None,
                    text=line,
                )
            )
        else:
            raise ValueError(f"not a line of ipset save: {line[:200]!r}")
    return {
        name: IpSet(
            name=name,
            type=kind,
            family={"inet": 4, "inet6": 6}.get(header.get("family", ""), 0),
            entries=tuple(entries[name]),
            header=header,
        )
        for name, (kind, header) in headers.items()
    }


_FLAGS = frozenset({"nomatch", "counters", "comment", "skbinfo", "forceadd", "wildcard"})


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    """``family inet counters`` → pairs; a word that takes no value has the empty one."""
    position = 0
    while position < len(words):
        word = words[position]
        if word == "comment" and position + 1 < len(words) and words[position + 1][0] == '"':
            # An element's comment: a quoted string that may hold blanks, always last.
            yield word, " ".join(words[position + 1 :]).strip('"')
            return
        if word in _FLAGS or position + 1 == len(words):
            yield word, ""
            position += 1
        else:
            yield word, words[position + 1]
            position += 2
