"""What every backend's rules are: `Ruleset`, `BaseChain`, `Rule`, `Match`, `Target`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.trace import Citation, Hook, Source

if TYPE_CHECKING:
    from typing import Self

    from gketrace.ruleset.options import Option
    from gketrace.simulate.state import Answer, Environment, PacketState
    from gketrace.simulate.targets.base import Effect

__all__ = [
    "IPTABLES_HOOKS",
    "IPTABLES_NFT_SECURITY",
    "BaseChain",
    "ChainType",
    "Match",
    "Rule",
    "Ruleset",
    "Target",
]


class ChainType(Enum):
    """What a base chain may do (struct nft_chain_type)."""

    FILTER = "filter"
    NAT = "nat"
    """Asked only for the first packet of a connection."""
    ROUTE = "route"
    """As FILTER, and on OUTPUT the packet is routed again when it was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseChain:
    """A chain that hangs on a netfilter hook."""

    table: str
    chain: str
    hook: Hook
    priority: int
    """Lower is asked first (enum nf_ip_hook_priorities)."""
    type: ChainType = ChainType.FILTER
    policy: str = "ACCEPT"
    """``ACCEPT`` or ``DROP``."""
    packets: int | None = None
    """The policy's packet counter; None: not printed."""
    bytes: int | None = None


class Ruleset(ABC):
    """One backend's rules of one family in one network namespace, as they were at one moment."""

    __slots__ = ("backend", "family", "source", "taken_at")

    def __init__(self, *, backend: str, family: int, source: str, taken_at: float) -> None:
        self.backend: Final = backend
        """``iptables-legacy``, ``iptables-nft`` or ``nftables``."""
        self.family: Final = family
        """4 or 6; 0 for an nftables rule set, whose tables have families of their own."""
        self.source: Final = source
        """What it was read from: a command or a file name."""
        self.taken_at: Final = taken_at
        """Seconds since the epoch."""

    @abstractmethod
    def base_chains(self, hook: Hook) -> tuple[BaseChain, ...]:
        """The chains on `hook`, lowest priority number first."""

    @abstractmethod
    def needs_conntrack(self, family: int) -> bool:
        """Whether some rule makes the namespace track connections of `family`, 4 or 6.

        The kernel tracks in a namespace only while something there asks for it
        (nf_ct_netns_get).
        """


class Match(ABC):
    """One match of a rule: ``-m NAME options``, or one of the options before any ``-m``.

    Subclasses are frozen dataclasses.  `OPTIONS` lists the options that iptables-save prints and
    their older spellings, each with its number of arguments.
    """

    __slots__ = ()

    module: ClassVar[str]
    """The name after ``-m``."""
    OPTIONS: ClassVar[Mapping[str, int]] = {}

    @classmethod
    @abstractmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        """Raises `ValueError` with a reason; the rule then holds an `UnknownMatch`."""

    @abstractmethod
    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        """What the kernel would say of this packet."""

    @abstractmethod
    def render(self) -> str:
        """As iptables-save prints it, ``-m NAME`` included."""


class Target(ABC):
    """What a rule does with a packet that matches: ``-j NAME options``."""

    __slots__ = ()

    name: ClassVar[str]
    """The name after ``-j``."""
    OPTIONS: ClassVar[Mapping[str, int]] = {}

    @classmethod
    @abstractmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        """Raises `ValueError` with a reason; the rule then holds an `UnknownTarget`."""

    @abstractmethod
    def apply(self, state: PacketState, env: Environment) -> Effect:
        """What becomes of the packet.  The evaluator adds the citation."""

    @abstractmethod
    def render(self) -> str:
        """As iptables-save prints it, ``-j NAME`` included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of a chain."""

    backend: str
    table: str
    chain: str
    position: int
    """1-based, as ``iptables -L --line-numbers`` counts."""
    matches: tuple[Match, ...]
    """In the order in which the kernel asks them; all must match."""
    target: Target | None
    """None: a rule without a target, which only counts."""
    text: str
    """Verbatim, without counters: ``-A CHAIN …``."""
    packets: int | None = None
    bytes: int | None = None

    _citation: Citation | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def citation(self) -> Citation:
        """Made once: ten branches of a walk cite the same rules."""
        made = self._citation
        if made is None:
            made = self._cite()
            object.__setattr__(self, "_citation", made)
        return made

    def _cite(self) -> Citation:
        return Citation(
            source=Source.RULE,
            text=self.text,
            backend=self.backend,
            table=self.table,
            chain=self.chain,
            position=self.position,
            packets=self.packets,
            bytes=self.bytes,
        )


_FILTER, _NAT, _ROUTE = ChainType.FILTER, ChainType.NAT, ChainType.ROUTE

IPTABLES_HOOKS: Final[Mapping[str, tuple[tuple[Hook, int, ChainType], ...]]] = {
    "raw": (
        (Hook.PREROUTING, -300, _FILTER),
        (Hook.OUTPUT, -300, _FILTER),
    ),
    "mangle": (
        (Hook.PREROUTING, -150, _FILTER),
        (Hook.INPUT, -150, _FILTER),
        (Hook.FORWARD, -150, _FILTER),
        (Hook.OUTPUT, -150, _ROUTE),
        (Hook.POSTROUTING, -150, _FILTER),
    ),
    "nat": (
        (Hook.PREROUTING, -100, _NAT),
        (Hook.INPUT, 100, _NAT),
        (Hook.OUTPUT, -100, _NAT),
        (Hook.POSTROUTING, 100, _NAT),
    ),
    "filter": (
        (Hook.INPUT, 0, _FILTER),
        (Hook.FORWARD, 0, _FILTER),
        (Hook.OUTPUT, 0, _FILTER),
    ),
    "security": (
        (Hook.INPUT, 50, _FILTER),
        (Hook.FORWARD, 50, _FILTER),
        (Hook.OUTPUT, 50, _FILTER),
    ),
}
"""Table → its base chains: enum nf_ip_hook_priorities and iptable_*.c.  With
``raw_before_defrag=1`` raw is at -450; nothing else is in between."""

IPTABLES_NFT_SECURITY: Final = 150
"""iptables-nft puts its security table behind nat's source translation, not at 50 as the kernel's
own table (xtables_ipv4 in iptables/nft.c)."""
