"""Live entries against the rules: would a new connection of the same client, to the same front
door, be translated as this entry is?

An entry decides for its connection, whatever the rules have become since.  So each entry's first
packet is walked once more over its node's rules of now, as if nothing were tracked, and what that
would make is compared with the entry.  The kernel keeps no time for rules; but it consults them
only when a connection begins, so an entry that they would not make is older than they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import GketraceError
from gketrace.packet import PORT_PROTOCOLS, IPAddress, Packet, Protocol, Tuple5
from gketrace.trace import Disposition, Leaf, NetnsKind, Source, Walk

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.session import Session

__all__ = ["Agreement", "Comparison", "compare_entries", "compare_entry"]


class Agreement(str, Enum):
    """What the rules of now would make of an entry's first packet, beside the entry."""

    AGREES = "agrees"
    """The same, or one of several ends that they would draw lots for."""
    DESTINATION = "destination"
    """They would send it elsewhere, or not translate its destination."""
    SOURCE = "source"
    """The same end, but another source address would be seen there: masquerade, or none."""
    REFUSED = "refused"
    """A rule would drop or reject it."""
    UNKNOWN = "unknown"
    """Something that decides is not known or not understood."""
    UNCOMPARED = "not compared"
    """It was not asked: there are too many, or who sends is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One entry beside the rules."""

    agreement: Agreement
    why: str = ""
    """One sentence; empty with AGREES."""

    @property
    def differs(self) -> bool:
        return self.agreement in _DIFFERS

    @property
    def older(self) -> bool | None:
        """True: the entry was made before the rules became what they are.  None: not known; an
        entry that agrees may be older than a change that did not touch it."""
        return True if self.differs else None


_DIFFERS: Final = (Agreement.DESTINATION, Agreement.SOURCE, Agreement.REFUSED)
_RULES: Final = (Source.RULE, Source.POLICY)
_OLDER: Final = "; it began under earlier rules, and keeps to them"


def compare_entry(entry: ConntrackEntry, walk: Walk) -> Comparison:
    """`walk`: of the entry's first packet over its node, without looking at what is tracked."""
    leaves = tuple(walk.leaves())
    made = [(leaf, _made(leaf, entry.orig)) for leaf in leaves]
    unknown = [leaf for leaf in leaves if leaf.outcome.disposition is Disposition.UNKNOWN]
    passing = [reply for leaf, reply in made if reply is not None and not _refused(leaf)]
    same = [reply for reply in passing if _destination(reply) == _destination(entry.reply)]
    if any(reply.dst == entry.reply.dst for reply in same):
        return Comparison(agreement=Agreement.AGREES)
    if unknown:
        why = f"what the rules would do now is not known: {unknown[0].outcome.detail}"
        return Comparison(agreement=Agreement.UNKNOWN, why=why)
    if same:
        seen = _join(reply.dst for reply in same)
        own = same[0].dst == entry.orig.src
        now = f"no longer translate its source {entry.orig.src}"
        if not own:
            now = f"translate its source {entry.orig.src} to {seen}"
        has = "the entry does not"
        if entry.reply.dst != entry.orig.src:
            has = f"the entry has {entry.reply.dst}"
        return Comparison(
            agreement=Agreement.SOURCE, why=f"the rules would now {now}; {has}{_OLDER}"
        )
    if passing:
        to = _join(_text(reply) for reply in passing)
        now = f"send it to {to}"
        if all(_destination(reply) == (entry.orig.dst, entry.orig.dport) for reply in passing):
            now = "not translate its destination"
        return Comparison(agreement=Agreement.DESTINATION, why=f"the rules would now {now}{_OLDER}")
    refused = [leaf for leaf in leaves if _refused(leaf)]
    if refused and len(refused) == len(leaves):
        cited = refused[0].outcome.citation
        rule = f": {cited.text}" if cited is not None else ""
        how = refused[0].outcome.disposition.value
        return Comparison(
            agreement=Agreement.REFUSED,
            why=f"a new connection would be {how} by a rule now{rule}{_OLDER}",
        )
    detail = leaves[0].outcome.detail if leaves else "the walk has no end"
    return Comparison(
        agreement=Agreement.UNKNOWN, why=f"what the rules would do now is not known: {detail}"
    )


def _made(leaf: Leaf, orig: Tuple5) -> Tuple5 | None:
    """The reply tuple of the entry that the node's own namespace would make."""
    for flow in reversed(leaf.flows):  # the last one has all translations
        if flow.netns.kind is NetnsKind.HOST and flow.entry.orig == orig:
            return flow.entry.reply
    return None


def _refused(leaf: Leaf) -> bool:
    """Whether a rule stops it.  What else may stop a packet (a route, a listener that is gone) is
    no matter of the rules."""
    stopped = leaf.outcome.disposition in (Disposition.DROPPED, Disposition.REJECTED)
    cited = leaf.outcome.citation
    return stopped and cited is not None and cited.source in _RULES


def _destination(reply: Tuple5) -> tuple[IPAddress, int | None]:
    """After translation: who answers."""
    return reply.src, reply.sport


def _text(reply: Tuple5) -> str:
    host = f"[{reply.src}]" if reply.src.version == 6 and reply.sport is not None else reply.src
    return str(host) if reply.sport is None else f"{host}:{reply.sport}"


def _join(items: Iterable[object]) -> str:
    texts = list(dict.fromkeys(map(str, items)))
    if len(texts) > 4:
        texts = [*texts[:3], f"{len(texts) - 3} others"]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def compare_entries(
    session: Session, entries: Sequence[tuple[str, ConntrackEntry]], *, at_most: int
) -> list[Comparison]:
    """One comparison for each (node, entry) of nodes' own tables, in their order.

    At most `at_most` walks on each node, those first that differ in more than the client's port;
    the rest is UNCOMPARED.  Never raises for what agents answer.
    """
    from gketrace_cli.podref import pod_ref
    from gketrace_proto.codec import decode, encode
    from gketrace_proto.v1alpha1 import agent_pb2 as pb

    addresses = _addresses(session)
    results: dict[int, Comparison] = {}
    calls = {}
    for node, chosen, left in _choose(entries, at_most):
        for index in left:
            why = f"only {at_most} connections on {node} were held against the rules"
            results[index] = Comparison(agreement=Agreement.UNCOMPARED, why=why)
        pods = session.pods.of_node(node)
        for index in chosen:
            entry = entries[index][1]
            sender = _sender(session, node, entry.orig.src, pods, addresses.get(node, frozenset()))
            if isinstance(sender, str):
                results[index] = Comparison(agreement=Agreement.UNCOMPARED, why=sender)
                continue
            target, arrives = sender
            calls[index] = (
                node,
                "Walk",
                pb.WalkRequest(
                    target=pb.Target(host=True)
                    if target is None
                    else pb.Target(pod=pod_ref(target)),
                    packet=encode(_packet(entry.orig)),
                    pods=[pod_ref(pod) for pod in pods],
                    arrives=arrives,
                    use_conntrack=False,
                ),
            )
    for index, reply in session.fleet.ask(calls).items():
        try:
            if isinstance(reply, GketraceError):
                raise reply
            results[index] = compare_entry(entries[index][1], decode(Walk, reply.walk))
        except GketraceError as error:
            results[index] = Comparison(agreement=Agreement.UNKNOWN, why=error.message)
    return [results[index] for index in range(len(entries))]


def _choose(
    entries: Sequence[tuple[str, ConntrackEntry]], at_most: int
) -> list[tuple[str, list[int], list[int]]]:
    """For each node, the entries to walk and those that are too many."""
    ranked: dict[str, list[tuple[int, int]]] = {}
    alike: dict[object, int] = {}
    for index, (node, entry) in enumerate(entries):
        orig, reply = entry.orig, entry.reply
        key = (node, orig.src, orig.dst, orig.dport, orig.protocol, reply.src, reply.dst)
        alike[key] = alike.get(key, 0) + 1
        ranked.setdefault(node, []).append((alike[key], index))
    chosen = []
    for node, ranks in ranked.items():
        order = [index for _, index in sorted(ranks)]
        chosen.append((node, order[:at_most], order[at_most:]))
    return chosen


def _addresses(session: Session) -> Mapping[str, frozenset[str]]:
    """Each node's own."""
    return {
        node.name: frozenset(
            (
                *node.internal_ips,
                *node.external_ips,
                *(str(seen.address) for seen in session.fleet.addresses(node.name)),
            )
        )
        for node in session.nodes
    }


def _sender(
    session: Session, node: str, source: IPAddress, pods: Sequence[Pod], own: frozenset[str]
) -> tuple[Pod | None, bool] | str:
    """(the pod of this node that sends, whether the packet comes from another machine), or why
    neither is known."""
    text = str(source)
    if text in own or source.is_loopback:
        return None, False
    for pod in pods:
        if not pod.host_network and text in pod.pod_ips:
            return pod, False
    here = next((one for one in session.nodes if one.name == node), None)
    ranges = () if here is None else here.pod_cidrs
    if any(ip_address(text) in ip_network(cidr, strict=False) for cidr in ranges):
        return f"its client {text} is no pod of {node} that is known"
    return None, True


def _packet(orig: Tuple5) -> Packet:
    ports = orig.protocol in PORT_PROTOCOLS
    icmp = orig.protocol in (Protocol.ICMP, Protocol.ICMPV6)
    return Packet(
        src=orig.src,
        dst=orig.dst,
        protocol=orig.protocol,
        sport=orig.sport if ports else None,
        dport=orig.dport if ports else None,
        icmp_type=orig.icmp_type,
        icmp_code=orig.icmp_code,
        icmp_id=orig.sport if icmp else None,
    )
