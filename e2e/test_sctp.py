"""SCTP on a kernel that has none of its own: a raw socket takes it, or nobody."""

from __future__ import annotations

from e2e.answers import document, run_cli
from e2e.netlab import Lab
from gketrace.errors import ExitCode


def test_the_service_is_followed_to_the_raw_sockets(lab: Lab) -> None:
    ran = run_cli(lab, "service", "sigtran", "-o", "json")
    assert ran.code == ExitCode.OK, ran.out
    found = document(ran)
    named = {path["endpoint"].split()[0] for path in found["paths"]}
    served = {p for p in lab.world.pods if ("SCTP", 3868) in p.ports}
    assert named == {f"pod/{pod.key}" for pod in served}
    for pod in served:
        assert lab.connect("client", pod.ip, 3868, protocol="SCTP").kind == "delivered"


def test_a_pod_without_sctp_answers_protocol_unreachable(lab: Lab) -> None:
    pod = next(p for p in lab.world.pods if p.key.startswith("default/hello-server-"))
    ran = run_cli(lab, "trace", "203.0.113.10", f"{pod.ip}:3868/sctp")
    assert ran.code == ExitCode.BROKEN
    assert "the kernel answers ICMP protocol unreachable" in " ".join(ran.out.split())
    assert lab.connect("client/203.0.113.10", pod.ip, 3868, protocol="SCTP").icmp == (3, 2)
