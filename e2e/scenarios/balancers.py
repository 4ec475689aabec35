"""Scenarios of load balancers' health checks, of the family Services."""

from __future__ import annotations

from typing import Any, Final

from e2e.scenarios.model import Scenario
from e2e.scenarios.stage import Stage

__all__ = ["SCENARIOS"]

_IP: Final = "10.43.240.90"
_CLIENT: Final = "203.0.113.10"
_RANGE, _PROBER = "35.191.0.0/16", "35.191.7.7"
"""Where the cloud's health checks come from, and one of them."""


def _check_port(stage: Stage) -> None:
    def change(body: dict[str, Any]) -> None:
        body["spec"]["healthCheckNodePort"] = 32199

    stage.put("/api/v1/namespaces/default/services/web-lb-local", change)


def _check_refused(stage: Stage) -> bool:
    service = stage.lab.api("GET", "/api/v1/namespaces/default/services/web-lb-local")
    port = service["spec"]["healthCheckNodePort"]
    return stage.lab.connect("node/2jdh", stage.node_ip("m69d"), port).kind == "refused"


def _no_probes(stage: Stage) -> None:
    """A hand-made firewall that does not know the balancer's ranges."""
    stage.rule("m69d", "filter", "INPUT", f"-s {_RANGE} -p tcp -j DROP")


def _probe(stage: Stage, address: str, port: int) -> bool:
    """Whether a real probe from the range is not answered: a client outside has its address."""
    stage.do(f"client/{_CLIENT}", f"ip addr add {_PROBER}/32 dev eth0",
             f"ip addr del {_PROBER}/32 dev eth0")  # fmt: skip
    device = stage.run("client", f"ip -o route get {_CLIENT}").partition(" dev ")[2].split()[0]
    stage.do("client", f"ip route add {_PROBER}/32 dev {device}",
             f"ip route del {_PROBER}/32 dev {device}")  # fmt: skip
    result = stage.lab.connect(f"client/{_CLIENT}", address, port, bind=(_PROBER, 0), timeout=0.7)
    return result.kind != "delivered"


def _unprobed(stage: Stage) -> bool:
    return _probe(stage, stage.node_ip("m69d"), 32000)


def _no_answers_to_probes(stage: Stage) -> None:
    """The probes get in and are answered, and nothing goes back there."""
    stage.do("node/m69d", f"ip route add blackhole {_RANGE}", f"ip route del blackhole {_RANGE}")


def _no_pod_probes(stage: Stage) -> None:
    """A container-native balancer, whose probes are not let to the pod."""
    web = stage.pod_ip("web-1")
    stage.service("native", _IP, [(web, 8080, "m69d", "web-1")])
    stage.programme("native", _IP, [f"{web}:8080"])

    def change(body: dict[str, Any]) -> None:
        body["metadata"]["annotations"] = {"cloud.google.com/neg": '{"ingress": true}'}

    stage.put("/api/v1/namespaces/default/services/native", change)
    stage.rule("m69d", "filter", "FORWARD", f"-s {_RANGE} -d {web}/32 -p tcp -j DROP")


def _unprobed_pod(stage: Stage) -> bool:
    return _probe(stage, stage.pod_ip("web-1"), 8080)


SCENARIOS: Final = (
    Scenario(
        code="GKT-116",
        title="nothing listens on healthCheckNodePort",
        fault=_check_port,
        proof=("spec.healthCheckNodePort 32199", "no TCP socket listens on port 32199"),
        symptom=_check_refused,
    ),
    Scenario(
        code="GKT-116",
        title="a rule drops a range that health checks come from",
        fault=_no_probes,
        proof=(f"-s {_RANGE} -p tcp -j DROP", "spec.healthCheckNodePort 32000"),
        symptom=_unprobed,
    ),
    Scenario(
        code="GKT-116",
        title="a route keeps the answers to health checks",
        fault=_no_answers_to_probes,
        proof=(f"blackhole {_RANGE}",),
        symptom=_unprobed,
    ),
    Scenario(
        code="GKT-116",
        title="a rule keeps health checks from a pod",
        fault=_no_pod_probes,
        proof=(
            f"-s {_RANGE} -d ",
            "cloud.google.com/neg: the balancer asks pods themselves, on port 8080",
        ),
        symptom=_unprobed_pod,
    ),
)
