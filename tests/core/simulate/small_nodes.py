"""The nodes that most tests of the walk begin with."""

from __future__ import annotations

from tests.core.simulate.nodes import Node

__all__ = ["DNAT", "bridged", "no_policies", "plain", "ptp"]


def plain() -> Node:
    """One node with an uplink and nothing else."""
    node = Node()
    node.host.link("eth0", kind="", address="10.142.0.8/24")
    node.host.route("default", dev="eth0", via="10.142.0.1")
    return node


def ptp() -> Node:
    """... and the pod ``web`` (10.40.0.6:8080) on a ptp veth."""
    node = plain()
    node.pod("web", "10.40.0.6").listen("0.0.0.0", 8080)
    node.ptp("web", "10.40.0.1")
    return node


def bridged(*, hairpin: bool = False) -> Node:
    """... or the pods ``web`` and ``near`` on a bridge, which iptables sees."""
    node = plain()
    node.host.link("cbr0", kind="bridge", address="10.40.0.1/24")
    node.host.sysctls["net.bridge.bridge-nf-call-iptables"] = "1"
    node.pod("web", "10.40.0.6").listen("0.0.0.0", 8080)
    node.bridge("web", hairpin=hairpin)
    node.pod("near", "10.40.0.9")
    node.bridge("near")
    return node


DNAT = """*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -d 10.43.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.40.0.6:8080
-A OUTPUT -d 10.43.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.40.0.6:8080
-A POSTROUTING -s 10.40.0.6/32 -d 10.40.0.6/32 -j MASQUERADE
COMMIT
"""


def no_policies(shown: list[str]) -> list[str]:
    return [line for line in shown if not line.startswith("policy accept")]
