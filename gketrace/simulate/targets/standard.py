"""ACCEPT, DROP, QUEUE, RETURN, jumps, and REJECT.

Source: ipt_do_table() in net/ipv4/netfilter/ip_tables.c, reject_tg() in ipt_REJECT.c,
reject_tg6() in ip6t_REJECT.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.ruleset.model import Target
from gketrace.ruleset.options import Option
from gketrace.simulate.matches.base import by_name
from gketrace.simulate.state import Environment, PacketState, VerdictKind
from gketrace.simulate.targets.base import Effect
from gketrace.trace import StepAction

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Jump", "RejectTarget", "Verdict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Target):
    """``-j ACCEPT``, ``DROP``, ``QUEUE`` or ``RETURN``."""

    name: ClassVar[str] = ""
    NAMES: ClassVar[frozenset[str]] = frozenset({"ACCEPT", "DROP", "QUEUE", "RETURN"})

    verdict: str

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        raise ValueError("made by the reader only")

    def apply(self, state: PacketState, env: Environment) -> Effect:
        if self.verdict == "ACCEPT":
            return Effect(action=StepAction.ACCEPT, state=state, verdict=VerdictKind.ACCEPT)
        if self.verdict == "DROP":
            return Effect(action=StepAction.DROP, state=state, verdict=VerdictKind.DROP)
        if self.verdict == "RETURN":
            return Effect(action=StepAction.RETURN, state=state, returns=True)
        return Effect(
            action=StepAction.UNKNOWN,
            state=state,
            verdict=VerdictKind.QUEUE,
            note="handed to user space; what that decides is not known",
        )

    def render(self) -> str:
        return f"-j {self.verdict}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Jump(Target):
    """``-j CHAIN`` or ``-g CHAIN``."""

    name: ClassVar[str] = ""

    chain: str
    goto: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        raise ValueError("made by the reader only")

    def apply(self, state: PacketState, env: Environment) -> Effect:
        action = StepAction.GOTO if self.goto else StepAction.JUMP
        return Effect(action=action, state=state, jump=self.chain, goto=self.goto)

    def render(self) -> str:
        return f"{'-g' if self.goto else '-j'} {self.chain}"


_REJECT: Final[Mapping[int, Mapping[str, str]]] = {
    4: {
        "net-unreach": "icmp-net-unreachable",
        "host-unreach": "icmp-host-unreachable",
        "proto-unreach": "icmp-proto-unreachable",
        "port-unreach": "icmp-port-unreachable",
        "net-prohib": "icmp-net-prohibited",
        "host-prohib": "icmp-host-prohibited",
        "tcp-rst": "tcp-reset",
        "admin-prohib": "icmp-admin-prohibited",
    },
    6: {
        "no-route": "icmp6-no-route",
        "adm-prohibited": "icmp6-adm-prohibited",
        "addr-unreach": "icmp6-addr-unreachable",
        "port-unreach": "icmp6-port-unreachable",
        "tcp-rst": "tcp-reset",
        "policy-fail": "icmp6-policy-fail",
        "reject-route": "icmp6-reject-route",
    },
}
"""Short name → the name that iptables-save prints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectTarget(Target):
    """``-j REJECT --reject-with TYPE``."""

    name: ClassVar[str] = "REJECT"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--reject-with": 1}

    reject_with: str

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        known = _REJECT[family]
        option = by_name(options).get("--reject-with")
        text = "port-unreach" if option is None else option.value
        full = known.get(text, text)
        if full not in known.values():
            raise ValueError(f"no such answer: {text}")
        return cls(reject_with=full)

    def apply(self, state: PacketState, env: Environment) -> Effect:
        return Effect(
            action=StepAction.REJECT,
            state=state,
            verdict=VerdictKind.REJECT,
            reject_with=self.reject_with,
        )

    def render(self) -> str:
        return f"-j REJECT --reject-with {self.reject_with}"
