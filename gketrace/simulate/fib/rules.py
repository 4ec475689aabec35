"""Routing policy rules: fib_rules_lookup (net/core/fib_rules.c), three-valued.

The same walk serves both families; they differ in how DSCP and a missing source are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gketrace.simulate.fib.table import Hit, table_name
from gketrace.simulate.fib.view import NetView
from gketrace.simulate.state import Ternary
from gketrace.snapshot import PolicyAction, PolicyRule
from gketrace.trace import Citation, Source

__all__ = ["Flow", "RuleOutcome", "RuleTable", "rule_citation", "render_rule"]

_ACTION_ERROR = {
    PolicyAction.UNREACHABLE: "ENETUNREACH",
    PolicyAction.PROHIBIT: "EACCES",
    PolicyAction.BLACKHOLE: "EINVAL",
}

_METADATA_TUNNELS = frozenset({"vxlan", "geneve", "gre", "gretap", "ip6gre", "ip6gretap", "ipip"})


@dataclass(slots=True)
class Flow:
    """The key of a look-up (struct flowi4, flowi6).  None: not known."""

    family: int
    dst: int
    src: int = 0
    """0: no source yet (or the unspecified address)."""
    iif: str = "lo"
    oif: str = ""
    mark: int = 0
    tos: int = 0
    protocol: int | None = 0
    sport: int | None = 0
    dport: int | None = 0
    uid: int | None = 0
    scope: int = 0
    any_source: bool = False
    """FLOWI_FLAG_ANYSRC: the source need not be an address of this namespace."""


@dataclass(slots=True)
class RuleOutcome:
    """One way through the rules; more than one only where a rule's match is not known."""

    hit: Hit | None
    """None: no rule led to a route."""
    rule: PolicyRule | None
    assumptions: tuple[str, ...] = ()


class RuleTable:
    """The policy rules of one family, in the order in which the kernel asks them."""

    def __init__(self, view: NetView, family: int) -> None:
        self._view = view
        self._family = family
        self.rules = view.policy_rules(family)
        self._position: dict[int, int] = {}
        for i, rule in enumerate(self.rules):
            self._position.setdefault(rule.priority, i)
        self.dissects = any(
            rule.iif != "lo"
            and (rule.ip_protocol or rule.sport is not None or rule.dport is not None)
            for rule in self.rules
        )
        """fib_rule_requires_fldissect: whether ports of received packets are looked at at all."""

    def plain(self) -> bool:
        """True when just the rules that every namespace starts with are there."""
        expected = [(0, 255), (32766, 254), (32767, 253)][: 3 if self._family == 4 else 2]
        return [(rule.priority, rule.table) for rule in self.rules] == expected and all(
            rule.action is PolicyAction.TABLE and not self._selects(rule) for rule in self.rules
        )

    @staticmethod
    def _selects(rule: PolicyRule) -> bool:
        return bool(
            rule.src
            or rule.dst
            or rule.iif
            or rule.oif
            or rule.fwmark is not None
            or rule.tos
            or rule.ip_protocol
            or rule.sport
            or rule.dport
            or rule.uid_range
            or rule.invert
            or rule.l3mdev
            or rule.tun_id
            or (rule.suppress_prefixlength is not None and rule.suppress_prefixlength >= 0)
            or rule.suppress_ifgroup is not None
        )

    def resolve(
        self,
        flow: Flow,
        look_up: Callable[[int], Hit | None],
        kept: Callable[[PolicyRule, Hit], Hit | None],
    ) -> list[RuleOutcome]:
        """Asks the rules in turn; `look_up(table)` gives None for "go on" (EAGAIN).

        `kept(rule, hit)` is what the rule's suppressors leave of a hit: the hit, fewer siblings of
        a multipath route, or None.
        """
        outcomes: list[RuleOutcome] = []
        # Explicit stack: each unknown rule forks the walk, the branch where it matches first.
        pending: list[tuple[int, bool, tuple[str, ...]]] = [(0, False, ())]
        while pending:
            position, forced, assumptions = pending.pop()
            outcomes.append(self._run(position, forced, assumptions, flow, look_up, kept, pending))
        return outcomes

    def _run(
        self,
        position: int,
        forced: bool,
        assumptions: tuple[str, ...],
        flow: Flow,
        look_up: Callable[[int], Hit | None],
        kept: Callable[[PolicyRule, Hit], Hit | None],
        pending: list[tuple[int, bool, tuple[str, ...]]],
    ) -> RuleOutcome:
        while position < len(self.rules):
            rule = self.rules[position]
            if not forced:
                matched = self.match(rule, flow)
                if matched is Ternary.UNKNOWN:
                    text = rule.text or render_rule(rule)
                    pending.append(
                        (position + 1, False, (*assumptions, f"if the rule does not match: {text}"))
                    )
                    assumptions = (*assumptions, f"if the rule matches: {text}")
                elif matched is Ternary.NO:
                    position += 1
                    continue
            forced = False
            if rule.action is PolicyAction.GOTO:
                target = self._position.get(rule.goto) if rule.goto is not None else None
                position = position + 1 if target is None else target
                continue
            if rule.action is PolicyAction.NOP:
                position += 1
                continue
            error = _ACTION_ERROR.get(rule.action)
            if error is not None:
                hit = Hit(route=None, hop=None, error=error)
                return RuleOutcome(hit=hit, rule=rule, assumptions=assumptions)
            found = look_up(rule.table)
            left = found if found is None or found.error else kept(rule, found)
            if left is None:
                position += 1
                continue
            if left is not found:
                text = f"the hash takes a next hop that is suppressed: {rule.text}"
                pending.append((position + 1, False, (*assumptions, f"if {text}")))
                assumptions = (*assumptions, f"unless {text}")
            return RuleOutcome(hit=left, rule=rule, assumptions=assumptions)
        return RuleOutcome(hit=None, rule=None, assumptions=assumptions)

    def match(self, rule: PolicyRule, flow: Flow) -> Ternary:
        """fib_rule_match with fib4_rule_match or fib6_rule_match; UNKNOWN where needed."""
        answer = self._match(rule, flow)
        if not rule.invert or answer is Ternary.UNKNOWN:
            return answer
        return Ternary.NO if answer is Ternary.YES else Ternary.YES

    def _match(self, rule: PolicyRule, flow: Flow) -> Ternary:
        if rule.iif and rule.iif != flow.iif:
            return Ternary.NO
        if rule.oif and rule.oif != flow.oif:
            return Ternary.NO
        if rule.fwmark is not None and (rule.fwmark ^ flow.mark) & rule.fwmask:
            return Ternary.NO
        bits = 32 if flow.family == 4 else 128
        if rule.src is not None and rule.src.prefixlen:
            if flow.family == 6 and not flow.src:
                return Ternary.NO
            if (flow.src ^ int(rule.src.network_address)) >> (bits - rule.src.prefixlen):
                return Ternary.NO
        if rule.dst is not None and (flow.dst ^ int(rule.dst.network_address)) >> (
            bits - rule.dst.prefixlen
        ):
            return Ternary.NO
        # IPv4 compares the legacy TOS bits only (IPTOS_RT_MASK), IPv6 the whole DSCP.
        if rule.tos and rule.tos != flow.tos & (0x1C if flow.family == 4 else 0xFC):
            return Ternary.NO
        unknown = False
        for wanted, value in (
            ((rule.ip_protocol, rule.ip_protocol) if rule.ip_protocol else None, flow.protocol),
            (rule.sport, flow.sport),
            (rule.dport, flow.dport),
            (rule.uid_range, flow.uid),
        ):
            if wanted is None:
                continue
            if value is None:
                unknown = True
            elif not wanted[0] <= value <= wanted[1]:
                return Ternary.NO
        if rule.l3mdev:
            if not self._view.has_vrf:
                return Ternary.NO
            unknown = True
        if rule.tun_id:
            link = self._view.link_by_name.get(flow.iif)
            if link is None or link.kind not in _METADATA_TUNNELS:
                return Ternary.NO
            unknown = True
        return Ternary.UNKNOWN if unknown else Ternary.YES


def rule_citation(rule: PolicyRule) -> Citation:
    return Citation(
        source=Source.POLICY_RULE,
        text=rule.text or render_rule(rule),
        table=table_name(rule.table) if rule.action is PolicyAction.TABLE else "",
        position=rule.priority,
    )


def render_rule(rule: PolicyRule) -> str:
    """A rule roughly as ``ip rule`` prints it, for rules that came without their text."""
    words = [f"{rule.priority}:"]
    if rule.invert:
        words.append("not")
    words += ["from", str(rule.src) if rule.src else "all"]
    if rule.dst:
        words += ["to", str(rule.dst)]
    if rule.tos:
        words += ["tos", hex(rule.tos)]
    if rule.fwmark is not None:
        mask = "" if rule.fwmask == 0xFFFFFFFF else f"/{rule.fwmask:#x}"
        words += ["fwmark", f"{rule.fwmark:#x}{mask}"]
    for word, name in (("iif", rule.iif), ("oif", rule.oif)):
        if name:
            words += [word, name]
    if rule.uid_range:
        words += ["uidrange", f"{rule.uid_range[0]}-{rule.uid_range[1]}"]
    if rule.ip_protocol:
        words += ["ipproto", str(rule.ip_protocol)]
    for word, ports in (("sport", rule.sport), ("dport", rule.dport)):
        if ports:
            words += [word, str(ports[0]) if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"]
    if rule.action is PolicyAction.TABLE:
        words += ["lookup", table_name(rule.table)]
    elif rule.action is PolicyAction.GOTO:
        words += ["goto", str(rule.goto)]
    else:
        words.append(rule.action.value)
    if rule.suppress_prefixlength is not None and rule.suppress_prefixlength >= 0:
        words += ["suppress_prefixlength", str(rule.suppress_prefixlength)]
    if rule.suppress_ifgroup is not None:
        words += ["suppress_ifgroup", str(rule.suppress_ifgroup)]
    return " ".join(words)
