"""Scenarios of the family Services."""

from __future__ import annotations

from typing import Final

from e2e.scenarios.model import Scenario
from e2e.scenarios.stage import NODES, Stage
from gketrace.kubenames import ChainRole, ServicePort, endpoint_chain, service_chain

__all__ = ["SCENARIOS"]

_IP: Final = "10.43.240.90"
_WEB: Final = ServicePort(namespace="default", service="web-nodeport", port="http")
_WEB_IP: Final = "10.43.240.12"
_HELLO: Final = "hello-server-579859fb5b-szrwh"


def _sometimes(stage: Stage) -> bool:
    """Half of the connections fail; twelve in a row never do but by one chance in 4,096."""
    return not all(stage.reaches("pod/web-0", _IP, 80) for _ in range(12))


def _refused(stage: Stage) -> bool:
    return stage.lab.connect("pod/web-0", _IP, 80, timeout=0.7).kind == "refused"


def _unreached(stage: Stage) -> bool:
    return not stage.reaches("pod/web-0", _IP, 80)


def _reject(stage: Stage, name: str) -> None:
    """kube-proxy's own rule for a Service without endpoints."""
    for node in NODES:
        stage.rule(
            node,
            "filter",
            "KUBE-SERVICES",
            f'-d {_IP}/32 -p tcp -m comment --comment "default/{name}:http has no endpoints" '
            "-m tcp --dport 80 -j REJECT",
        )


def _no_endpoints(stage: Stage) -> None:
    stage.service("lonely", _IP, [])
    _reject(stage, "lonely")


def _none_ready(stage: Stage) -> None:
    stage.service("ailing", _IP, [(stage.pod_ip("web-1"), 8080, "m69d", "web-1")], ready=False)
    _reject(stage, "ailing")


def _not_listening(stage: Stage) -> None:
    end = (stage.pod_ip("web-1"), 7777, "m69d", "web-1")
    stage.service("deaf", _IP, [end], target_port=7777)
    stage.programme("deaf", _IP, [f"{end[0]}:7777"])


_LISTEN: Final = (
    "import socket,time; s=socket.socket(); s.bind(('127.0.0.1', 7778)); s.listen(); "
    "print('up', flush=True); time.sleep(600)"
)


def _loopback(stage: Stage) -> None:
    end = (stage.pod_ip("web-1"), 7778, "m69d", "web-1")
    stage.service("shy", _IP, [end], target_port=7778)
    stage.programme("shy", _IP, [f"{end[0]}:7778"])
    stage.keep("pod/web-1", ["/usr/bin/python3", "-c", _LISTEN])


def _unnamed_port(stage: Stage) -> None:
    stage.service("misnamed", _IP, [], target_port="nope", selector={"app": "web"})
    _reject(stage, "misnamed")


def _clash(stage: Stage) -> None:
    web = stage.pod_ip("web-2")
    stage.service("clash", _IP, [(web, 8080, "33fg", "web-2")], node_port=8088)
    stage.programme("clash", _IP, [f"{web}:8080"], node_port=8088)


def _taken_over(stage: Stage) -> bool:
    """Who answers at the hostPort."""
    result = stage.lab.connect("node/2jdh", stage.node_ip("33fg"), 8088, timeout=0.7)
    return result.kind == "delivered" and "hostport" not in str(result.pod)


def _nothing(stage: Stage) -> None:
    """The fixture has it."""


def _local_gap(stage: Stage) -> bool:
    return not stage.reaches("client/203.0.113.10", stage.node_ip("2jdh"), 30081)


def _internal_gap(stage: Stage) -> bool:
    return not stage.reaches("node/2jdh", "10.43.240.15", 80)


def _kept_out(stage: Stage) -> bool:
    return not stage.reaches("client/192.0.2.10", "35.231.121.13", 80)


def _missing_endpoint(stage: Stage) -> None:
    chain = service_chain(ChainRole.SERVICE, _WEB)
    stage.saved("m69d")
    stage.run("node/m69d", f"{stage.iptables} -t nat -F {chain}")


def _web_from_m69d(stage: Stage) -> bool:
    return not stage.reaches("pod/edge-0", _WEB_IP, 80)


def _dead_endpoint(stage: Stage) -> None:
    gone = "10.40.1.99:8080"
    web = stage.pod_ip("web-0")
    stage.service("lagging", _IP, [(web, 8080, "2jdh", "web-0")])
    stage.programme("lagging", _IP, [f"{web}:8080"], nodes=("m69d", "33fg"))
    # As a kube-proxy that has not heard that the other pod is gone.
    stage.programme("lagging", _IP, [gone, f"{web}:8080"], nodes=("2jdh",))


def _rules_gone(stage: Stage) -> None:
    stage.saved("m69d")
    tool = stage.iptables
    stage.run(
        "node/m69d",
        f"{tool}-save | grep -v -e KUBE-S -e KUBE-N -e KUBE-E -e KUBE-F -e KUBE-P -e KUBE-M "
        f"| {tool}-restore",
    )


def _canary(stage: Stage) -> None:
    tool = stage.iptables
    stage.do(
        "node/m69d",
        f"{tool} -t mangle -X KUBE-PROXY-CANARY",
        f"{tool} -t mangle -N KUBE-PROXY-CANARY",
    )


def _kubelet_canary(stage: Stage) -> None:
    tool = stage.iptables
    stage.do(
        "node/m69d",
        f"{tool} -t mangle -X KUBE-KUBELET-CANARY",
        f"{tool} -t mangle -N KUBE-KUBELET-CANARY",
    )


def _taken(stage: Stage) -> None:
    """On one node only, so that it is met only by who asks there."""
    to = f"-d {_WEB_IP} -p tcp -j DNAT --to-destination {stage.pod_ip(_HELLO)}:8080"
    stage.rule("m69d", "nat", "OUTPUT", to)


def _wrong_pod(stage: Stage) -> bool:
    return _HELLO in str(stage.lab.connect("node/m69d", _WEB_IP, 80, timeout=0.7).pod)


def _both_backends(stage: Stage) -> None:
    other = "iptables-nft" if stage.iptables == "iptables-legacy" else "iptables-legacy"
    rule = "FORWARD -s 192.0.2.99/32 -j ACCEPT"
    stage.do("node/m69d", f"{other} -A {rule}", f"{other} -D {rule}")


def _health_port(stage: Stage) -> None:
    """The process that serves kube-proxy's ports stops listening: it is stopped, and its ports'
    queues are made to run over, as those of a kube-proxy that hangs."""
    pid = stage.run("node/m69d", "ss -Hltnp 'sport = :10256' | sed 's/.*pid=\\([0-9]*\\).*/\\1/'")
    stage.do("node/m69d", f"kill -STOP {pid.strip()}", f"kill -CONT {pid.strip()}")
    stage.keep("node/m69d", ["/usr/bin/python3", "-c", _FLOOD])


_FLOOD: Final = """
import socket, time
held = []
for _ in range(24):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(("127.0.0.1", 10256))
    held.append(s)
time.sleep(0.3)
print("up", flush=True)
time.sleep(600)
"""


def _health_hangs(stage: Stage) -> bool:
    code = (
        "import socket; s=socket.create_connection(('127.0.0.1',10256),0.7); s.settimeout(0.7); "
        "s.sendall(b'GET /healthz HTTP/1.0\\r\\n\\r\\n'); s.recv(10)"
    )
    done = stage.lab.exec("node/m69d", ["/usr/bin/python3", "-c", code])
    return done.returncode != 0


def _pinned(stage: Stage) -> None:
    web, gone = stage.pod_ip("web-0"), "10.40.1.99:8080"
    stage.service("sticky", _IP, [(web, 8080, "2jdh", "web-0")], affinity=True)
    stage.programme("sticky", _IP, [f"{web}:8080"], affinity=True, nodes=("m69d", "33fg"))
    stage.programme("sticky", _IP, [gone, f"{web}:8080"], affinity=True, nodes=("2jdh",))
    sep = endpoint_chain(ServicePort(namespace="default", service="sticky", port="http"), gone)
    stage.run("node/2jdh", f"echo +{web} > /proc/net/xt_recent/{sep}")


def _host_network(stage: Stage) -> None:
    node = stage.node_ip("m69d")
    stage.service("onhost", _IP, [(node, 9100, "m69d", "hostnet-0")], target_port=9100)
    stage.programme("onhost", _IP, [f"{node}:9100"])


SCENARIOS: Final = (
    Scenario(
        code="GKT-101",
        own=True,
        title="a Service whose selector matches no pod",
        fault=_no_endpoints,
        proof=("no EndpointSlice of default/lonely", "spec.selector app=lonely"),
        symptom=_refused,
    ),
    Scenario(
        code="GKT-102",
        own=True,
        title="its only pod is not ready",
        fault=_none_ready,
        proof=("ready false",),
        symptom=_refused,
    ),
    Scenario(
        code="GKT-103",
        title="NodePort of a node without an endpoint, policy Local",
        fault=_nothing,
        ask=("service", "web-lb-local", "--via", "nodeport", "--node", "2jdh"),
        proof=("spec.externalTrafficPolicy Local",),
        symptom=_local_gap,
    ),
    Scenario(
        code="GKT-104",
        title="ClusterIP from a node without an endpoint, policy Local",
        fault=_nothing,
        ask=("service", "web-internal-local", "--via", "clusterip", "--node", "2jdh"),
        proof=("spec.internalTrafficPolicy Local",),
        symptom=_internal_gap,
    ),
    Scenario(
        code="GKT-105",
        own=True,
        title="targetPort 7777, where nothing listens",
        fault=_not_listening,
        proof=("no tcp socket is bound to 10.40.1.10:7777",),
        symptom=_refused,
    ),
    Scenario(
        code="GKT-106",
        own=True,
        title="the program binds 127.0.0.1",
        fault=_loopback,
        proof=("127.0.0.1:7778",),
        symptom=_refused,
    ),
    Scenario(
        code="GKT-107",
        own=True,
        title="targetPort named as no container port is",
        fault=_unnamed_port,
        proof=("targetPort nope/TCP",),
        symptom=_refused,
    ),
    Scenario(
        code="GKT-108",
        title="a client outside loadBalancerSourceRanges",
        fault=_nothing,
        ask=(
            "service",
            "web-lb-sources",
            "--via",
            "loadbalancer",
            "--from",
            "192.0.2.10",
            "--node",
            "2jdh",
        ),
        proof=("spec.loadBalancerSourceRanges",),
        symptom=_kept_out,
    ),
    Scenario(
        code="GKT-109",
        own=True,
        title="a NodePort that is a pod's hostPort",
        fault=_clash,
        proof=("nodePort 8088", "hostPort 8088/TCP"),
        symptom=_taken_over,
    ),
    Scenario(
        code="GKT-110",
        title="one node's rules lack a Service's endpoints",
        fault=_missing_endpoint,
        proof=("the rules lack 10.40.0.10:8080",),
        symptom=_web_from_m69d,
    ),
    Scenario(
        code="GKT-111",
        own=True,
        title="one node's rules lead to a pod that is gone",
        fault=_dead_endpoint,
        proof=("--to-destination 10.40.1.99:8080",),
        symptom=_sometimes,
        also=frozenset({"GKT-210"}),
    ),
    Scenario(
        code="GKT-112",
        title="kube-proxy's rules flushed on one node",
        fault=_rules_gone,
        proof=("no chain KUBE-SERVICES",),
        symptom=_web_from_m69d,
    ),
    Scenario(
        code="GKT-113",
        title="mangle flushed: kube-proxy's canary is gone",
        fault=_canary,
        proof=("no chain KUBE-PROXY-CANARY in mangle",),
    ),
    Scenario(
        code="GKT-114",
        title="kube-proxy hangs: its health port is not served",
        fault=_health_port,
        proof=("port 10256",),
        symptom=_health_hangs,
    ),
    Scenario(
        code="GKT-115",
        title="a rule in the other backend of iptables",
        fault=_both_backends,
        proof=("iptables-legacy",),
    ),
    Scenario(
        code="GKT-117",
        own=True,
        title="xt_recent pins a client to an endpoint that is gone",
        fault=_pinned,
        proof=("/proc/net/xt_recent/KUBE-SEP-",),
        symptom=_unreached,
        also=frozenset({"GKT-312"}),
    ),
    Scenario(
        code="GKT-118",
        title="the kubelet's canary is gone",
        fault=_kubelet_canary,
        proof=("no chain KUBE-KUBELET-CANARY in mangle",),
    ),
    Scenario(
        code="GKT-119",
        title="a rule before kube-proxy's leads to another pod, on one node",
        fault=_taken,
        proof=("--to-destination 10.40.0.6:8080",),
        symptom=_wrong_pod,
    ),
    Scenario(
        code="GKT-325",
        own=True,
        title="an endpoint in its node's network",
        fault=_host_network,
        proof=("spec.hostNetwork true",),
    ),
)
