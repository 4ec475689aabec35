"""Chains: the smallest rule set inline, the exact list of steps, verdicts and chances."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from gketrace.conntrack import CtState
from gketrace.packet import Packet, parse_address
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.iptables_save import parse_iptables_save
from gketrace.simulate.chains import traverse
from gketrace.simulate.state import Alternative, CtInfo, PacketState, VerdictKind
from gketrace.snapshot import RecentEntry
from gketrace.trace import Hook, Source, StepKind
from tests.core.simulate.environment import FixedEnvironment

PACKET = Packet(
    src=parse_address("10.142.0.2"),
    dst=parse_address("10.43.240.7"),
    protocol=6,
    sport=40000,
    dport=80,
)


def rules(body: str, table: str = "filter", policy: str = "ACCEPT") -> IptablesRuleset:
    """``CHAIN: …`` declarations are made up from the ``-A`` lines and jumps of `body`."""
    lines = [line.strip() for line in body.strip().splitlines() if line.strip()]
    chains = dict.fromkeys(line.split()[1] for line in lines)
    chains.pop("INPUT", None)
    text = "\n".join(
        [
            f"*{table}",
            f":INPUT {policy} [5:500]",
            *(f":{chain} - [0:0]" for chain in chains),
            *lines,
            "COMMIT\n",
        ]
    )
    return parse_iptables_save(text.encode(), source="test")


def run(
    body: str,
    *,
    table: str = "filter",
    policy: str = "ACCEPT",
    packet: Packet = PACKET,
    env: FixedEnvironment | None = None,
    state: PacketState | None = None,
) -> tuple[Alternative, ...]:
    ruleset = rules(body, table, policy)
    (base,) = ruleset.base_chains(Hook.INPUT)
    ct = CtInfo(state=CtState.NEW, orig=packet.tuple5, reply=packet.tuple5.inverted())
    start = state or PacketState(packet=packet, hook=Hook.INPUT, ct=ct, in_iface="eth0")
    found = traverse(ruleset, base, start, env or FixedEnvironment())
    # The second packet finds the first one's path there.
    assert traverse(ruleset, base, start, env or FixedEnvironment()) == found
    return found


def shown(alternative: Alternative) -> list[str]:
    """``ACTION CHAIN POSITION`` of each step."""
    found = []
    for step in alternative.steps:
        assert step.citation is not None
        found.append(f"{step.action.value} {step.citation.chain} {step.citation.position}")
    return found


def only(alternatives: tuple[Alternative, ...]) -> Alternative:
    assert len(alternatives) == 1, [a.because for a in alternatives]
    assert alternatives[0].chance == 1
    assert alternatives[0].because == ""
    return alternatives[0]


def test_an_empty_chain_asks_its_policy() -> None:
    way = only(run("-A A -j DROP", policy="DROP"))
    assert way.verdict.kind is VerdictKind.DROP
    assert shown(way) == ["drop INPUT 0"]
    (step,) = way.steps
    assert (step.kind, step.hook) == (StepKind.POLICY, Hook.INPUT)
    assert step.citation is not None
    assert step.citation == way.verdict.citation
    assert (step.citation.source, step.citation.text) == (Source.POLICY, ":INPUT DROP")
    assert (step.citation.packets, step.citation.bytes) == (5, 500)


def test_rules_that_do_not_match_leave_no_step_and_a_rule_without_target_goes_on() -> None:
    way = only(run("-A INPUT -p udp -j DROP\n-A INPUT -p tcp\n-A INPUT -j ACCEPT"))
    assert shown(way) == ["continue INPUT 2", "accept INPUT 3"]
    citation = way.steps[1].citation
    assert citation is not None
    assert (citation.text, citation.table) == ("-A INPUT -j ACCEPT", "filter")
    assert citation.backend == "iptables-legacy"


def test_jump_comes_back_and_return_too() -> None:
    way = only(
        run(
            """
            -A INPUT -j A
            -A INPUT -j B
            -A INPUT -j DROP
            -A A -p tcp -j RETURN
            -A A -j DROP
            -A B -p udp -j DROP
            """
        )
    )
    assert shown(way) == ["jump INPUT 1", "return A 1", "jump INPUT 2", "drop INPUT 3"]


def test_return_in_the_base_chain_is_its_policy() -> None:
    way = only(run("-A INPUT -j RETURN\n-A INPUT -j ACCEPT", policy="DROP"))
    assert shown(way) == ["return INPUT 1", "drop INPUT 0"]


def test_goto_comes_back_to_the_callers_caller() -> None:
    way = only(
        run(
            """
            -A INPUT -j A
            -A INPUT -j ACCEPT
            -A A -g B
            -A A -j DROP
            -A B -p tcp
            """
        )
    )
    assert shown(way) == ["jump INPUT 1", "goto A 1", "continue B 1", "accept INPUT 2"]


@pytest.mark.parametrize("end", ["-A B -j RETURN", "-A B -p udp -j RETURN"])
def test_goto_from_the_base_chain_ends_in_its_policy(end: str) -> None:
    way = only(run(f"-A INPUT -g B\n-A INPUT -j ACCEPT\n{end}", policy="DROP"))
    assert way.verdict.kind is VerdictKind.DROP
    assert shown(way)[0] == "goto INPUT 1"
    assert shown(way)[-1] == "drop INPUT 0"


def test_a_jump_behind_a_goto_comes_back_into_the_goto_chain() -> None:
    way = only(
        run(
            """
            -A INPUT -j A
            -A INPUT -j DROP
            -A A -g B
            -A B -j C
            -A B -j ACCEPT
            -A C -j RETURN
            """
        )
    )
    assert shown(way) == ["jump INPUT 1", "goto A 1", "jump B 1", "return C 1", "accept B 2"]


def test_marks_are_seen_by_later_rules() -> None:
    way = only(
        run(
            """
            -A INPUT -j MARK --set-xmark 0x4000/0x4000
            -A INPUT -m mark ! --mark 0x4000/0x4000 -j DROP
            -A INPUT -j MARK --set-xmark 0x4000/0x0
            -A INPUT -m mark --mark 0x0 -j ACCEPT
            """,
            table="mangle",
        )
    )
    assert shown(way) == ["mark INPUT 1", "mark INPUT 3", "accept INPUT 4"]
    assert [s.after.mark for s in way.steps] == [0x4000, 0, 0]
    assert way.steps[0].before.mark == 0


THREE = """
    -A INPUT -j SVC
    -A SVC -m statistic --mode random --probability 0.33333333349 -j E1
    -A SVC -m statistic --mode random --probability 0.50000000000 -j E2
    -A SVC -j E3
    -A E1 -p tcp -j DNAT --to-destination 10.40.0.1:8080
    -A E2 -p tcp -j DNAT --to-destination 10.40.0.2:8080
    -A E3 -p tcp -j DNAT --to-destination 10.40.0.3:8080
"""


def test_chained_draws_multiply_exactly_and_sum_to_one() -> None:
    ways = run(THREE, table="nat")
    third = Fraction(715827883, 2**31)
    assert [w.chance for w in ways] == [third, (1 - third) / 2, (1 - third) / 2]
    assert sum(w.chance or 0 for w in ways) == 1
    assert [shown(w)[-1] for w in ways] == ["accept E1 1", "accept E2 1", "accept E3 1"]
    assert [len(w.steps) for w in ways] == [3, 3, 3]
    nat = ways[1].verdict.nat
    assert nat is not None
    assert nat.addresses == (parse_address("10.40.0.2"),) * 2
    assert nat.ports == (8080, 8080)
    assert nat.citation == ways[1].verdict.citation
    assert ways[1].state.packet.dst == PACKET.dst
    assert ways[0].because == "statistic 0.33333333349 in SVC rule 1"
    assert ways[2].because == "2 draws lost"


def test_a_thousand_endpoints_are_a_thousand_ways() -> None:
    count = 1000
    lines = ["-A INPUT -j SVC"]
    for i in range(count - 1):
        chance = 1 / (count - i)
        lines.append(f"-A SVC -m statistic --mode random --probability {chance:.11f} -j E{i}")
    lines.append(f"-A SVC -j E{count - 1}")
    lines += [f"-A E{i} -j DNAT --to-destination 10.40.0.1:{i}" for i in range(count)]
    ways = run("\n".join(lines), table="nat")
    assert len(ways) == count
    assert sum(w.chance or 0 for w in ways) == 1


def test_jumps_may_be_deep() -> None:
    depth = 1000
    lines = ["-A INPUT -j C0", "-A INPUT -j DROP"]
    lines += [f"-A C{i} -j C{i + 1}" for i in range(depth)] + [f"-A C{depth} -j RETURN"]
    way = only(run("\n".join(lines)))
    assert len(way.steps) == depth + 3
    assert shown(way)[-1] == "drop INPUT 2"


def test_draws_that_do_not_decide_are_ways_of_their_own() -> None:
    ways = run("-A INPUT -m statistic --mode random --probability 0.25 -j LOG\n-A INPUT -j ACCEPT")
    assert [(w.chance, shown(w)) for w in ways] == [
        (Fraction(1, 4), ["continue INPUT 1", "accept INPUT 2"]),
        (Fraction(3, 4), ["accept INPUT 2"]),
    ]


def test_many_draws_that_change_nothing_do_not_explode() -> None:
    body = "\n".join(
        "-A INPUT -m statistic --mode random --probability 0.5 -j LOG" for _ in range(40)
    )
    ways = run(body)
    assert len(ways) <= 128
    assert sum(w.chance or 0 for w in ways) == 1


def test_a_draw_that_other_matches_deny_is_no_draw() -> None:
    body = "-A INPUT -m statistic --mode random --probability 0.5 -m mark --mark 0x1 -j DROP"
    assert shown(only(run(body))) == ["accept INPUT 0"]
    unknown = "-A INPUT -m limit --limit 1/sec -m mark --mark 0x1 -j DROP"
    assert shown(only(run(unknown))) == ["accept INPUT 0"]


def test_certain_draws_do_not_fork() -> None:
    always = "-A INPUT -m statistic --mode random --probability 1.0 -j DROP"
    assert shown(only(run(always))) == ["drop INPUT 1"]
    never = "-A INPUT -m statistic --mode random --probability 0.0000000001 -j DROP"
    assert shown(only(run(never))) == ["accept INPUT 0"]


def test_an_unknown_match_forks_and_quotes_the_rule() -> None:
    ways = run("-A INPUT -m frob --nicate 1 -j DROP\n-A INPUT -j ACCEPT")
    assert [w.chance for w in ways] == [None, None]
    assert [w.verdict.kind for w in ways] == [VerdictKind.DROP, VerdictKind.ACCEPT]
    assert ways[0].because.startswith("if it matches (not known: -m frob --nicate 1: ")
    assert ways[1].because.endswith(": -A INPUT -m frob --nicate 1 -j DROP")
    assert "does not match" in ways[1].because


def test_an_unknown_match_that_changes_nothing_is_one_way_and_said() -> None:
    way = only(run("-A INPUT -m limit --limit 5/min -j LOG\n-A INPUT -j ACCEPT"))
    assert shown(way) == ["unknown INPUT 1", "accept INPUT 2"]
    assert way.steps[0].kind is StepKind.RULE
    assert "not known" in way.steps[0].note


def test_an_unknown_jump_that_comes_back_unchanged_is_one_way() -> None:
    way = only(
        run(
            """
            -A INPUT -m limit --limit 5/min -j A
            -A INPUT -j ACCEPT
            -A A -p udp -j DROP
            -A A -j LOG
            """
        )
    )
    assert shown(way) == ["unknown INPUT 1", "accept INPUT 2"]


def test_an_unknown_jump_that_may_decide_stays_unknown() -> None:
    ways = run(
        """
        -A INPUT -m limit --limit 5/min -j A
        -A INPUT -j ACCEPT
        -A A -m limit --limit 5/min -j DROP
        """
    )
    assert [w.chance for w in ways] == [None, None]
    assert [w.verdict.kind for w in ways] == [VerdictKind.DROP, VerdictKind.ACCEPT]
    assert shown(ways[1]) == ["unknown INPUT 1", "accept INPUT 2"]


def test_an_unknown_mark_keeps_both_ways() -> None:
    ways = run(
        "-A INPUT -m limit --limit 1/s -j MARK --set-xmark 0x1/0x1\n-A INPUT -j ACCEPT",
        table="mangle",
    )
    assert [(w.state.packet.mark, w.chance) for w in ways] == [(1, None), (0, None)]


def test_what_an_unknown_split_and_a_mark_made_equal_meets_again() -> None:
    packet = replace(PACKET, mark=1)
    way = only(
        run(
            "-A INPUT -m limit --limit 1/s -j MARK --set-xmark 0x1/0x1",
            table="mangle",
            packet=packet,
        )
    )
    assert way.state.packet.mark == 1


def test_an_unknown_return_keeps_both_ways() -> None:
    ways = run("-A INPUT -m limit --limit 1/s -j RETURN\n-A INPUT -j ACCEPT", policy="DROP")
    assert [w.verdict.kind for w in ways] == [VerdictKind.ACCEPT, VerdictKind.DROP]


def test_an_unknown_target_ends_the_table() -> None:
    (way,) = run("-A INPUT -j FROB --x 1\n-A INPUT -j ACCEPT")
    assert way.verdict.kind is VerdictKind.UNKNOWN
    assert way.verdict.citation.text == "-A INPUT -j FROB --x 1"
    assert "-j FROB --x 1" in way.verdict.detail
    assert shown(way) == ["unknown INPUT 1"]


def test_nfqueue_is_a_verdict_of_its_own() -> None:
    (way,) = run("-A INPUT -j NFQUEUE --queue-num 0 --queue-bypass")
    assert way.verdict.kind is VerdictKind.QUEUE


def test_tproxy_hangs_on_a_socket() -> None:
    ways = run("-A INPUT -p tcp -j TPROXY --on-port 80 --tproxy-mark 0x1/0x1", table="mangle")
    assert [(w.verdict.kind, w.state.packet.mark, w.chance) for w in ways] == [
        (VerdictKind.ACCEPT, 1, None),
        (VerdictKind.DROP, 0, None),
    ]


def test_reject_says_with_what() -> None:
    way = only(run("-A INPUT -p tcp -j REJECT --reject-with tcp-reset"))
    assert (way.verdict.kind, way.verdict.reject_with) == (VerdictKind.REJECT, "tcp-reset")
    way = only(run("-A INPUT -j REJECT"))
    assert way.verdict.reject_with == "icmp-port-unreachable"


def test_chains_that_call_one_another_end_unknown() -> None:
    (way,) = run("-A INPUT -j A\n-A A -j B\n-A B -g A")
    assert way.verdict.kind is VerdictKind.UNKNOWN
    assert "call one another" in way.verdict.detail


def test_a_goto_to_a_chain_that_is_not_there_ends_unknown() -> None:
    (way,) = run("-A INPUT -g NOWHERE")
    assert way.verdict.kind is VerdictKind.UNKNOWN
    assert way.verdict.detail == "no such chain: NOWHERE"


AFFINITY = """
    -A INPUT -m recent --rcheck --seconds 10800 --reap --name E1 --rsource -j E1
    -A INPUT -m recent --rcheck --seconds 10800 --reap --name E2 --rsource -j E2
    -A INPUT -m statistic --mode random --probability 0.5 -j E1
    -A INPUT -j E2
    -A E1 -p tcp -m recent --set --name E1 --rsource -j DNAT --to-destination 10.40.0.1:80
    -A E2 -p tcp -m recent --set --name E2 --rsource -j DNAT --to-destination 10.40.0.2:80
"""


def test_affinity_pins() -> None:
    seen = RecentEntry(address=PACKET.src, ages=(5.0,))
    env = FixedEnvironment(lists={"E1": (), "E2": (seen,)})
    way = only(run(AFFINITY, table="nat", env=env))
    assert shown(way) == ["jump INPUT 2", "accept E2 1"]
    assert [(c.name, c.address) for c in way.state.recent] == [("E2", PACKET.src)]


def test_affinity_that_is_too_old_does_not_pin() -> None:
    old = RecentEntry(address=PACKET.src, ages=(10801.0,))
    env = FixedEnvironment(lists={"E1": (), "E2": (old,)})
    ways = run(AFFINITY, table="nat", env=env)
    assert [w.chance for w in ways] == [Fraction(1, 2), Fraction(1, 2)]


def test_affinity_that_was_not_read_is_unknown() -> None:
    ways = run(AFFINITY, table="nat")
    assert [shown(w)[-1] for w in ways] == ["accept E1 1", "accept E2 1"] * 2
    assert [w.chance for w in ways] == [None] * 4


def test_a_set_is_seen_by_the_same_packets_later_rules() -> None:
    way = only(
        run(
            """
            -A INPUT -m recent --set --name L --rsource
            -A INPUT -m recent --rcheck --seconds 1 --name L --rsource -j DROP
            """,
            env=FixedEnvironment(lists={"L": ()}),
        )
    )
    assert shown(way) == ["continue INPUT 1", "drop INPUT 2"]


def test_a_side_effect_stays_where_a_later_match_denies() -> None:
    way = only(
        run(
            """
            -A INPUT -m recent --set --name L --rsource -m mark --mark 0x1 -j DROP
            -A INPUT -m recent --rcheck --name L --rsource -j DROP
            """,
            env=FixedEnvironment(lists={"L": ()}),
        )
    )
    assert shown(way) == ["drop INPUT 2"]


def test_a_draw_before_a_side_effect_splits_it() -> None:
    ways = run(
        """
        -A INPUT -m statistic --mode random --probability 0.25 -m recent --set --name L --rsource
        -A INPUT -m recent --rcheck --name L --rsource -j DROP
        """,
        env=FixedEnvironment(lists={"L": ()}),
    )
    assert [(w.chance, w.verdict.kind) for w in ways] == [
        (Fraction(1, 4), VerdictKind.DROP),
        (Fraction(3, 4), VerdictKind.ACCEPT),
    ]


# -- paths that an earlier packet took ----------------------------------------------------------

PATHS = """
-A INPUT -m comment --comment many -j LONG
-A INPUT -s 10.142.0.0/24 -g MARKED
-A INPUT -p tcp -m tcp --dport 80 -j DROP
-A MARKED -j MARK --set-xmark 0x4000/0x4000
-A MARKED -d 10.43.240.9/32 -j RETURN
-A MARKED -m mark --mark 0x4000/0x4000 -j ACCEPT
""" + "".join(f"-A LONG -d 10.43.241.{i}/32 -p tcp -j REJECT\n" for i in range(1, 60))


def test_a_path_is_left_where_a_packet_goes_another_way() -> None:
    """In every order: what an earlier packet did must not show in what a later one does."""
    packets = [
        replace(PACKET, src=parse_address(src), dst=parse_address(dst), dport=port)
        for src in ("10.142.0.2", "10.142.0.3", "192.0.2.1")
        for dst in ("10.43.240.7", "10.43.240.9", "10.43.241.5", "10.43.241.60")
        for port in (80, 81)
    ]

    def ask(ruleset: IptablesRuleset, packet: Packet) -> tuple[Alternative, ...]:
        (base,) = ruleset.base_chains(Hook.INPUT)
        ct = CtInfo(state=CtState.NEW, orig=packet.tuple5, reply=packet.tuple5.inverted())
        state = PacketState(packet=packet, hook=Hook.INPUT, ct=ct, in_iface="eth0")
        return traverse(ruleset, base, state, FixedEnvironment())

    alone = [ask(rules(PATHS, policy="DROP"), packet) for packet in packets]
    assert len({tuple(s.citation for a in found for s in a.steps) for found in alone}) == 5
    shared = rules(PATHS, policy="DROP")
    for _ in range(2):
        for order in (packets, packets[::-1]):
            found = {packet: ask(shared, packet) for packet in order}
            assert [found[packet] for packet in packets] == alone
