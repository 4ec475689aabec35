"""Bundles of the lab: the same answers as live, redacted ones too, and what `diff` names.

``GKETRACE_LONG=1`` asks more questions, and looks for the faults' causes over the whole cluster
instead of over the ways of one Service.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from e2e.answers import Ran
from e2e.netlab import Lab
from gketrace_cli.bundle.compare import Opened, compare, open_bundle
from gketrace_cli.bundle.model import Bundle
from gketrace_cli.bundle.record import record
from gketrace_cli.bundle.redact import redact_bundle
from gketrace_cli.bundle.store import read_bundle, to_members, write_bundle
from gketrace_cli.main import run
from gketrace_cli.options import Options
from gketrace_cli.session import Session

SCHEMA = Path(__file__).parents[1] / "docs/schema/difference.json"
LONG = bool(os.environ.get("GKETRACE_LONG"))
COMMANDS = (
    ("service", "hello-server"),
    ("pod", "web-0"),
    ("trace", "pod/web-0", "8.8.8.8:443"),
    ("rules", "2jdh"),
    ("conntrack", "pod/web-0"),
    ("check",),
)
MORE = (
    ("service", "web", "--from", "pod/web-1"),
    ("pod", "hostnet-0"),
    ("trace", "pod/web-0", "service/web:80"),
    ("trace", "pod/web-0", "203.0.113.10:443"),
    ("service", "web-lb-local", "--via", "nodeport"),
    ("rules", "pod/web-0"),
    ("pod", "hello-server-579859fb5b-szrwh"),
)
CLOCKS = frozenset(
    "packets bytes origPackets origBytes replyPackets replyBytes timeoutSeconds ageSeconds "
    "usedSeconds updatedSeconds takenAt id use".split()
)
TICKING = re.compile(rf'"({"|".join(sorted(CLOCKS))})": [^,\n]+')
"""What a second reading finds changed on a cluster where nothing happened: counters and clocks."""
SAID = ((re.compile(r"seen \d+ s ago"), "seen N s ago"),)
STATES = re.compile(r"\b(REACHABLE|STALE|DELAY|PROBE)\b")


def still(text: str) -> str:
    """The answer without what ticks by itself (docs/bundles.md, The same answer)."""
    text = TICKING.sub(lambda m: f'"{m[1]}": 0', text)
    for pattern, word in SAID:
        text = pattern.sub(word, text)
    return STATES.sub("USABLE", text)


@pytest.fixture(scope="module")
def saved(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle of the whole untouched lab, made by the command."""
    # Connections of tests before this one would end between one bundle and the next.
    for node in lab.state["nodes"]:
        lab.exec(f"node/{node}", ["conntrack", "-F"])
    path = tmp_path_factory.mktemp("bundle") / "all.gkt"
    assert run(("bundle", "-A", "-o", str(path), "--kubeconfig", str(lab.kubeconfig))) == 0
    return path


@pytest.fixture(scope="module")
def before(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    path = tmp_path_factory.mktemp("before") / "before.gkt"
    return save_few(read_bundle(str(saved)), path)


def save_few(bundle: Bundle, path: Path) -> Opened:
    """Without `LONG`, only the ways of Service web's pods and of its front doors are traced."""
    if not LONG:
        for plural in ("services", "endpointslices", "pods"):
            listed = bundle.lists[plural]
            listed.items = [one for one in listed.items if re.match(KEPT[plural], name_of(one))]
    write_bundle(bundle, str(path))
    return open_bundle(str(path), Options())


KEPT = {"services": "web$", "endpointslices": "web-", "pods": "web-"}


def name_of(item: Any) -> str:
    return str(item["metadata"]["name"])


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Ran:
    capsys.readouterr()
    code = run(words)
    said = capsys.readouterr()
    return Ran(code=code, out=said.out, err=said.err)


@pytest.mark.parametrize("words", COMMANDS + (MORE if LONG else ()), ids=" ".join)
def test_a_bundle_answers_as_the_cluster_does(
    lab: Lab,
    saved: Path,
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = saved
    for _ in range(3):
        live = answer(capsys, *words, "-o", "json", "--kubeconfig", str(lab.kubeconfig))
        later = answer(capsys, *words, "-o", "json", "--bundle", str(path))
        if still(later.out) == still(live.out):
            break
        # The kernel may have dropped entries of neighbours since; so both anew, at one time.
        path = tmp_path / "anew.gkt"
        assert run(("bundle", "-A", "-o", str(path), "--kubeconfig", str(lab.kubeconfig))) == 0
    assert later.code == live.code, later.err
    assert still(later.out) == still(live.out)


def test_all_connections_are_as_the_cluster_has_them(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lab's own connections come and go, so the cluster is read before and after: what is the
    same in both is so in the bundle, and what is in neither is not in it."""
    config = ("--kubeconfig", str(lab.kubeconfig))
    path = str(tmp_path / "all.gkt")
    commands = ("conntrack", "connections")
    with lab.hold("client", "10.142.0.7", 31830) as held:
        assert held.result.source is not None
        first = [answer(capsys, one, "-o", "json", *config) for one in commands]
        assert run(("bundle", "-A", "-o", path, *config)) == 0
        second = [answer(capsys, one, "-o", "json", *config) for one in commands]
    for live, again, command in zip(first, second, commands, strict=True):
        later = answer(capsys, command, "-o", "json", "--bundle", path)
        assert live.code == again.code == later.code, later.err
        rest, mine = split(later)
        (rest_before, before), (rest_after, after) = split(live), split(again)
        assert rest == rest_before == rest_after
        lasting = {key: one for key, one in before.items() if after.get(key) == one}
        assert any(str(held.result.source[1]) in key for key in lasting)
        assert {key: mine.get(key) for key in lasting} == lasting
        told = before | after
        strangers = [key for key in mine if key not in told and "127.0.0.1" not in key]
        assert strangers == []


def split(ran: Ran) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer without its entries or connections, and these by their addresses; what ticks and
    what is counted of them left out."""
    document = calm(json.loads(ran.out))
    noun = "entries" if "entries" in document else "connections"
    listed = document.pop(noun)
    for counted in ("verdict", "summary"):
        document.pop(counted, None)
    for table in document.get("tables", ()):
        for counted in ("entries", "read", "readings", "duplicates"):
            table.pop(counted)
    return document, {key_of(one): one for one in listed}


def calm(value: Any) -> Any:
    """A document without its clocks and counters."""
    if isinstance(value, dict):
        return {key: calm(one) for key, one in value.items() if key not in CLOCKS}
    return [calm(one) for one in value] if isinstance(value, list) else value


def key_of(one: Any) -> str:
    keys = ("node", "netns", "protocol", "original", "reply", "client", "door", "end")
    return json.dumps([one.get(key) for key in keys])


def test_only_its_owner_reads_it(saved: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_no_secrets(saved: Path) -> None:
    blob = b"\n".join(to_members(read_bundle(str(saved))).values())
    for word in (b"last-applied", b"eyJ", b"client-key", b"BEGIN ", b'"env"', b"certificate"):
        assert word not in blob


def test_a_redacted_bundle_holds_no_name_and_gives_the_same_verdicts(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_bundle(str(saved))
    path = tmp_path / "redacted.gkt"
    write_bundle(redact_bundle(whole), str(path))
    text = b"\n".join(to_members(read_bundle(str(path))).values()).decode("latin1")
    standard = {"default", "kubernetes", "kube-system", "kube-public", "kube-node-lease"}
    for name in ({*whole.nodes} | {*names(whole.lists)}) - standard:
        assert name not in text or not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)
    for address in addresses(whole.lists):
        whole_word = rf"(?<![\w.:]){re.escape(address)}(?![\w.:])"
        assert address not in text or not re.search(whole_word, text)
    plain = answer(capsys, "check", "-o", "json", "--bundle", str(saved))
    masked = answer(capsys, "check", "-o", "json", "--bundle", str(path))
    assert masked.code == plain.code
    assert verdicts(masked) == verdicts(plain)


def names(lists: Any) -> Iterator[str]:
    for listed in lists.values():
        for item in listed.items:
            yield item["metadata"]["name"]


def addresses(lists: Any) -> Iterator[str]:
    for item in lists["pods"].items:
        yield from (one["ip"] for one in item["status"].get("podIPs", ()))
    for item in lists["services"].items:
        yield from (one for one in item["spec"].get("clusterIPs", ()) if one != "None")


def verdicts(ran: Ran) -> list[tuple[str, str, int]]:
    found = json.loads(ran.out)["findings"]
    return sorted((one["code"], one["severity"], len(one["subjects"])) for one in found)


@dataclass(frozen=True)
class Fault:
    """One change on node 2jdh, how it is undone, and what diff must name first."""

    title: str
    command: str
    undo: str
    noun: str
    name: str
    more: tuple[tuple[str, str], ...] = ()
    """What else it must name, with its noun."""


FAULTS = (
    Fault(
        "a sysctl",
        "sysctl -qw net.ipv4.ip_forward=0",
        "sysctl -qw net.ipv4.ip_forward=1",
        "sysctls",
        "net.ipv4.ip_forward",
    ),
    Fault(
        "a rule",
        "iptables-nft -w -I FORWARD -d 10.40.0.0/24 -p tcp -j DROP",
        "iptables-nft -w -D FORWARD -d 10.40.0.0/24 -p tcp -j DROP",
        "rulesets",
        "-A FORWARD -d 10.40.0.0/24 -p tcp -j DROP",
    ),
    Fault(
        "a route",
        "ip route add blackhole 10.40.1.0/24",
        "ip route del blackhole 10.40.1.0/24",
        "routes",
        "blackhole 10.40.1.0/24",
    ),
    Fault(
        "a policy rule",
        "ip rule add to 10.40.2.0/24 prio 50 prohibit",
        "ip rule del prio 50",
        "rules",
        "50: from all to 10.40.2.0/24 prohibit",
    ),
    Fault(
        "a policy rule and its route",
        "ip route add blackhole 10.40.2.0/24 table 77 &&"
        " ip rule add to 10.40.2.0/24 prio 50 table 77",
        "ip rule del prio 50; ip route flush table 77",
        "rules",
        "50: from all to 10.40.2.0/24 lookup 77",
        (("routes", "blackhole 10.40.2.0/24 table 77"),),
    ),
    Fault(
        "a policy",
        "iptables-nft -w -P FORWARD DROP",
        "iptables-nft -w -P FORWARD ACCEPT",
        "rulesets",
        ":FORWARD DROP",
    ),
    Fault("a link", "ip link set cbr0 mtu 1280", "ip link set cbr0 mtu 1500", "links", "cbr0: mtu"),
)


def broken(lab: Lab, fault: Fault, path: Path) -> Opened:
    """A bundle of the lab with that fault, which is gone again afterwards."""
    node = "node/2jdh"
    assert lab.exec(node, ["sh", "-ec", fault.command]).returncode == 0
    try:
        with Session(Options(kubeconfig=str(lab.kubeconfig))) as session:
            bundle = record(session, ("-A",), None)
    finally:
        lab.exec(node, ["sh", "-c", fault.undo])
    return save_few(bundle, path)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_diff_names_what_changed_the_verdict(
    lab: Lab, before: Opened, fault: Fault, tmp_path: Path
) -> None:
    found = compare(before, broken(lab, fault, tmp_path / "broken.gkt"))
    assert found.verdicts
    first = [one for one in found.differences if one.part in found.causes]
    named = {(one.part.noun, one.name) for one in first}
    assert named >= {(fault.noun, fault.name), *fault.more}, first[:5]
    assert {one.part.noun for one in first} == {fault.noun, *(noun for noun, _ in fault.more)}
    assert found.differences[0].part in found.causes


def test_the_command_puts_the_cause_first(
    lab: Lab, before: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(before.bundle, str(tmp_path / "before.gkt"))
    broken(lab, FAULTS[0], tmp_path / "after.gkt")
    files = (str(tmp_path / "before.gkt"), str(tmp_path / "after.gkt"))
    machine = answer(capsys, "diff", *files, "-o", "json")
    assert machine.code == 1, machine.err
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads(machine.out)
    jsonschema.validate(document, schema)
    first = [one for one in document["differences"] if one["changedVerdict"]]
    assert first == document["differences"][: len(first)]
    assert {one["noun"] for one in first} == {FAULTS[0].noun}
    assert FAULTS[0].name in [one["name"] for one in first]
    same = answer(capsys, "diff", files[0], files[0])
    assert (same.code, same.out) == (0, "Nothing differs that matters to packets.\n")


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("capture", "pod/web-0"),
        ("install",),
        ("service", "web", "--follow"),
        ("pod", "web-0", "--follow"),
        ("connections", "--follow"),
        ("conntrack", "-E"),
        ("conntrack", "-D", "-p", "udp", "--yes"),
        ("check", "--watch", "5"),
    ],
    ids=" ".join,
)
def test_what_a_bundle_cannot_do_is_said(
    saved: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = answer(capsys, *words, "--bundle", str(saved))
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert "\n" not in ran.err.strip()
