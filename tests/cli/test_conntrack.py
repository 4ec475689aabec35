"""`gketrace conntrack` over agents that serve tables made here: filters, formats, completeness."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
import yaml

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.conntrack_records import RECORD, entry_from_record, record_of, records_from_bytes
from gketrace.conntrack_text import render_entry
from gketrace.errors import ExitCode, GketraceError
from gketrace.packet import Protocol, Tuple5
from gketrace_agent.messages import conntrack_filters
from gketrace_cli.conntrack_filter import both, door_filters, parse_mark, typed_filter
from gketrace_cli.conntrack_reading import Place, check_events
from gketrace_cli.liveness import Live, LiveReading, Standing
from gketrace_cli.main import run
from gketrace_cli.verdict import Verdict, with_live
from gketrace_proto.codec import encode
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import packet_pb2
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from tests.cli.stage import Stage

SCHEMAS = Path(__file__).parents[2] / "docs/schema"
NODES = ("2jdh", "33fg", "m69d")
ADDRESSES = {"2jdh": "10.142.0.8", "33fg": "10.142.0.7", "m69d": "10.142.0.6"}
ESTABLISHED = CtStatus.SEEN_REPLY | CtStatus.ASSURED | CtStatus.CONFIRMED
NOW = 1_700_000_000.0
DNS_ADDRESS = "10.43.240.17"


def entry(
    protocol: int,
    orig: tuple[str, int, str, int],
    reply: tuple[str, int, str, int] | None = None,
    **fields: Any,
) -> ConntrackEntry:
    """`orig` and `reply`: source, port, destination, port."""

    def half(src: str, sport: int, dst: str, dport: int) -> Tuple5:
        return Tuple5(
            src=ip_address(src), dst=ip_address(dst), protocol=protocol, sport=sport, dport=dport
        )

    taken = half(*orig)
    fields = {"status": int(ESTABLISHED), "timeout": 100, "mark": 0, "id": 7, "use": 1, **fields}
    return ConntrackEntry(orig=taken, reply=half(*reply) if reply else taken.inverted(), **fields)


NODE_PORT = entry(
    Protocol.TCP,
    ("10.142.0.6", 49132, "10.142.0.8", 31830),
    ("10.40.0.6", 8080, "10.40.0.1", 23374),
    tcp_state="ESTABLISHED",
    status=int(ESTABLISHED | CtStatus.SRC_NAT | CtStatus.DST_NAT),
)
SENT = entry(Protocol.TCP, ("10.142.0.6", 49132, "10.142.0.8", 31830), tcp_state="ESTABLISHED")
DNS = entry(
    Protocol.UDP,
    ("10.40.2.10", 5555, "10.43.240.17", 53),
    ("10.40.1.10", 5353, "10.40.2.10", 5555),
    status=int(CtStatus.DST_NAT | CtStatus.CONFIRMED),
    mark=0x4000,
)
SIX = entry(Protocol.UDP, ("fd00:40::5", 1000, "fd00:142::1", 53), zone=9)


@dataclass
class TableAgent(AgentServicer):
    """One node's agent, with tables instead of a kernel."""

    node: str
    tables: dict[str, list[ConntrackEntry]] = field(default_factory=dict)
    """By pod name; "" is the host's."""
    summary: dict[str, Any] = field(default_factory=dict)
    requests: list[pb.ListConntrackRequest] = field(default_factory=list)
    breaks: grpc.StatusCode | None = None
    lies: pb.ListConntrackReply | None = None
    """Sent before the entries."""
    changes: bool = True
    """--allow-system-changes"""
    outcome: pb.ConntrackDeletion.ValueType = pb.CONNTRACK_DELETION_DELETED
    deleted: list[pb.DeleteConntrackRequest] = field(default_factory=list)

    def GetInfo(self, request: pb.GetInfoRequest, context: grpc.ServicerContext) -> pb.GetInfoReply:
        return pb.GetInfoReply(
            node=self.node,
            version="0",
            api_version="gketrace.dev/v1alpha1",
            allow_system_changes=self.changes,
        )

    def DeleteConntrack(
        self, request: pb.DeleteConntrackRequest, context: grpc.ServicerContext
    ) -> pb.DeleteConntrackReply:
        self.deleted.append(request)
        count = len(request.records) // RECORD.size + len(request.entries)
        return pb.DeleteConntrackReply(outcomes=[self.outcome] * count)

    def ListConntrack(
        self, request: pb.ListConntrackRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListConntrackReply]:
        self.requests.append(request)
        wanted = conntrack_filters(request)
        found = [one for one in self.tables[request.target.pod.name] if wanted.takes(one)]
        sent = found[: request.limit or len(found)]
        if self.lies is not None:
            yield self.lies
        for one in sent:
            if request.format == pb.CONNTRACK_FORMAT_TEXT:
                yield pb.ListConntrackReply(text=render_entry(one, now=NOW).encode() + b"\n")
            elif (record := record_of(one)) is not None:
                yield pb.ListConntrackReply(records=RECORD.pack(*record))
            else:
                yield pb.ListConntrackReply(entries=[encode(one)])
        if self.breaks is not None:
            context.abort(self.breaks, "the table went away")
        said = {"consistent": True, "tracked": True, "readings": 1, **self.summary}
        cut = len(sent) < len(found)
        yield pb.ListConntrackReply(
            summary=pb.ConntrackSummary(sent=len(sent), truncated=cut, **said)
        )

    def GetConntrackStats(
        self, request: pb.GetConntrackStatsRequest, context: grpc.ServicerContext
    ) -> pb.GetConntrackStatsReply:
        return pb.GetConntrackStatsReply(
            entries=len(self.tables[request.target.pod.name]),
            limit=1000,
            buckets=1024,
            tracked=True,
            cpus=[pb.ConntrackCpuStats(cpu=0, counters={"found": 5, "insert_failed": 2})],
        )


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TableAgent]]:
    folder = tmp_path_factory.mktemp("tables")
    with ExitStack() as stack:
        agents = {}
        for node in NODES:
            agents[node] = TableAgent(node)
            server = grpc.server(futures.ThreadPoolExecutor(4))
            add_AgentServicer_to_server(agents[node], server)
            server.add_insecure_port(f"unix:{folder / node}.sock")
            server.start()
            stack.callback(lambda s=server: s.stop(None).wait())
        agents["2jdh"].socket = f"unix://{folder}"  # type: ignore[attr-defined]
        yield agents


@pytest.fixture
def agents(servers: dict[str, TableAgent]) -> dict[str, TableAgent]:
    for agent in servers.values():
        agent.tables, agent.summary, agent.breaks, agent.lies = {"": []}, {}, None, None
        agent.requests.clear()
        agent.deleted.clear()
        agent.changes, agent.outcome = True, pb.CONNTRACK_DELETION_DELETED
    servers["2jdh"].tables = {"": [NODE_PORT], "web-0": []}
    servers["m69d"].tables = {"": [SENT]}
    servers["33fg"].tables = {"": [DNS, SIX]}
    return servers


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(world: Stage, agents: dict[str, TableAgent], capsys: pytest.CaptureFixture[str]) -> Ask:
    folder = agents["2jdh"].socket  # type: ignore[attr-defined]

    def asked(*words: str, without: tuple[str, ...] = ()) -> tuple[int, str, str]:
        line = [*words, "--kubeconfig", str(world.api.kubeconfig)]
        for node in NODES:
            if node not in without:
                line += ["--agent", f"{node}={folder}/{node}.sock"]
        code = run(["conntrack", *line])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return asked


def test_text_says_the_answer_first(ask: Ask) -> None:
    code, out, err = ask()
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "4 entries on 3 nodes; each table was read whole.",
        "Accounting is off on all nodes: packets and bytes are not known.",
        "",
        "NODE  PROTO  STATE        FROM -> TO",
        "2jdh  tcp    ESTABLISHED  10.142.0.6:49132 -> 10.142.0.8:31830",
        "             translated to 10.40.0.6:8080 from 10.40.0.1:23374",
        "33fg  udp    UNREPLIED    10.40.2.10:5555 -> 10.43.240.17:53",
        "             translated to 10.40.1.10:5353",
        "33fg  udp    ASSURED      [fd00:40::5]:1000 -> [fd00:142::1]:53",
        "m69d  tcp    ESTABLISHED  10.142.0.6:49132 -> 10.142.0.8:31830",
    ]


def test_wide_names_pods_and_services(ask: Ask) -> None:
    code, out, _ = ask("-o", "wide")
    assert code == 0
    assert "10.142.0.8:31830 (svc/default/hello-server)" in out
    assert "10.40.0.6:8080 (pod/default/hello-server-579859fb5b-szrwh)" in out
    assert (
        "10.43.240.17:53 (svc/default/dns); translated to 10.40.1.10:5353 (pod/default/web-1)"
        in (out)
    )
    assert "mark 0x4000" in out


def test_lines_are_conntracks_and_nothing_else_is_on_stdout(
    ask: Ask, agents: dict[str, TableAgent]
) -> None:
    code, out, err = ask("33fg", "-o", "conntrack")
    assert code == 0
    assert out == "".join(render_entry(one, now=NOW) + "\n" for one in (DNS, SIX))
    assert err == "gketrace: 2 entries on node 33fg; the table was read whole.\n"
    agents["33fg"].summary = {"consistent": False, "readings": 3}
    code, out, err = ask("33fg", "-o", "conntrack")
    assert code == 3
    assert len(out.splitlines()) == 2
    assert "not seen: conntrack on 33fg: the table changed while it was read (3 readings)" in err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-p", "udp"], [DNS, SIX]),
        (["-p", "17", "-f", "ipv6"], [SIX]),
        (["-s", "10.142.0.0/16", "--dst-nat"], [NODE_PORT]),
        (["-d", "10.43.240.17", "--dport", "53"], [DNS]),
        (["--sport", "49132", "--state", "established"], [NODE_PORT, SENT]),
        (["--reply-src", "10.40.0.0/24"], [NODE_PORT]),
        (["-q", "10.40.0.1", "--src-nat"], [NODE_PORT]),
        (["--reply-port-src", "5353"], [DNS]),
        (["--mark", "0x4000/0x4000"], [DNS]),
        (["--zone", "9"], [SIX]),
        (["--pod", "web-1"], [DNS]),
        (["--service", "dns"], [DNS]),
        (["--service", "hello-server"], [NODE_PORT]),
        (["--service", "dns", "-s", "10.40.2.10"], [DNS]),
        (["--service", "dns", "-d", "10.9.9.9"], []),
        (["--service", "dns", "-A", "-n", "elsewhere"], [DNS]),
        (["--node", "m69d"], [SENT]),
    ],
)
def test_filters_are_the_agents(ask: Ask, words: list[str], found: list[ConntrackEntry]) -> None:
    code, out, err = ask(*words, "-o", "conntrack")
    assert code == 0, err
    assert sorted(out.splitlines()) == sorted(render_entry(one, now=NOW) for one in found)
    code, out, _ = ask(*words, "-C", "-o", "conntrack")
    assert (code, out) == (0, f"{len(found)}\n")


def test_node_ports_are_asked_at_the_nodes_own_addresses(
    ask: Ask, agents: dict[str, TableAgent]
) -> None:
    assert ask("--service", "hello-server")[0] == 0
    for node, agent in agents.items():
        asked = {(f.orig_dst, f.orig_dport) for f in agent.requests[0].any}
        assert (f"{ADDRESSES[node]}/32", 31830) in asked
        others = {f"{ip}/32" for name, ip in ADDRESSES.items() if name != node}
        assert not others & {dst for dst, _ in asked}


def test_a_pods_own_table(ask: Ask, agents: dict[str, TableAgent]) -> None:
    agents["2jdh"].summary = {"tracked": False}
    code, out, _ = ask("pod/web-0")
    assert code == 0
    assert out == (
        "Pod default/web-0 on 2jdh: nothing asks for connection tracking: not tracked.\n"
    )
    agents["2jdh"].summary = {}
    agents["2jdh"].tables["web-0"] = [DNS]
    document = json.loads(ask("pod/web-0", "-o", "json")[1])
    assert document["entries"][0]["netns"] == "pod/default/web-0"
    assert [r.target.pod.name for r in agents["2jdh"].requests] == ["web-0", "web-0"]


@pytest.mark.parametrize("form", ["json", "jsonl", "yaml"])
def test_documents(ask: Ask, form: str) -> None:
    schema = json.loads((SCHEMAS / "conntrack.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for words in (["-p", "tcp"], ["-p", "tcp", "-d", "10.9.9.9"], ["-S"], ["-C", "-p", "tcp"]):
        _, out, _ = ask(*words, "-o", form)
        if form == "jsonl":
            documents = [json.loads(line) for line in out.splitlines()]
        else:
            documents = [yaml.safe_load(out)]
        for document in documents:
            jsonschema.validate(document, schema)
    _, out, _ = ask("-p", "tcp", "-o", form)
    if form == "jsonl":
        entries = [json.loads(line) for line in out.splitlines()][:-1]
    else:
        entries = yaml.safe_load(out)["entries"]
    translated = next(one for one in entries if "DST_NAT" in one["status"])
    assert translated["reply"]["src"] == "10.40.0.6"
    assert translated["original"]["packets"] is None


def test_what_was_not_seen_is_said(ask: Ask, agents: dict[str, TableAgent]) -> None:
    agents["33fg"].breaks = grpc.StatusCode.ABORTED
    code, out, _ = ask(without=("m69d",))
    assert code == 3
    assert out.startswith("3 entries on 2 nodes; not everything was seen.")
    assert "Not seen: agent on m69d: no agent on node m69d" in out
    assert "Not seen: conntrack on 33fg: node 33fg: the table went away" in out
    document = json.loads(ask("-o", "json", without=("m69d",))[1])
    assert not document["complete"]
    assert {m["node"] for m in document["missing"]} == {"m69d", "33fg"}


def newer_state() -> bytes:
    record = record_of(DNS)
    assert record is not None
    return RECORD.pack(*record._replace(state=200))


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (pb.ListConntrackReply(records=b"x"), "1 bytes are no entries of 146"),
        (pb.ListConntrackReply(records=newer_state()), "state 200 is newer"),
        (pb.ListConntrackReply(entries=[packet_pb2.ConntrackEntry()]), "unreadable Tuple5"),
    ],
)
@pytest.mark.parametrize("form", ["text", "json", "jsonl", "yaml"])
def test_entries_that_are_none_cost_their_own_node(
    ask: Ask, agents: dict[str, TableAgent], lie: pb.ListConntrackReply, why: str, form: str
) -> None:
    agents["33fg"].lies = lie
    code, out, _ = ask("-o", form)
    assert code == 3
    assert "10.142.0.8" in out
    assert why in out
    if form == "json":
        assert [one["node"] for one in json.loads(out)["missing"]] == ["33fg"]


def test_lines_do_nothing_to_a_terminal(ask: Ask, agents: dict[str, TableAgent]) -> None:
    agents["33fg"].lies = pb.ListConntrackReply(text=b"tcp \x1b[2J\xff\n")
    assert "tcp \\u001b[2J\\xff\n" in ask("33fg", "-o", "conntrack")[1]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (pb.FollowConntrackReply(records=newer_state(), kinds=b"\1"), "state 200 is newer"),
        (pb.FollowConntrackReply(records=b"x" * 145), "no entries of 146"),
        (pb.FollowConntrackReply(records=bytes(146), kinds=b""), "do not agree"),
        (pb.FollowConntrackReply(records=bytes(146), kinds=b"\x89"), "events of kind 9"),
        (pb.FollowConntrackReply(events=[pb.ConntrackEvent()]), "unreadable Tuple5"),
        (pb.FollowConntrackReply(at=float("nan")), "nan is no time"),
        (pb.FollowConntrackReply(after=-1.0), "is no time"),
        (pb.FollowConntrackReply(status=pb.FollowConntrackStatus(at=1e300)), "is no time"),
    ],
)
def test_events_that_are_none(reply: pb.FollowConntrackReply, why: str) -> None:
    with pytest.raises(GketraceError, match=why):
        check_events(reply)


def test_events_that_are_some() -> None:
    event = pb.ConntrackEvent(kind=pb.CONNTRACK_EVENT_KIND_NEW, entry=encode(DNS))
    record = record_of(DNS)
    assert record is not None
    packed = RECORD.pack(*record)
    check_events(pb.FollowConntrackReply(events=[event], records=packed, kinds=b"\x84", at=NOW))


def test_cut_lists(ask: Ask, agents: dict[str, TableAgent]) -> None:
    code, out, _ = ask("33fg", "--limit", "1")
    assert code == 0
    assert "There are more: --limit 1 was given." in out
    agents["33fg"].summary = {}
    agents["33fg"].tables = {"": [DNS]}
    assert "There are more" not in ask("33fg", "--limit", "1")[1]


def test_statistics(ask: Ask) -> None:
    code, out, _ = ask("-S", "2jdh")
    assert code == 0
    assert "node 2jdh: 1 entry of 1000 (0.1 %)" in out
    assert "insert_failed   2: entries that could not be added" in out
    assert ask("-S", "2jdh", "-o", "conntrack")[1] == "cpu=0   \tfound=5 insert_failed=2 \n"
    assert ask("-C", "-o", "conntrack")[1] == "4\n"
    assert ask("-C")[1].startswith("4 entries on 3 nodes.\n")


def deleted(agents: dict[str, TableAgent]) -> list[ConntrackEntry]:
    return [
        entry_from_record(record)
        for agent in agents.values()
        for request in agent.deleted
        for record in records_from_bytes(request.records)
    ]


def test_deletion_shows_then_deletes_what_it_showed(
    ask: Ask, agents: dict[str, TableAgent]
) -> None:
    code, out, err = ask("-D", "-p", "tcp", "--yes")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "2 entries to be deleted on 2 nodes.",
        "",
        "NODE  PROTO  STATE        FROM -> TO",
        "2jdh  tcp    ESTABLISHED  10.142.0.6:49132 -> 10.142.0.8:31830",
        "             translated to 10.40.0.6:8080 from 10.40.0.1:23374",
        "m69d  tcp    ESTABLISHED  10.142.0.6:49132 -> 10.142.0.8:31830",
        "",
        "2 entries were deleted.",
    ]
    assert deleted(agents) == [NODE_PORT, SENT]


def test_deletion_of_what_has_gone_is_told(ask: Ask, agents: dict[str, TableAgent]) -> None:
    agents["33fg"].outcome = pb.CONNTRACK_DELETION_GONE
    code, out, err = ask("-D", "-p", "udp", "-d", DNS_ADDRESS, "-y", "-o", "conntrack")
    assert (code, out) == (0, render_entry(DNS, now=NOW) + "\n")
    assert err.splitlines() == [
        f"gketrace: node 33fg: {DNS} had gone already",
        "gketrace: 0 flow entries have been deleted.",
    ]
    agents["33fg"].outcome = pb.CONNTRACK_DELETION_FAILED
    code, out, _ = ask("-D", "--zone", "9", "--yes")
    assert code == 3
    assert "0 entries were deleted, 1 was not." in out


@pytest.mark.parametrize("form", ["text", "json", "jsonl", "yaml"])
def test_a_dry_run_deletes_nothing(ask: Ask, agents: dict[str, TableAgent], form: str) -> None:
    agents["33fg"].changes = False  # no obstacle
    code, out, _ = ask("-D", "--service", "dns", "--dry-run", "-o", form)
    assert code == 0
    assert not deleted(agents)
    if form == "text":
        assert out.startswith("1 entry would be deleted on node 33fg.")
        return
    document = yaml.safe_load(out)
    jsonschema.validate(document, json.loads((SCHEMAS / "conntrack.json").read_text()))
    assert (document["kind"], document["dryRun"]) == ("ConntrackDeletion", True)
    assert [one["outcome"] for one in document["entries"]] == ["would be deleted"]


def test_deletion_asks_on_a_terminal(
    ask: Ask, agents: dict[str, TableAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer, count in (("n", 0), ("", 0), ("y", 1)):
        master, slave = os.openpty()
        os.write(master, f"{answer}\n".encode())
        with os.fdopen(slave, "r") as terminal, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", terminal)
            code, out, err = ask("-D", "--zone", "9")
        os.close(master)
        assert code == 0
        assert "1 entry to be deleted on node 33fg." in out
        assert "Delete this entry? [y/N]" in err
        assert ("Nothing was deleted" in err) is (count == 0)
        assert len(deleted(agents)) == count


def test_an_agent_that_changes_nothing_is_told_before_anything(
    ask: Ask, agents: dict[str, TableAgent]
) -> None:
    agents["m69d"].changes = False
    code, out, err = ask("-D", "-p", "tcp", "--yes")
    assert (code, out) == (4, "")
    assert "the agent of node m69d changes nothing on its node" in err
    assert "--allow-system-changes" in err
    assert not deleted(agents)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-D", "--yes"], 2, "-D without a filter would delete whole tables"),
        (["-D", "--yes", "-s", "0.0.0.0/0", "-f", "ipv4"], 2, "without a filter"),
        (["-D", "-p", "udp"], 2, "standard input is no terminal"),
        (["-D", "-p", "udp", "--limit", "1", "--yes"], 2, "-D deletes all that fit"),
        (["-D", "-L", "-p", "udp"], 2, "exclude each other"),
        (["--yes"], 2, "belong to -D"),
        (["-e", "NEW"], 2, "belongs to -E"),
        (["-E", "-e", "NEWS"], 2, "no such event: 'NEWS'"),
        (["--src-nat", "1.2.3.4:x"], 2, "no node '1.2.3.4:x'"),
        (["-s", "1.2.3"], 2, "not an address or network: '1.2.3'"),
        (["-p", "tpc"], 2, "no such protocol: 'tpc'"),
        (["--mark", "x"], 2, "'x' is no mark"),
        (["-f", "ipx"], 2, "no such address family"),
        (["--state", "OPENED"], 2, "no such state: 'OPENED'"),
        (["-L", "-C"], 2, "exclude each other"),
        (["-S", "-p", "tcp"], 2, "-S is about the whole table"),
        (["zzzz"], 2, "no node 'zzzz' in the cluster"),
        (["--pod", "nope"], 2, 'pod "nope" not found'),
        (["--service", "nope"], 2, 'service "nope" not found'),
        (["--service", "nope", "-A"], 2, "not found in any namespace"),
        (["2jdh", "--node", "m69d"], 2, "are two nodes"),
        (["pod/web-0", "--node", "m69d"], 2, "is on node 2jdh, not on m69d"),
    ],
)
def test_wrong_command_lines(ask: Ask, words: list[str], code: int, message: str) -> None:
    got, out, err = ask(*words)
    assert (got, out) == (code, "")
    assert message in err


def test_filters_that_contradict() -> None:
    tcp, udp = typed_filter(protocol="tcp"), typed_filter(protocol="udp")
    assert both(tcp, udp) is None
    wide = typed_filter(addresses={"orig_dst": "10.0.0.0/8"})
    narrow = typed_filter(addresses={"orig_dst": "10.40.0.6"})
    joined = both(wide, narrow)
    assert joined is not None
    assert joined.orig_dst == "10.40.0.6/32"
    assert both(narrow, typed_filter(addresses={"orig_dst": "10.40.0.7"})) is None
    assert parse_mark("0x10/0xf0") == (16, 240)


def test_doors_of_a_service(world: Stage) -> None:
    from gketrace_cli.cluster import Cluster

    with Cluster.open(kubeconfig=str(world.api.kubeconfig)) as cluster:
        hello = cluster.service("default", "hello-server")
    doors = {(f.orig_dst, f.orig_dport) for f in door_filters(hello, ["10.142.0.8"])}
    assert ("10.43.246.223/32", 80) in doors
    assert ("10.142.0.8/32", 31830) in doors


GONE = entry(
    Protocol.UDP,
    ("10.40.2.10", 5555, "10.43.240.17", 53),
    ("10.40.1.99", 5353, "10.40.2.10", 5555),
    status=int(CtStatus.DST_NAT | CtStatus.CONFIRMED),
)


def test_service_says_which_live_connections_are_stale(
    world: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["service", "dns", "--via", "clusterip", "--from", "pod/web-2", "--port", "dns"]
    world.agents["33fg"].entries = [DNS]
    run(world.arguments(*words))
    out = capsys.readouterr().out
    assert "Live connections: 1 on 3 nodes, none stale" in out
    world.agents["33fg"].entries = [DNS, GONE]
    run(world.arguments(*words))
    out = capsys.readouterr().out
    text = " ".join(out.split())
    assert "; 1 live connection is stale. " in text
    assert ".; " not in text
    assert f"node 33fg: {GONE}" in text
    assert "its endpoint 10.40.1.99:5353 is in no EndpointSlice of the Service any more" in text
    schema = json.loads((SCHEMAS / "trace.json").read_text())
    run(world.arguments(*words, "-o", "json"))
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, schema)
    assert document["liveConnections"]["counts"]["current"] == 1
    assert [s["standing"] for s in document["liveConnections"]["stale"]] == ["stale"]


def test_only_stale_datagrams_are_broken() -> None:
    fine = Verdict(text="Service a/b works: the way traced leads to c.", code=ExitCode.OK)
    for one, code, works in (
        (GONE, ExitCode.BROKEN, "works for new connections only"),
        (NODE_PORT, ExitCode.OK, "works"),
    ):
        live = Live(place=Place(node="33fg"), entry=one, standing=Standing.STALE, why="gone")
        judged = with_live(fine, LiveReading(found=(live,)))
        text = f"Service a/b {works}: the way traced leads to c; 1 live connection is stale."
        assert judged == Verdict(text=text, code=code)
    assert with_live(fine, LiveReading()) is fine


def test_service_says_that_it_cannot_see_live_connections(
    world: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    for agent in world.agents.values():
        agent.fails["ListConntrack"] = (grpc.StatusCode.PERMISSION_DENIED, "not yours")
    assert run(world.arguments("service", "hello-server")) == 0
    said = capsys.readouterr().out
    for node in ("2jdh", "m69d"):
        assert re.search(rf"Not seen: .*node {node}.*: not yours", said)


MASQUERADED = entry(
    Protocol.UDP,
    ("10.40.2.10", 5556, "10.43.240.17", 53),
    ("10.40.1.10", 5353, "10.142.0.7", 5556),
    status=int(CtStatus.DST_NAT | CtStatus.SRC_NAT | CtStatus.CONFIRMED),
)
UNMASQUERADED = entry(
    Protocol.TCP,
    ("203.0.113.9", 4000, "10.142.0.8", 31830),
    ("10.40.0.6", 8080, "203.0.113.9", 4000),
    status=int(CtStatus.DST_NAT | CtStatus.SEEN_REPLY | CtStatus.CONFIRMED),
    tcp_state="ESTABLISHED",
)


def test_service_holds_live_connections_against_the_rules(
    world: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["service", "dns", "--via", "clusterip", "--from", "pod/web-2", "--port", "dns"]
    world.agents["33fg"].entries = [DNS, MASQUERADED]
    run(world.arguments(*words))
    out = " ".join(capsys.readouterr().out.split())
    assert "Beside the rules: 1 as the rules would make them now, 1 otherwise" in out
    assert (
        "the rules would now no longer translate its source 10.40.2.10; the entry has 10.142.0.7; "
        "it began under earlier rules, and keeps to them"
    ) in out
    run(world.arguments(*words, "-o", "json"))
    live = json.loads(capsys.readouterr().out)["liveConnections"]
    assert (live["agreement"]["agrees"], live["agreement"]["source"]) == (1, 1)
    assert [one["agreement"] for one in live["differing"]] == ["source"]


def test_an_entry_without_the_masquerade_that_rules_ask_for(
    world: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    world.agents["2jdh"].entries = [UNMASQUERADED]
    run(world.arguments("connections", "--service", "hello-server", "-o", "json"))
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, json.loads((SCHEMAS / "connections.json").read_text()))
    found = next(c for c in document["connections"] if c["client"] == "203.0.113.9:4000")
    assert found["model"]["agreement"] == "source"
    assert found["model"]["olderThanRules"] is True
    assert "translate its source 203.0.113.9 to" in found["model"]["why"]


ANSWERED = replace(DNS, status=int(CtStatus.DST_NAT | CtStatus.SEEN_REPLY | CtStatus.CONFIRMED))
BEHIND = entry(Protocol.UDP, ("10.40.2.10", 5555, "10.40.1.10", 5353))


def test_service_says_what_the_endpoints_node_has_no_entry_of(
    world: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["service", "dns", "--via", "clusterip", "--from", "pod/web-2", "--port", "dns"]
    world.agents["33fg"].entries = [ANSWERED]
    for there, absent in (([], ["m69d"]), ([BEHIND], [])):
        world.agents["m69d"].entries = there
        run(world.arguments(*words, "-o", "json"))
        document = json.loads(capsys.readouterr().out)
        jsonschema.validate(document, json.loads((SCHEMAS / "trace.json").read_text()))
        one_sided = document["liveConnections"]["oneSided"]
        assert [one["absentOn"] for one in one_sided] == absent
    world.agents["m69d"].entries = []
    run(world.arguments(*words))
    assert "missing: m69d has no entry of it" in capsys.readouterr().out
