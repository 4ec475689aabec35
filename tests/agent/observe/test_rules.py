from __future__ import annotations

from ipaddress import ip_network

from gketrace.snapshot import PolicyAction, PolicyRule
from gketrace_agent.observe.rules import observe_rules
from tests.agent.observe.bed import Bed, Netns


def printed(netns: Netns) -> list[str]:
    text = netns.ip("-4", "rule") + netns.ip("-6", "rule")
    return [" ".join(line.split()) for line in text.splitlines()]


def test_rules_of_every_kind_read_as_ip_prints_them(bed: Bed) -> None:
    netns = bed.netns("rules")
    netns.batch(
        "link add eth0 type veth peer name far",
        "rule add pref 70 to 169.254.0.0/16 lookup local",
        "rule add pref 71 ipproto udp dport 53 lookup main",
        "rule add pref 72 ipproto tcp sport 1000-2000 lookup 100 proto static",
        "rule add pref 74 fwmark 0x4000/0x4000 lookup main",
        "rule add pref 75 iif lo lookup main",
        "rule add pref 76 not iif eth0 lookup 1",
        "rule add pref 77 from 10.0.0.0/8 oif gone0 tos 0x10 lookup 4000000000",
        "rule add pref 78 fwmark 0 lookup 5",
        "rule add pref 79 uidrange 0-999 lookup 6",
        "rule add pref 80 lookup main suppress_prefixlength 0",
        "rule add pref 81 lookup main suppress_ifgroup 7",
        "rule add pref 82 from 10.1.1.1 blackhole",
        "rule add pref 83 to 10.1.1.1 unreachable",
        "rule add pref 84 prohibit from 10.2.0.0/16",
        "rule add pref 85 goto 32766",
        "rule add pref 86 goto 40000",
        "rule add pref 87 nop",
        "rule add pref 88 l3mdev",
        "rule add pref 89 tun_id 77 lookup 8",
        "rule add pref 90 from 10.3.0.0/16 realms 3/4 lookup 9",
    )
    for rule in ("91 from fd00::/64 to fd01::1 lookup 7", "92 iif lo fwmark 0x1 lookup 7"):
        netns.ip("-6", "rule", "add", "pref", *rule.split())
    rules = netns.read(observe_rules)
    assert [rule.text for rule in rules] == printed(netns)
    assert len(rules) == 27


def test_a_rule_has_its_fields(bed: Bed) -> None:
    netns = bed.netns("fields")
    netns.batch(
        "rule add pref 74 not from 10.0.0.0/8 fwmark 0x4000/0xf000 ipproto tcp dport 53 lookup 7",
        "rule add pref 80 lookup main suppress_prefixlength 0",
        "rule add pref 85 goto 32766",
    )
    rules = {rule.priority: rule for rule in netns.read(observe_rules) if rule.family == 4}
    assert rules[74] == PolicyRule(
        family=4,
        priority=74,
        table=7,
        src=ip_network("10.0.0.0/8"),
        fwmark=0x4000,
        fwmask=0xF000,
        ip_protocol=6,
        dport=(53, 53),
        invert=True,
        text="74: not from 10.0.0.0/8 fwmark 0x4000/0xf000 ipproto tcp dport 53 lookup 7",
    )
    assert rules[80].suppress_prefixlength == 0
    assert (rules[85].action, rules[85].goto) == (PolicyAction.GOTO, 32766)
    assert [rule.table for rule in rules.values()] == [255, 7, 254, 0, 254, 253]
