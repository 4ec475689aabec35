"""Runs the observers of one namespace and puts what they say into one `NetnsSnapshot`.

One thread enters the namespace and does it all: the save commands are started first, netlink and
/proc are read while they run, and they are collected last.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from gketrace.errors import GketraceError
from gketrace.ruleset import Ruleset
from gketrace.snapshot import Link, Maybe, NetnsSnapshot, Unavailable
from gketrace.trace import Missing, NetnsRef
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netlink import NETLINK_NETFILTER
from gketrace_agent.kernel.netns import NetnsHandle, run_in_netns
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.observe.addresses import observe_addresses
from gketrace_agent.observe.conntrack import Conntrack, observe_conntrack
from gketrace_agent.observe.fdb import observe_fdb
from gketrace_agent.observe.ipsets import observe_ipsets
from gketrace_agent.observe.iptables import (
    DumpCache,
    IptablesDumps,
    IptablesReading,
    Programs,
    start_iptables,
)
from gketrace_agent.observe.links import KnownNetns, LinkTable, observe_links
from gketrace_agent.observe.neighbours import observe_neighbours
from gketrace_agent.observe.nftables import NftablesDump, NftablesReading, start_nftables
from gketrace_agent.observe.recent import observe_recent
from gketrace_agent.observe.routes import observe_routes
from gketrace_agent.observe.rules import observe_rules
from gketrace_agent.observe.rulesets import make_rulesets
from gketrace_agent.observe.sockets import observe_sockets
from gketrace_agent.observe.sysctls import observe_sysctls

__all__ = ["NOUNS", "Namespace", "Observation", "Observer"]

T = TypeVar("T")

NOUNS: Final = (
    "links",
    "addresses",
    "routes",
    "rules",
    "neighbours",
    "fdb",
    "sysctls",
    "sockets",
    "rulesets",
    "conntrack",
    "recent",
    "ipsets",
)
"""What can be observed; the names of `NetnsSnapshot`'s fields."""
_NOT_ASKED: Final = Unavailable(reason="not asked for")


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A network namespace of this node, held open by `handle`, which stays the caller's."""

    ref: NetnsRef
    handle: NetnsHandle
    pids: tuple[int, ...] = ()
    """Processes known to be in it: the owners of its sockets are looked for among them."""
    runtime_handler: str = ""
    """The sandbox's runtime handler: under ``gvisor`` the kernel has no sockets of the pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A snapshot, and how it was made.  Its conntrack view holds a socket: `close` it."""

    snapshot: NetnsSnapshot
    seconds: Mapping[str, float]
    """Noun → how long its observer took; ``total``."""
    failures: Mapping[str, str]
    """Noun → why it could not be read."""
    iptables: Maybe[IptablesDumps] = _NOT_ASKED
    nftables: Maybe[NftablesDump | None] = _NOT_ASKED
    conntrack: Maybe[Conntrack] = _NOT_ASKED
    """`NetnsSnapshot.conntrack` with the agent's own methods."""

    def close(self) -> None:
        """May be called twice."""
        if isinstance(self.conntrack, Conntrack):
            self.conntrack.close()

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """Observes namespaces of one node.  Keeps nothing but the rule sets that are still true."""

    paths: HostPaths = field(default_factory=HostPaths)
    programs: Programs = field(default_factory=Programs)
    dumps: DumpCache = field(default_factory=DumpCache)

    def observe(
        self,
        namespace: Namespace,
        *,
        known: Sequence[Namespace] = (),
        only: frozenset[str] = frozenset(NOUNS),
        fresh: bool = False,
    ) -> Observation:
        """What the kernel says of `namespace` now.

        `known`: the node's namespaces that are known, to name veth peers' ones.  `only`: the
        `NOUNS` that are wanted; the other fields are `Unavailable`.  `fresh`: read the rules even
        when they have not changed, for their counters.  Raises `GketraceError` when the namespace
        cannot be entered; whatever goes wrong inside becomes `Unavailable` and `Missing`.
        """
        unknown = only - set(NOUNS)
        if unknown:
            raise ValueError(f"no such nouns: {', '.join(sorted(unknown))}")
        return run_in_netns(
            namespace.handle, lambda: _Run(self, namespace, known, only, fresh).run()
        )


class _Run:
    """One observation of one namespace, inside it."""

    def __init__(
        self,
        observer: Observer,
        namespace: Namespace,
        known: Sequence[Namespace],
        only: frozenset[str],
        fresh: bool,
    ) -> None:
        self._observer = observer
        self._namespace = namespace
        self._known = tuple(KnownNetns(ref=n.ref, fd=n.handle.fd) for n in known)
        self._only = only
        self._fresh = fresh
        self._seconds: dict[str, float] = {}
        self._failures: dict[str, str] = {}
        self._reader = KernelReader(observer.paths, namespace.handle.inode)

    def run(self) -> Observation:
        keep = False
        try:
            observation = self._observe()
            keep = isinstance(observation.conntrack, Conntrack)
            return observation
        finally:
            self._reader.close(keep=frozenset({NETLINK_NETFILTER} if keep else ()))

    def _take(self, noun: str, read: Callable[[], T], *, wanted_by: str = "") -> Maybe[T]:
        """What `read` gives, timed; its failure becomes `Unavailable`, under the noun's name."""
        if (wanted_by or noun) not in self._only:
            return _NOT_ASKED
        started = time.perf_counter()
        try:
            result: Maybe[T] = read()
        except GketraceError as error:
            result = Unavailable(reason=str(error))
        except OSError as error:
            result = Unavailable(reason=f"{error.filename or noun}: {error.strerror or error}")
        except (ValueError, KeyError, IndexError, struct.error) as error:
            # An answer of a shape that no kernel that we know gives.
            result = Unavailable(
                reason=f"{noun}: the kernel's answer is not understood ({type(error).__name__}: "
                f"{error})"
            )
        self._seconds[noun] = self._seconds.get(noun, 0.0) + time.perf_counter() - started
        if isinstance(result, Unavailable):
            self._failures[noun] = result.reason
        return result

    def _observe(self) -> Observation:
        began = time.perf_counter()
        taken_at = time.time()
        reader, here = self._reader, self._namespace
        observer = self._observer
        # The commands first: they run while we read the rest.
        reading = self._take("rulesets", self._start)
        try:
            table = self._take(
                "links",
                lambda: observe_links(reader, here.ref, self._known),
                wanted_by=self._wants_links(),
            )
            name = table.name if isinstance(table, LinkTable) else _anonymous
            addresses = self._take("addresses", lambda: observe_addresses(reader))
            routes = self._take("routes", lambda: observe_routes(reader, name))
            rules = self._take("rules", lambda: observe_rules(reader))
            neighbours = self._take("neighbours", lambda: observe_neighbours(reader))
            fdb = self._take("fdb", lambda: observe_fdb(reader))
            sysctls = self._take("sysctls", lambda: self._sysctls(table))
            sockets = self._take(
                "sockets", lambda: observe_sockets(reader, here.pids, here.runtime_handler, name)
            )
            recent = self._take("recent", lambda: observe_recent(reader))
            ipsets = self._take("ipsets", lambda: observe_ipsets(reader, observer.programs))
        except BaseException:
            if isinstance(reading, _Reading):
                reading.abandon()
            raise
        iptables, nftables, rulesets = self._finish(reading)
        conntrack = self._take(
            "conntrack", lambda: observe_conntrack(reader, rulesets, iptables, nftables)
        )
        self._seconds["total"] = time.perf_counter() - began
        return Observation(
            snapshot=NetnsSnapshot(
                netns=here.ref,
                links=self._links(table),
                addresses=addresses,
                routes=routes,
                rules=rules,
                neighbours=neighbours,
                fdb=fdb,
                sysctls=sysctls,
                sockets=sockets,
                rulesets=rulesets,
                conntrack=conntrack,
                recent=recent,
                ipsets=ipsets,
                missing=self._missing(rulesets, iptables),
                taken_at=taken_at,
            ),
            seconds=self._seconds,
            failures=self._failures,
            iptables=iptables,
            nftables=nftables,
            conntrack=conntrack,
        )

    def _wants_links(self) -> str:
        """Which wanted noun needs the links: the texts of routes do, and single links' sysctls."""
        for noun in ("links", "routes", "sysctls", "sockets"):
            if noun in self._only:
                return noun
        return "links"

    def _links(self, table: Maybe[LinkTable]) -> Maybe[tuple[Link, ...]]:
        if "links" not in self._only:
            return _NOT_ASKED
        return table.links if isinstance(table, LinkTable) else table

    def _sysctls(self, table: Maybe[LinkTable]) -> Mapping[str, str]:
        values = observe_sysctls(self._reader)
        if isinstance(table, LinkTable):
            values.update(table.sysctls)
        return values

    def _start(self) -> _Reading:
        reader, programs = self._reader, self._observer.programs
        iptables = start_iptables(reader, programs, cache=self._observer.dumps, fresh=self._fresh)
        try:
            nftables = start_nftables(
                programs,
                reader.netfilter,
                iptables.tables if iptables.shared is None else (),
                iptables.generation or 0,
            )
        except BaseException:
            iptables.abandon()
            raise
        return _Reading(iptables, nftables)

    def _finish(
        self, reading: Maybe[_Reading]
    ) -> tuple[Maybe[IptablesDumps], Maybe[NftablesDump | None], tuple[Maybe[Ruleset], ...]]:
        if isinstance(reading, Unavailable):
            return reading, reading, (reading,)
        finished = self._take("rulesets", reading.finish)
        if isinstance(finished, Unavailable):
            return finished, finished, (finished,)
        iptables, nftables = finished
        rulesets = self._take("rulesets", lambda: make_rulesets(iptables, nftables))
        return iptables, nftables, (rulesets,) if isinstance(rulesets, Unavailable) else rulesets

    def _missing(
        self, rulesets: tuple[Maybe[Ruleset], ...], iptables: Maybe[IptablesDumps]
    ) -> tuple[Missing, ...]:
        node, netns = self._namespace.ref.node, str(self._namespace.ref)
        whys = [(noun, why) for noun, why in self._failures.items() if noun != "rulesets"]
        whys += [
            ("rulesets", one.reason)
            for one in rulesets
            if isinstance(one, Unavailable) and one is not _NOT_ASKED
        ]
        whys += [(noun, "changed each time it was read") for noun in self._reader.inconsistent]
        if isinstance(iptables, IptablesDumps) and not iptables.consistent:
            whys.append(("rulesets", "the rules changed each time they were read"))
        return tuple(Missing(what=what, why=why, node=node, netns=netns) for what, why in whys)


def _anonymous(ifindex: int) -> str:
    return f"if{ifindex}"


class _Reading:
    """The commands under way."""

    def __init__(self, iptables: IptablesReading, nftables: NftablesReading) -> None:
        self._iptables = iptables
        self._nftables = nftables

    def finish(self) -> tuple[IptablesDumps, NftablesDump | None]:
        if self._iptables.shared is not None:
            return self._iptables.shared
        try:
            found = self._iptables.finish(), self._nftables.finish()
            if found[1] is not None:
                found[1].rulesets()  # as long as it is nobody else's turn: it takes memory, too
            self._iptables.release(found)
            return found
        finally:
            self.abandon()

    def abandon(self) -> None:
        self._iptables.abandon()
        self._nftables.abandon()
