"""An entry beside what the rules of now would make of its first packet."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from ipaddress import ip_address

import pytest

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import Packet, Tuple5
from gketrace.trace import (
    Branch,
    Citation,
    Disposition,
    Flow,
    Ingress,
    NetnsKind,
    NetnsRef,
    Outcome,
    Source,
    Walk,
)
from gketrace_cli.agreement import Agreement, compare_entry
from gketrace_cli.render.connections import duration_text

HOST = NetnsRef(node="a", kind=NetnsKind.HOST)
RULE = Citation(source=Source.RULE, text="-A KUBE-FIREWALL -j DROP")


def tuple5(src: str, sport: int, dst: str, dport: int) -> Tuple5:
    return Tuple5(src=ip_address(src), dst=ip_address(dst), protocol=6, sport=sport, dport=dport)


ORIG = tuple5("10.1.0.9", 4000, "10.43.0.1", 80)
TO_A = tuple5("10.40.0.1", 8080, "10.1.0.9", 4000)
TO_B = tuple5("10.40.0.2", 8080, "10.1.0.9", 4000)
MASQUERADED = tuple5("10.40.0.1", 8080, "10.142.0.8", 1025)
PLAIN = ORIG.inverted()


def walk(*ends: tuple[Tuple5 | None, Disposition]) -> Walk:
    """One that forks into these ends: the reply tuple that each makes, and its disposition."""
    packet = Packet(src=ORIG.src, dst=ORIG.dst, protocol=6, sport=ORIG.sport, dport=ORIG.dport)
    root = Branch(parent=None, ingress=Ingress(netns=HOST), enters=True)
    leaves = []
    for reply, disposition in ends:
        first = Flow(netns=HOST, entry=ConntrackEntry(orig=ORIG, reply=PLAIN))
        last = () if reply is None else (replace(first, entry=replace(first.entry, reply=reply)),)
        leaves.append(
            Branch(
                parent=0,
                ingress=Ingress(netns=HOST),
                enters=False,
                chance=Fraction(1, len(ends)),
                flows=(first, *last),
                outcome=Outcome(
                    disposition=disposition,
                    packet=packet,
                    netns=HOST,
                    detail="nobody knows",
                    citation=RULE if disposition is Disposition.DROPPED else None,
                ),
            )
        )
    return Walk(branches=(root, *leaves))


OUT, DROPPED, UNKNOWN = Disposition.TRANSMITTED, Disposition.DROPPED, Disposition.UNKNOWN


@pytest.mark.parametrize(
    ("reply", "ends", "agreement", "why"),
    [
        (TO_A, [(TO_A, OUT)], Agreement.AGREES, ""),
        (TO_A, [(TO_B, OUT), (TO_A, OUT)], Agreement.AGREES, ""),
        (TO_A, [(TO_A, Disposition.DELIVERED)], Agreement.AGREES, ""),
        (PLAIN, [(None, OUT)], Agreement.AGREES, ""),
        (TO_A, [(TO_B, OUT)], Agreement.DESTINATION, "send it to 10.40.0.2:8080"),
        (TO_A, [(None, OUT)], Agreement.DESTINATION, "not translate its destination"),
        (PLAIN, [(TO_A, OUT)], Agreement.DESTINATION, "send it to 10.40.0.1:8080"),
        (
            TO_A,
            [(MASQUERADED, OUT)],
            Agreement.SOURCE,
            "10.1.0.9 to 10.142.0.8; the entry does not",
        ),
        (MASQUERADED, [(TO_A, OUT)], Agreement.SOURCE, "the entry has 10.142.0.8"),
        # Masquerade takes another port each time.
        (replace(MASQUERADED, dport=9), [(MASQUERADED, OUT)], Agreement.AGREES, ""),
        (TO_A, [(None, DROPPED)], Agreement.REFUSED, "-A KUBE-FIREWALL -j DROP"),
        (TO_A, [(TO_B, OUT), (None, UNKNOWN)], Agreement.UNKNOWN, "nobody knows"),
        (TO_A, [(TO_A, OUT), (None, UNKNOWN)], Agreement.AGREES, ""),
        # No route is no rule.
        (TO_A, [(TO_A, Disposition.UNREACHABLE)], Agreement.AGREES, ""),
    ],
)
def test_what_an_entry_is_beside_the_rules(
    reply: Tuple5,
    ends: list[tuple[Tuple5 | None, Disposition]],
    agreement: Agreement,
    why: str,
) -> None:
    found = compare_entry(ConntrackEntry(orig=ORIG, reply=reply), walk(*ends))
    assert found.agreement is agreement
    assert why in found.why
    assert bool(found.why) == (agreement is not Agreement.AGREES)
    assert found.older is (True if found.differs else None)


def test_durations() -> None:
    texts = {0.4: "0 s", 61: "1 min 1 s", 3600: "1 h 0 min", 90_000: "1 d 1 h", -3: "0 s"}
    assert {seconds: duration_text(seconds) for seconds in texts} == texts
