"""iptables rules of both backends and both families, as the save commands print them.

Which commands run is decided before any of them does:

- legacy: only when ip_tables_names lists a table.  iptables-legacy-save on a table that is not
  there would create it, and its hooks with it.
- nft: only when nf_tables has a table that iptables-nft uses.  A kernel without nf_tables has no
  such backend: that is no error.  Its rules are read by netlink and printed as its save command
  does; that command runs for the tables that hold something not known here.

The commands start side by side in the namespace's thread; the caller reads other things meanwhile
and collects them at the end.  A command that fails is an `Unavailable` with what it wrote to
stderr, never "no rules".

Source: kernel net/ipv4/netfilter/ip_tables.c, net/netfilter/x_tables.c (xt_table_seq_show);
iptables iptables/iptables-save.c, nft-shared.c.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gketrace.errors import ExhaustedError, GketraceError
from gketrace.ruleset.iptables_save import IptablesSaveReader
from gketrace.ruleset.line_breaks import unbroken
from gketrace.snapshot import Maybe, Unavailable
from gketrace_agent.kernel.nfnetlink import NftTable, nft_generation, nft_tables
from gketrace_agent.kernel.nft_rules import NftText
from gketrace_agent.kernel.process import Child, Completed, collect, find_program, start
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.observe.iptables_cache import DumpCache, Turn
from gketrace_agent.observe.iptables_dump import (
    IPTABLES_TABLES,
    LEGACY,
    NFT,
    IptablesDump,
    IptablesDumps,
    Programs,
    is_iptables,
    judge_dumps,
)
from gketrace_agent.observe.iptables_nft import (
    begin_nft,
    child_text,
    incompatible_table,
    merged_text,
    nothing_read,
    reasons,
    save_arguments,
)

if TYPE_CHECKING:
    from gketrace_agent.observe.nftables import NftablesDump

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

_NAMES: Final = {4: "ip_tables_names", 6: "ip6_tables_names"}
_NFT_FAMILY: Final = {4: "ip", 6: "ip6"}
_BY_NETLINK: Final = {
    4: "nf_tables by netlink, as iptables-nft-save -c",
    6: "nf_tables by netlink, as ip6tables-nft-save -c",
}
_ATTEMPTS: Final = 3


@dataclass(slots=True)
class _Wanted:
    """A dump to make: under way, done already, or impossible."""

    backend: str
    family: int
    child: Child | None = None
    by_netlink: bool = False
    """`child` reads by netlink; else it is a save command."""
    began: float = 0.0
    """time.monotonic()."""
    read: NftText | None = None
    """What netlink gave."""
    reader: IptablesSaveReader | None = None
    """Reads what the save command prints, meanwhile."""
    result: Maybe[IptablesDump] | None = None


class IptablesReading:
    """Dumps under way.  `finish` inside the same namespace, and `release`; `abandon` if that is not
    to come."""

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
        self.shared: tuple[IptablesDumps, NftablesDump | None] | None = None
        """What another reading found that began after this one was asked for."""
        self._wanted: list[_Wanted] = []
        try:
            self.shared = self._wait_for_others()
            self._began, self._started_at = time.monotonic(), time.time()
            if self.shared is not None:
                return
            self._start_legacy()
            for family in self._nft_families():
                self._wanted.append(self._start(NFT, family))
        except BaseException:
            self.abandon()
            raise

    def _wait_for_others(self) -> tuple[IptablesDumps, NftablesDump | None] | None:
        """Takes the turn to read, unless all is in the cache.  The result, if another reading has
        it.

        Raises `ExhaustedError` after the time that a dump may take: to read beside the others would
        take as much memory once more.
        """
        if self._cache is None or self._cookie is None or self._is_cheap():
            return None
        asked = time.monotonic()
        self._turn, waited = self._cache.wait(self._cookie, self._programs.timeout)
        if self._turn is None:
            raise ExhaustedError(
                f"other calls have been reading the same rules for {self._programs.timeout:g} s",
                hint="try again",
            )
        if not waited:
            return None
        self._look()
        shared = self._turn.found if self._turn.began >= asked else None
        if shared is not None or self._is_cheap():
            self.release()
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
        others = not all(map(is_iptables, self.tables))
        return not self._legacy and not others and not self._fresh and self._cached()

    def _cached(self) -> bool:
        """True when no nft dump has to be made."""
        families = self._nft_families()
        if not families or self._cache is None or self.generation is None:
            return not families
        generation, cache = self.generation, self._cache
        return all(cache.get(self._cookie, f, generation) is not None for f in families)

    def _nft_families(self) -> list[int]:
        return [family for family in _NFT_FAMILY if self._nft_tables(family)]

    def _nft_tables(self, family: int) -> frozenset[str]:
        name = _NFT_FAMILY[family]
        return IPTABLES_TABLES & {t.name for t in self.tables if t.family == name}

    def release(self, found: tuple[IptablesDumps, NftablesDump | None] | None = None) -> None:
        """Gives the turn to the next; `found` is for all who wait for it."""
        turn, self._turn = self._turn, None
        if turn is not None and self._cache is not None:
            self._cache.end(turn, self._began, found)

    def _start_legacy(self) -> None:
        self._wanted += [self._start(LEGACY, family) for family in self._legacy]

    def _start(self, backend: str, family: int) -> _Wanted:
        wanted = _Wanted(backend=backend, family=family)
        if backend == NFT and not self._fresh and self._cache and self.generation is not None:
            wanted.result = self._cache.get(self._cookie, family, self.generation)
            if wanted.result is not None:
                return wanted
        wanted.began = time.monotonic()
        if backend == NFT and self._programs.netlink:
            self._start_netlink(wanted)
        else:
            self._start_program(wanted, ("-c",))
        return wanted

    def _start_netlink(self, wanted: _Wanted) -> None:
        tables = self._nft_tables(wanted.family)
        try:
            begun = begin_nft(self._reader, wanted.family, tables, limit=self._programs.limit)
        except GketraceError as error:
            begun = nothing_read(tables, error.message)
        except ValueError as error:  # an answer with broken attributes
            begun = nothing_read(tables, str(error))
        if isinstance(begun, NftText):
            wanted.read = begun
        else:
            wanted.child, wanted.by_netlink = begun, True

    def _start_program(self, wanted: _Wanted, arguments: tuple[str, ...]) -> None:
        backend, family = wanted.backend, wanted.family
        names = self._programs.save(backend, family)
        program = find_program(*names)
        if program is not None:
            argv: tuple[str, ...] = (program, *arguments)
        elif backend == LEGACY and self._programs.python_iptables:
            argv = (sys.executable, "-I", "-m", "gketrace_agent.kernel.iptc_reader", str(family))
        else:
            why = f" ({reasons(wanted.read)})" if wanted.read else ""
            wanted.result = Unavailable(
                reason=f"{backend} holds IPv{family} rules and none of "
                f"{', '.join(names)} is installed{why}"
            )
            return
        reader = IptablesSaveReader(backend=backend, family=family) if wanted.read is None else None
        try:
            wanted.child = start(
                argv, limit=self._programs.limit, read=reader.feed if reader is not None else None
            )
            wanted.by_netlink, wanted.reader = False, reader
        except GketraceError as error:
            wanted.result = Unavailable(reason=str(error))

    def abandon(self) -> None:
        """Kills what is under way; after `finish` there is nothing."""
        self.release()
        for wanted in self._wanted:
            if wanted.child is not None:
                wanted.child.kill()

    def finish(self) -> IptablesDumps:
        """Waits for the dumps; those of nft again when the rules changed meanwhile.

        The turn is still to be given back: `release`.
        """
        if self.shared is not None:
            return self.shared[0]
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
        return judge_dumps(dumps, consistent)

    def _collect(self, wanted: Sequence[_Wanted]) -> None:
        deadline = time.monotonic() + self._programs.timeout
        self._wait(wanted, deadline)
        for one in wanted:
            if one.result is not None or one.read is None:
                continue
            if one.read.left:
                self._start_program(one, save_arguments(one.read))
            else:
                one.result = self._netlink_dump(one, one.read.text, _BY_NETLINK[one.family])
        self._wait(wanted, deadline)

    def _wait(self, wanted: Sequence[_Wanted], deadline: float) -> None:
        """Until the children that run have ended."""
        running = [w for w in wanted if w.child is not None]
        results = collect(
            [w.child for w in running if w.child is not None],
            timeout=max(0.0, deadline - time.monotonic()),
        )
        for one, result in zip(running, results, strict=True):
            one.child = None
            if one.by_netlink:
                one.read = child_text(result, self._nft_tables(one.family))
            else:
                one.result = self._dump(one, result)

    def _dump(self, wanted: _Wanted, result: Completed | GketraceError) -> Maybe[IptablesDump]:
        """What a save command printed, with what netlink gave of the other tables."""
        what = f"{wanted.backend} (IPv{wanted.family})"
        why = f"; by netlink: {reasons(wanted.read)}" if wanted.read else ""
        if isinstance(result, GketraceError):
            return Unavailable(reason=f"{what}: {result.message}{why}")
        if not result.ok:
            return Unavailable(reason=f"{what}: {result.failure()}{why}")
        if table := incompatible_table(result.stdout):
            return Unavailable(
                reason=f"{what}: table {table} holds nftables rules that iptables cannot show"
            )
        if not result.stdout or result.stdout.isspace():
            said = " ".join(result.stderr.split())[:300]
            return Unavailable(
                reason=f"{what}: tables exist and {result.argv[0]} printed nothing"
                + (f": {said}" if said else "")
            )
        source = " ".join(result.argv)
        printed = unbroken(result.stdout)
        if wanted.read is not None:
            text = merged_text(wanted.read, printed)
            if not isinstance(text, bytes):
                return Unavailable(reason=f"{what}: {source} printed no table {text.table}{why}")
            source = f"{_BY_NETLINK[wanted.family]}, and {source} for {reasons(wanted.read)}"
            return self._netlink_dump(wanted, text, source)
        return IptablesDump(
            backend=wanted.backend,
            family=wanted.family,
            text=printed,
            source=source,
            seconds=result.seconds,
            taken_at=self._started_at,
            generation=self.generation if wanted.backend == NFT else None,
            reader=wanted.reader if printed is result.stdout else None,
        )

    def _netlink_dump(self, wanted: _Wanted, text: bytes, source: str) -> Maybe[IptablesDump]:
        if len(text) > self._programs.limit:
            what = f"{wanted.backend} (IPv{wanted.family})"
            return Unavailable(reason=f"{what}: more than {self._programs.limit} bytes")
        return IptablesDump(
            backend=NFT,
            family=wanted.family,
            text=text,
            source=source,
            seconds=time.monotonic() - wanted.began,
            taken_at=self._started_at,
            generation=self.generation,
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
