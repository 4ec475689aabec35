"""The lab: the tutorial's cluster in network namespaces of one Linux machine.

`up` (lifecycle) starts one supervisor. The supervisor forks the machines: a switch, a router that
is also the tutorial's client, two external clients, and a PID 1 for each of three nodes
(nodeinit). A node's PID 1 makes the node's namespaces, forks its pods (server), and restores the
rules that a real kube-proxy wrote (rules, from tests/data/worlds). Addresses and routes are text
for `ip -batch` (network). Nothing is bound to a name of the machine: no netns name, no link and no
rule outside the lab's own namespaces, so that ending its processes ends it all (state).

Tests use `Lab` (api): `lab.exec`, `lab.connect`, `lab.hold`; a prober in each namespace they name
sends the traffic (probes, prober).
"""

from __future__ import annotations

from e2e.netlab.api import Lab, Probe
from e2e.netlab.errors import LabError
from e2e.netlab.probes import Hold, Result

__all__ = ["Hold", "Lab", "LabError", "Probe", "Result"]
