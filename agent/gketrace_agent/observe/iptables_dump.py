"""What a reading of iptables rules gives: one text for each backend and family.

Source: hint chains: kubernetes-sigs/iptables-wrappers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from gketrace.errors import ParseError
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.iptables_save import IptablesSaveReader
from gketrace.snapshot import Maybe, Unavailable
from gketrace_agent.kernel.nfnetlink import NftTable

__all__ = [
    "IPTABLES_TABLES",
    "LEGACY",
    "NFT",
    "IptablesDump",
    "IptablesDumps",
    "Programs",
    "is_iptables",
    "judge_dumps",
]

LEGACY: Final = "iptables-legacy"
NFT: Final = "iptables-nft"
IPTABLES_TABLES: Final = frozenset({"filter", "nat", "mangle", "raw", "security"})
_OWNED: Final = frozenset({"ip", "ip6"})
_HINTS: Final = (b"KUBE-IPTABLES-HINT", b"KUBE-KUBELET-CANARY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Which programs read rules, as names to search or paths, and their bounds."""

    legacy: tuple[str, ...] = ("iptables-legacy-save",)
    legacy6: tuple[str, ...] = ("ip6tables-legacy-save",)
    nft_backend: tuple[str, ...] = ("iptables-nft-save",)
    nft_backend6: tuple[str, ...] = ("ip6tables-nft-save",)
    nft: tuple[str, ...] = ("nft",)
    ipset: tuple[str, ...] = ("ipset",)
    netlink: bool = True
    """Read iptables-nft's rules by netlink where they are known; False: by its save command."""
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

    reader: IptablesSaveReader | None = field(default=None, repr=False)
    """What has read `text` while it was printed."""

    _ruleset: Maybe[IptablesRuleset] | None = field(default=None, init=False, repr=False)

    def ruleset(self) -> Maybe[IptablesRuleset]:
        """Parsed once; a cached dump keeps it."""
        if self._ruleset is None:
            reader, self.reader = self.reader, None
            if reader is None:
                reader = IptablesSaveReader(backend=self.backend, family=self.family)
                reader.feed(self.text)
            try:
                self._ruleset = reader.finish(self.text, source=self.source, taken_at=self.taken_at)
            except ParseError as error:
                self._ruleset = Unavailable(reason=str(error))
        return self._ruleset

    @property
    def holds_rules(self) -> bool:
        """It has a rule, or a policy that is not ACCEPT."""
        rules = self.ruleset()
        # What is not understood holds something.
        return isinstance(rules, Unavailable) or rules.holds_rules

    @property
    def has_hint(self) -> bool:
        """kubelet's chains that say: this backend is the one in use."""
        rules = self.ruleset()
        if isinstance(rules, Unavailable):
            return any(b"\n:" + hint + b" " in self.text for hint in _HINTS)
        return any(rules.declares(hint) for hint in _HINTS)


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


def is_iptables(table: NftTable) -> bool:
    """Whether it is one of iptables-nft's."""
    return table.family in _OWNED and table.name in IPTABLES_TABLES


def judge_dumps(dumps: tuple[Maybe[IptablesDump], ...], consistent: bool) -> IptablesDumps:
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
