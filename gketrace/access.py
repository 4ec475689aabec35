"""Who may ask an agent for what: the names that agent, CLI and roles have in common.

An agent's calls are virtual resources of API group ``gketrace.dev``: nothing serves them, but roles
may name them, and the API server judges them (SubjectAccessReview).  A call about a pod needs its
verb on ``pods/SUB`` in the pod's namespace; one about the node, on ``nodes/SUB`` of that node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = [
    "AGENT_NAMESPACE",
    "CA_CONFIGMAP",
    "CA_KEY",
    "DEFAULT_ACCOUNT",
    "DENIED",
    "GROUP",
    "HIDDEN_HEADER",
    "METHODS",
    "NAMESPACES_HEADER",
    "CallClass",
    "Need",
    "audience",
    "server_name",
]

GROUP: Final = "gketrace.dev"
"""Of the virtual resources, and the front of every token's audience."""
AGENT_NAMESPACE: Final = "gketrace-system"
"""Where ``gketrace install`` puts everything."""
DEFAULT_ACCOUNT: Final = "gketrace-user"
"""The ServiceAccount, in the agents' namespace, that the CLI asks as unless told otherwise."""
CA_CONFIGMAP: Final = "gketrace-ca"
"""In the agents' namespace: the certificate authority of the agents' certificate."""
CA_KEY: Final = "ca.crt"
DENIED: Final = "denied: "
"""Begins what an agent says with UNAVAILABLE when it could not ask about a caller."""
NAMESPACES_HEADER: Final = "gketrace-namespaces"
"""Request metadata: the namespaces that the caller asks about, comma-separated.  Only names them:
each is checked."""
HIDDEN_HEADER: Final = "gketrace-hidden-bin"
"""Trailing metadata: one sentence in UTF-8 that says what was masked and left out."""


def audience(node: str) -> str:
    """The audience of a token for one node's agent.  Another node's agent refuses it."""
    return f"{GROUP}/nodes/{node}"


def server_name(namespace: str) -> str:
    """The DNS name in the agents' certificate, however an agent is reached."""
    return f"gketrace-agent.{namespace}.svc"


class CallClass(Enum):
    """Calls that share a bound on how many run at once."""

    QUICK = "quick"
    """Small answers from few files."""
    READ = "read"
    """Reads rules, tables or namespaces, and may take seconds."""
    FOLLOW = "follow"
    """A stream without an end of its own."""
    CAPTURE = "capture"
    CHANGE = "change"
    """Changes the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one call needs."""

    verb: str
    sub: str
    """The subresource, of ``pods`` or ``nodes`` by the call's target."""
    call_class: CallClass
    scoped: bool = False
    """Whoever lacks it on the node, but has it in some namespaces, gets the part about these."""


METHODS: Final[Mapping[str, Need]] = {
    "GetInfo": Need(verb="get", sub="info", call_class=CallClass.QUICK),
    "ResolvePod": Need(verb="get", sub="routes", call_class=CallClass.QUICK),
    "GetNetns": Need(verb="get", sub="routes", call_class=CallClass.READ),
    # All of the node and its pods at once, so there is no part of it for less.
    "Snapshot": Need(verb="get", sub="snapshot", call_class=CallClass.READ),
    "GetRules": Need(verb="get", sub="iptables", call_class=CallClass.READ),
    "ListConntrack": Need(verb="get", sub="conntrack", call_class=CallClass.READ, scoped=True),
    "FollowConntrack": Need(verb="get", sub="conntrack", call_class=CallClass.FOLLOW, scoped=True),
    "GetConntrackStats": Need(verb="get", sub="conntrack", call_class=CallClass.QUICK),
    "DeleteConntrack": Need(verb="delete", sub="conntrack", call_class=CallClass.CHANGE),
    "Walk": Need(verb="get", sub="trace", call_class=CallClass.READ, scoped=True),
    "Capture": Need(verb="create", sub="capture", call_class=CallClass.CAPTURE),
    # Only of the caller's own captures, for each of which they had the permission.
    "FinishCapture": Need(verb="create", sub="capture", call_class=CallClass.QUICK),
}
"""Every call of ``gketrace.v1alpha1.Agent``.  One that is not here is refused to everybody."""
