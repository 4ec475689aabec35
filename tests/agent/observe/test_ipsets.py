from __future__ import annotations

import pytest

from gketrace.snapshot import IpSetEntry, Unavailable
from gketrace_agent.observe.ipsets import observe_ipsets, parse_ipset_save
from gketrace_agent.observe.iptables import Programs
from tests.agent.observe.bed import Bed


def test_sets_are_read(bed: Bed) -> None:
    netns = bed.netns("ipsets")
    netns.run(
        "ipset",
        "restore",
        stdin="create cali40s hash:net family inet\n"
        "add cali40s 10.40.0.0/24\n"
        "add cali40s 10.40.0.128/25 nomatch\n"
        "create svc hash:ip,port family inet timeout 300\n"
        "add svc 10.0.0.1,tcp:80 timeout 120\n"
        "create six hash:ip family inet6 comment\n"
        'add six fd00::1 comment "two words"\n',
    )
    found = netns.read(lambda reader: observe_ipsets(reader, Programs()))
    assert not isinstance(found, Unavailable)
    assert set(found) == {"cali40s", "svc", "six"}
    assert (found["cali40s"].type, found["cali40s"].family) == ("hash:net", 4)
    assert {(e.parts, e.nomatch) for e in found["cali40s"].entries} == {
        (("10.40.0.0/24",), False),
        (("10.40.0.128/25",), True),
    }
    (entry,) = found["svc"].entries
    assert entry.parts == ("10.0.0.1", "tcp:80")
    assert entry.timeout is not None
    assert 110 <= entry.timeout <= 120
    assert found["svc"].header["timeout"] == "300"
    assert found["six"].family == 6
    assert found["six"].entries == (
        IpSetEntry(parts=("fd00::1",), text='add six fd00::1 comment "two words"'),
    )


def test_no_sets_and_no_program(bed: Bed) -> None:
    netns = bed.netns("ipsets")
    assert netns.read(lambda reader: observe_ipsets(reader, Programs())) == {}
    programs = Programs(ipset=("gko-no-such-program",))
    assert netns.read(lambda reader: observe_ipsets(reader, programs)) == {}
    netns.run("ipset", "create", "one", "hash:ip")
    found = netns.read(lambda reader: observe_ipsets(reader, programs))
    assert isinstance(found, Unavailable)
    assert "1 ipsets exist" in found.reason


def test_other_lines_are_refused() -> None:
    with pytest.raises(ValueError, match="ipset save"):
        parse_ipset_save("add unknown 10.0.0.1\n")
