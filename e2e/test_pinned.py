"""A Service asked about with the address and port of a connection that exists."""

from __future__ import annotations

from e2e.answers import document, run_cli
from e2e.netlab import Lab
from gketrace.errors import ExitCode

DROP = ["FORWARD", "-p", "tcp", "--dport", "8080", "-m", "conntrack", "--ctstate", "NEW"]


def test_the_verdict_is_about_new_connections_too(lab: Lab) -> None:
    node = lab.world.nodes[0]
    with lab.hold("client", node.ip, 30084) as hold:
        assert hold.result.source is not None
        source = f"{hold.result.source[0]}:{hold.result.source[1]}"
        words = ("service", "web6", "--via", "nodeport", "--node", node.name, "--from", source)
        works = run_cli(lab, *words, "-o", "json")
        inserted = lab.exec(f"node/{node.short}", ["iptables-nft", "-I", *DROP, "-j", "DROP"])
        assert inserted.returncode == 0
        try:
            broken = run_cli(lab, *words, "-o", "json")
            fresh = lab.connect("client", node.ip, 30084)
            assert hold.alive()
        finally:
            lab.exec(f"node/{node.short}", ["iptables-nft", "-D", *DROP, "-j", "DROP"])
    assert works.code == ExitCode.OK, works.out
    said = document(works)
    assert "a new one would go to one of 3 endpoints" in said["verdict"]
    (path,) = said["paths"]
    assert path["existingFlow"] is True
    assert path["endpoint"].startswith(f"pod/{hold.result.pod} ")
    assert len(path["newConnections"]) == 3
    assert broken.code == ExitCode.BROKEN, broken.out
    said = document(broken)
    assert "is broken for new connections" in said["verdict"]
    assert said["paths"][0]["outcome"] == "delivered"
    assert {new["outcome"] for new in said["paths"][0]["newConnections"]} == {"dropped"}
    assert fresh.kind == "timeout"
