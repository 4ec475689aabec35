"""iptables rules of both backends and both families, as the save commands print them.

Which commands run is decided before any of them does:

- legacy: only when ip_tables_names lists a table.  iptables-legacy-save on a table that is not
  there would create it, and its hooks with it.
- nft: only when nf_tables has a table that iptables-nft uses.  A kernel without nf_tables has no
  such backend: that is no error.

The commands start side by side in the namespace's thread; the caller reads other things meanwhile
and collects them at the end.  A command that fails is an `Unavailable` with what it wrote to
stderr, never "no rules".

Source: kernel net/ipv4/netfilter/ip_tables.c, net/netfilter/x_tables.c (xt_table_seq_show);
iptables iptables/iptables-save.c, nft-shared.c; hint chains: kubernetes-sigs/iptables-wrappers.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gketrace.errors import GketraceError, ParseError
from gketrace.ruleset import Ruleset
from gketrace.ruleset.iptables_save import parse_iptables_save
from gketrace.snapshot import Maybe, Unavailable
from gketrace_agent.kernel.nfnetlink import NftTable, nft_generation, nft_tables
from gketrace_agent.kernel.process import Child, Completed, collect, find_program, start
from gketrace_agent.kernel.reader import KernelReader

__all__ = [
    "IPTABLES_TABLES",
    "LEGACY",
    "NFT",
    "DumpCache",
    "IptablesDump",
    "IptablesDumps",
    "IptablesReading",
    "Programs",
    "start_iptables",
]

LEGACY: Final = "iptables-legacy"
NFT: Final = "iptables-nft"
IPTABLES_TABLES: Final = frozenset({"filter", "nat", "mangle", "raw", "security"})
_HINTS: Final = (b"\n:KUBE-IPTABLES-HINT ", b"\n:KUBE-KUBELET-CANARY ")
_HOLDS: Final = re.compile(rb"\n(?:(?:\[\d+:\d+\] )?-A |:\S+ DROP )")
_TABLE: Final = b"# Table `"
_INCOMPATIBLE: Final = re.compile(rb"# Table `([^'\n]*)' (?:is incompatible|contains incompatible)")
_NAMES: Final = {4: "ip_tables_names", 6: "ip6_tables_names"}
_NFT_FAMILY: Final = {4: "ip", 6: "ip6"}
_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Which programs read rules, as names to search or paths, and their bounds."""

    legacy: tuple[str, ...] = ("iptables-legacy-save",)
    legacy6: tuple[str, ...] = ("ip6tables-legacy-save",)
    nft_backend: tuple[str, ...] = ("iptables-nft-save",)
    nft_backend6: tuple[str, ...] = ("ip6tables-nft-save",)
    nft: tuple[str, ...] = ("nft",)
    ipset: tuple[str, ...] = ("ipset",)
    python_iptables: bool = True
    """Read legacy with python-iptables where its save command is missing."""
    timeout: float = 120.0
    """Seconds for all the dumps of one namespace; iptables-nft-save was seen to need 50 for
    140,000 lines on a busy machine."""
    limit: int = 512 << 20
    """Bytes that one dump may have."""

    def save(self, backend: str, family: int) -> tuple[str, ...]:
        """The names of the save command of `backend` and `family`."""
        if backend == LEGACY:
            return self.legacy if family == 4 else self.legacy6
        return self.nft_backend if family == 4 else self.nft_backend6


@dataclass(slots=True, kw_only=True, eq=False)
class IptablesDump:
    """What one save command printed."""

    backend: str
    """`LEGACY` or `NFT`."""
    family: int
    """4 or 6."""
    text: bytes
    source: str
    """The command."""
    seconds: float
    """How long it took; of the first reading when it comes from the cache."""
    taken_at: float
    """Seconds since the epoch: the age of its counters."""
    generation: int | None = None
    """nf_tables' generation that it shows; None for legacy, which has none."""

    _ruleset: Maybe[Ruleset] | None = field(default=None, init=False, repr=False)

    def ruleset(self) -> Maybe[Ruleset]:
        """Parsed once; a cached dump keeps it."""
        if self._ruleset is None:
            try:
                self._ruleset = parse_iptables_save(
                    self.text,
                    source=self.source,
                    backend=self.backend,
                    family=self.family,
                    taken_at=self.taken_at,
                )
            except ParseError as error:
                self._ruleset = Unavailable(reason=str(error))
        return self._ruleset

    @property
    def holds_rules(self) -> bool:
        """It has a rule, or a policy that is not ACCEPT."""
        return _HOLDS.search(self.text) is not None

    @property
    def has_hint(self) -> bool:
        """kubelet's chains that say: this backend is the one in use."""
        # Not one expression: in 35 MB that takes 0.3 s, these 10 ms.
        return any(hint in self.text for hint in _HINTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class IptablesDumps:
    """All that the iptables backends hold in one namespace."""

    dumps: tuple[Maybe[IptablesDump], ...]
    """Those that exist and were read, and those that exist and could not be."""
    primary: str
    """The backend that Kubernetes uses here, `LEGACY` or `NFT`."""
    both: bool
    """Both backends hold rules: the kernel runs both."""
    consistent: bool = True
    """False: nf_tables' rules changed under every attempt to read them."""

    def of(self, backend: str) -> tuple[IptablesDump, ...]:
        """The dumps of one backend that could be read."""
        return tuple(
            dump
            for dump in self.dumps
            if isinstance(dump, IptablesDump) and dump.backend == backend
        )


@dataclass(slots=True)
class Turn:
    """One namespace's dumps are made one after the other: a large one takes hundreds of megabytes.

    Who waited through a whole reading takes what it found: it began after they asked.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: int = 0
    began: float = 0.0
    """When the reading began that found `dumps`; time.monotonic()."""
    dumps: IptablesDumps | None = None
    """Kept only while somebody waits."""


class DumpCache:
    """The nft dumps that are still true, by namespace and family; shared by a node's calls.

    Keyed by the namespace's cookie, which is never used again, and the generation.  The rules are
    then current; their counters are as old as `IptablesDump.taken_at` says.  Legacy has no
    generation and is always read again, but once for all who wait for it.
    """

    def __init__(self, *, most_bytes: int = 256 << 20) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._turns: dict[int, Turn] = {}
        self._dumps: OrderedDict[tuple[int, int], IptablesDump] = OrderedDict()

    def wait(self, cookie: int, timeout: float) -> tuple[Turn | None, bool]:
        """Whoever reads a namespace's rules holds its turn: give it back with `end`.  None: it was
        not to be had in time.  True: others had it first."""
        with self._lock:
            turn = self._turns.setdefault(cookie, Turn())
            if turn.lock.acquire(blocking=False):
                return turn, False
            turn.waiting += 1
        taken = turn.lock.acquire(timeout=timeout)
        with self._lock:
            turn.waiting -= 1
        return turn if taken else None, True

    def end(self, turn: Turn, began: float, dumps: IptablesDumps | None) -> None:
        """Gives it back; `dumps`, if there are any, were read since `began`."""
        with self._lock:
            if dumps is not None:
                turn.began, turn.dumps = began, dumps
            if not turn.waiting:
                turn.dumps = None
                for cookie in [c for c, one in self._turns.items() if one is turn]:
                    del self._turns[cookie]
        turn.lock.release()

    def get(self, cookie: int | None, family: int, generation: int) -> IptablesDump | None:
        """The dump of this very generation, if there is one."""
        if cookie is None:
            return None
        with self._lock:
            dump = self._dumps.get((cookie, family))
            if dump is None or dump.generation != generation:
                return None
            self._dumps.move_to_end((cookie, family))
            return dump

    def put(self, cookie: int | None, dump: IptablesDump) -> None:
        """Keeps it, and forgets the least used ones over the bound."""
        if cookie is None:
            return
        with self._lock:
            self._dumps[cookie, dump.family] = dump
            self._dumps.move_to_end((cookie, dump.family))
            while sum(len(kept.text) for kept in self._dumps.values()) > self._most:
                self._dumps.popitem(last=False)


@dataclass(slots=True)
class _Wanted:
    """A dump to make: under way, done already, or impossible."""

    backend: str
    family: int
    child: Child | None = None
    result: Maybe[IptablesDump] | None = None


class IptablesReading:
    """Dumps under way.  `finish` inside the same namespace; `abandon` if that is not to come."""

    def __init__(
        self,
        reader: KernelReader,
        programs: Programs,
        cache: DumpCache | None,
        *,
        fresh: bool,
    ) -> None:
        self._reader = reader
        self._programs = programs
        self._cache = cache
        self._fresh = fresh
        self._cookie = reader.netfilter.netns_cookie
        self._started_at = time.time()
        self.generation: int | None = None
        """nf_tables' generation when the reading began; None: no nf_tables."""
        self.tables: tuple[NftTable, ...] = ()
        """Every nf_tables table, iptables-nft's included."""
        self._legacy: tuple[int, ...] = ()
        """The families that have a table of legacy."""
        self._look()
        self._turn: Turn | None = None
        self._began = time.monotonic()
        self._shared: IptablesDumps | None = None
        """What another reading found that began after this one was asked for."""
        self._wanted: list[_Wanted] = []
        try:
            self._shared = self._wait_for_others()
            self._began, self._started_at = time.monotonic(), time.time()
            if self._shared is not None:
                return
            self._start_legacy()
            for family in self._nft_families():
                self._wanted.append(self._start(NFT, family))
        except BaseException:
            self.abandon()
            raise

    def _wait_for_others(self) -> IptablesDumps | None:
        """Takes the turn to read, unless all is in the cache; after the time that a dump may take
        it reads without a turn.  The result, if another reading has it."""
        if self._cache is None or self._cookie is None or self._is_cheap():
            return None
        asked = time.monotonic()
        self._turn, waited = self._cache.wait(self._cookie, self._programs.timeout)
        if self._turn is None or not waited:
            return None
        self._look()
        shared = self._turn.dumps if self._turn.began >= asked else None
        if shared is not None or self._is_cheap():
            self._release()
        return shared

    def _look(self) -> None:
        """Which rule sets there are."""
        self.generation = nft_generation(self._reader.netfilter)
        if self.generation is not None:
            self.tables = nft_tables(self._reader.netfilter)
        legacy = []
        for family, names in _NAMES.items():
            try:
                tables = self._reader.read_net(names).split()
            except FileNotFoundError:
                continue  # the module is not loaded
            if tables:
                legacy.append(family)
        self._legacy = tuple(legacy)

    def _is_cheap(self) -> bool:
        """True when no dump has to be made."""
        return not self._legacy and not self._fresh and self._cached()

    def _cached(self) -> bool:
        """True when no nft dump has to be made."""
        families = self._nft_families()
        if not families or self._cache is None or self.generation is None:
            return not families
        generation, cache = self.generation, self._cache
        return all(cache.get(self._cookie, f, generation) is not None for f in families)

    def _nft_families(self) -> list[int]:
        return [
            family
            for family, name in _NFT_FAMILY.items()
            if any(t.family == name and t.name in IPTABLES_TABLES for t in self.tables)
        ]

    def _release(self, dumps: IptablesDumps | None = None) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and self._cache is not None:
            self._cache.end(turn, self._began, dumps)

    def _start_legacy(self) -> None:
        self._wanted += [self._start(LEGACY, family) for family in self._legacy]

    def _start(self, backend: str, family: int) -> _Wanted:
        wanted = _Wanted(backend=backend, family=family)
        if backend == NFT and not self._fresh and self._cache and self.generation is not None:
            wanted.result = self._cache.get(self._cookie, family, self.generation)
            if wanted.result is not None:
                return wanted
        names = self._programs.save(backend, family)
        program = find_program(*names)
        if program is not None:
            argv: tuple[str, ...] = (program, "-c")
        elif backend == LEGACY and self._programs.python_iptables:
            argv = (sys.executable, "-I", "-m", "gketrace_agent.kernel.iptc_reader", str(family))
        else:
            wanted.result = Unavailable(
                reason=f"{backend} holds IPv{family} rules and none of "
                f"{', '.join(names)} is installed"
            )
            return wanted
        try:
            wanted.child = start(argv, limit=self._programs.limit)
        except GketraceError as error:
            wanted.result = Unavailable(reason=str(error))
        return wanted

    def abandon(self) -> None:
        """Kills what is under way; after `finish` there is nothing."""
        self._release()
        for wanted in self._wanted:
            if wanted.child is not None:
                wanted.child.kill()

    def finish(self) -> IptablesDumps:
        """Waits for the dumps; those of nft again when the rules changed meanwhile."""
        if self._shared is not None:
            return self._shared
        found: IptablesDumps | None = None
        try:
            found = self._finish()
            return found
        finally:
            self._release(found)

    def _finish(self) -> IptablesDumps:
        self._collect(self._wanted)
        consistent = True
        for attempt in range(_ATTEMPTS):
            redo = [w for w in self._wanted if w.backend == NFT]
            if not redo or (now := nft_generation(self._reader.netfilter)) == self.generation:
                break
            if attempt == _ATTEMPTS - 1:
                consistent = False
                break
            self.generation = now
            again = [self._start(NFT, w.family) for w in redo]
            self._collect(again)
            self._wanted = [w for w in self._wanted if w.backend != NFT] + again
        if consistent and self._cache:
            for wanted in self._wanted:
                if wanted.backend == NFT and isinstance(wanted.result, IptablesDump):
                    self._cache.put(self._cookie, wanted.result)
        dumps = tuple(w.result for w in self._wanted if w.result is not None)
        return _judge(dumps, consistent)

    def _collect(self, wanted: Sequence[_Wanted]) -> None:
        running = [w for w in wanted if w.child is not None]
        results = collect(
            [w.child for w in running if w.child is not None], timeout=self._programs.timeout
        )
        for one, result in zip(running, results, strict=True):
            one.child = None
            one.result = self._dump(one, result)

    def _dump(self, wanted: _Wanted, result: Completed | GketraceError) -> Maybe[IptablesDump]:
        what = f"{wanted.backend} (IPv{wanted.family})"
        if isinstance(result, GketraceError):
            return Unavailable(reason=f"{what}: {result.message}")
        if not result.ok:
            return Unavailable(reason=f"{what}: {result.failure()}")
        if found := _incompatible(result.stdout):
            table = found[1].decode("utf-8", "backslashreplace")
            return Unavailable(
                reason=f"{what}: table {table} holds nftables rules that iptables cannot show"
            )
        if not result.stdout or result.stdout.isspace():
            said = " ".join(result.stderr.split())[:300]
            return Unavailable(
                reason=f"{what}: tables exist and {result.argv[0]} printed nothing"
                + (f": {said}" if said else "")
            )
        return IptablesDump(
            backend=wanted.backend,
            family=wanted.family,
            text=result.stdout,
            source=" ".join(result.argv),
            seconds=result.seconds,
            taken_at=self._started_at,
            generation=self.generation if wanted.backend == NFT else None,
        )


def _incompatible(text: bytes) -> re.Match[bytes] | None:
    """The line in which iptables-nft-save says that it left a table out."""
    at = text.find(_TABLE)
    while at >= 0:
        found = _INCOMPATIBLE.match(text, at)
        if found and (at == 0 or text[at - 1] == 0x0A):
            return found
        at = text.find(_TABLE, at + 1)
    return None


def _judge(dumps: tuple[Maybe[IptablesDump], ...], consistent: bool) -> IptablesDumps:
    """Which backend Kubernetes uses: hint chains in nft, then in legacy, else nft when it is all
    that is known; without any hint, the one that alone holds rules."""
    read = [dump for dump in dumps if isinstance(dump, IptablesDump)]
    holding = {dump.backend for dump in read if dump.holds_rules}
    hinted = {dump.backend for dump in read if dump.has_hint}
    if hinted:
        primary = NFT if NFT in hinted else LEGACY
    else:
        primary = LEGACY if holding == {LEGACY} else NFT
    return IptablesDumps(
        dumps=dumps, primary=primary, both=len(holding) == 2, consistent=consistent
    )


def start_iptables(
    reader: KernelReader,
    programs: Programs,
    *,
    cache: DumpCache | None = None,
    fresh: bool = False,
) -> IptablesReading:
    """Starts the dumps that this namespace needs.  `fresh`: do not use `cache` (counters matter).

    Call and finish inside the namespace (`run_in_netns`).
    """
    return IptablesReading(reader, programs, cache, fresh=fresh)
