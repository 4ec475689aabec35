"""Scenarios of the family Connections."""

from __future__ import annotations

from typing import Final

from e2e.scenarios.model import Scenario
from e2e.scenarios.stage import Stage

__all__ = ["SCENARIOS"]

_DNS: Final = "10.43.240.17"
_WEB: Final = "10.43.240.12"
_CLIENT: Final = "203.0.113.10"


def _stale_udp(stage: Stage) -> None:
    stage.do(
        "node/2jdh",
        f"conntrack -I -p udp -s 10.40.0.10 -d {_DNS} --sport 45353 --dport 53 "
        "--dst-nat 10.40.0.99:5353 "
        "-t 600 -u SEEN_REPLY,ASSURED",
        f"conntrack -D -p udp -s 10.40.0.10 -d {_DNS} --sport 45353",
    )


def _pinned_datagram(stage: Stage) -> bool:
    """The client whose connection it is."""
    result = stage.lab.connect(
        "pod/web-0", _DNS, 53, "UDP", bind=("10.40.0.10", 45353), timeout=0.7
    )
    return result.kind != "delivered"


def _stale_tcp(stage: Stage) -> None:
    stage.do(
        "node/2jdh",
        f"conntrack -I -p tcp -s 10.40.0.10 -d {_WEB} --sport 45354 --dport 80 "
        "--dst-nat 10.40.1.99:8080 "
        "-t 3600 --state ESTABLISHED -u SEEN_REPLY,ASSURED",
        f"conntrack -D -p tcp -s 10.40.0.10 -d {_WEB} --sport 45354",
    )


_TALK: Final = (
    "import socket,sys,time; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
    "s.bind(('', 45355)); s.connect((sys.argv[1], 9999)); s.send(b'x'); s.send(b'x'); "
    "print('up', flush=True); time.sleep(600)"
)


def _older(stage: Stage) -> None:
    """A flow that went out unmasqueraded, then a rule that masquerades its like."""
    stage.keep("pod/web-0", ["/usr/bin/python3", "-c", _TALK, _CLIENT])
    stage.rule("2jdh", "nat", "POSTROUTING", f"-d {_CLIENT}/32 -p udp -j MASQUERADE")


def _few_ports(stage: Stage) -> None:
    """Eight ports towards one place, and as many connections."""
    for node in ("2jdh",):
        stage.rule(
            node, "nat", "POSTROUTING",
            "-s 10.40.0.10/32 -d 10.40.1.10/32 -p tcp --dport 9090 -j MASQUERADE "
            "--to-ports 50000-50007",
        )  # fmt: skip
    # Undone in reverse: the connections end by the entries that translate them, or the other end
    # keeps them, and refuses the next from the same port.
    stage.later(
        lambda: stage.run(
            "node/2jdh", "conntrack -D -p tcp -s 10.40.0.10 --dport 9090", check=False
        )
    )
    stage.keep("pod/web-0", ["/usr/bin/python3", "-c", _HOLD, "8"])


_HOLD: Final = (
    "import socket,sys,time; held=[socket.create_connection(('10.40.1.10', 9090), 2) "
    "for _ in range(int(sys.argv[1]))]; print('up', flush=True); time.sleep(600)"
)


def _ninth_fails(stage: Stage) -> bool:
    return not stage.reaches("pod/web-0", "10.40.1.10", 9090)


def _one_sided(stage: Stage) -> None:
    """NodePort connections of one Service are not masqueraded on the node that they come to: the
    endpoint's node answers the client itself.  Its pod is one that the path's faults, which are
    web-1's, leave able to answer."""
    from gketrace.kubenames import ChainRole, ServicePort, service_chain

    ip = "10.43.240.91"
    end = "10.40.2.10"
    stage.service("lopsided", ip, [(end, 8080, "33fg", "web-2")], node_port=30091)
    stage.programme("lopsided", ip, [f"{end}:8080"])
    port = ServicePort(namespace="default", service="lopsided", port="http")
    chain = service_chain(ChainRole.SERVICE, port)
    for node in ("2jdh", "m69d", "33fg"):
        stage.rule(node, "nat", "KUBE-NODEPORTS", f"-p tcp -m tcp --dport 30091 -j {chain}")


def _lopsided(stage: Stage) -> bool:
    return not stage.reaches(f"client/{_CLIENT}", stage.node_ip("2jdh"), 30091)


_FLAGS: Final = """
import socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
src, dst = socket.inet_aton("10.40.0.10"), socket.inet_aton("10.40.1.10")
for n in range(130):
    head = struct.pack("!HHIIBBHHH", 40000 + n, 8080, 1, 0, 5 << 4, 0x03, 1024, 0, 0)
    pseudo = src + dst + struct.pack("!BBH", 0, 6, len(head))
    total = sum(struct.unpack(f"!{(len(pseudo) + len(head)) // 2}H", pseudo + head))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    head = head[:16] + struct.pack("!H", ~total & 0xFFFF) + head[18:]
    s.sendto(head, ("10.40.1.10", 0))
"""


def _invalid(stage: Stage) -> None:
    """SYN and FIN at once is no state of TCP's."""
    stage.saved("2jdh")
    stage.run("node/2jdh", f"{stage.iptables} -Z KUBE-FORWARD")
    stage.lab.exec("pod/web-0", ["/usr/bin/python3", "-c", _FLAGS])


def _unanswered(stage: Stage) -> None:
    """Six connections to a port that another node drops before tracking sees it."""
    stage.rule("m69d", "raw", "PREROUTING", "-d 10.40.1.10/32 -p tcp --dport 9999 -j DROP")
    stage.keep("pod/web-0", ["/usr/bin/python3", "-c", _KNOCK])
    stage.later(
        lambda: stage.run(
            "node/2jdh", "conntrack -D -p tcp -s 10.40.0.10 --dport 9999", check=False
        )
    )


_KNOCK: Final = """
import socket, time
held = []
for _ in range(6):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(("10.40.1.10", 9999))
    held.append(s)
time.sleep(0.2)
print("up", flush=True)
time.sleep(600)
"""


def _knocking(stage: Stage) -> bool:
    return stage.lab.connect("pod/web-0", "10.40.1.10", 9999, timeout=0.7).kind == "timeout"


SCENARIOS: Final = (
    Scenario(
        code="GKT-201",
        title="an entry of UDP leads to a pod that is gone",
        fault=_stale_udp,
        proof=("udp src=10.40.0.10 dst=10.43.240.17",),
        symptom=_pinned_datagram,
        also=frozenset({"GKT-312"}),
    ),
    Scenario(
        code="GKT-202",
        title="an entry of TCP leads to a pod that is gone",
        fault=_stale_tcp,
        proof=("tcp ESTABLISHED src=10.40.0.10 dst=10.43.240.12",),
    ),
    Scenario(
        code="GKT-203",
        title="a flow that began before a MASQUERADE rule",
        fault=_older,
        proof=("udp src=10.40.0.10 dst=203.0.113.10", "-j MASQUERADE"),
        also=frozenset({"GKT-318"}),
    ),
    Scenario(
        code="GKT-207",
        title="eight connections through MASQUERADE --to-ports of eight",
        fault=_few_ports,
        proof=("--to-ports 50000-50007", "one of 8 entries"),
        symptom=_ninth_fails,
        also=frozenset({"GKT-206"}),
    ),
    Scenario(
        code="GKT-208",
        own=True,
        title="a NodePort's answers bypass the node that translated",
        fault=_one_sided,
        proof=("no answer seen", "answered"),
        symptom=_lopsided,
    ),
    Scenario(
        code="GKT-209",
        title="130 segments with SYN and FIN",
        fault=_invalid,
        proof=("INVALID",),
    ),
    Scenario(
        code="GKT-210",
        title="six SYNs that nobody answers",
        fault=_unanswered,
        proof=("dport=9999",),
        symptom=_knocking,
    ),
)
