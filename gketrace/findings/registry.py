"""Every code.  A test proves that each has a detector, a page in docs/findings and a scenario."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from gketrace.errors import NotFoundError
from gketrace.findings.model import Severity

__all__ = ["CODES", "Code", "Family", "code_of"]


class Family(Enum):
    """What a finding is about."""

    SERVICES = "Services"
    CONNECTIONS = "Connections"
    PATH = "Path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """One kind of finding."""

    code: str
    title: str
    family: Family
    severity: Severity
    """The usual one; the finding's own may differ."""


_E, _W, _I = Severity.ERROR, Severity.WARNING, Severity.INFO


def _codes(family: Family, *rows: tuple[int, Severity, str]) -> tuple[Code, ...]:
    return tuple(
        Code(code=f"GKT-{number}", title=title, family=family, severity=severity)
        for number, severity, title in rows
    )


CODES: Final = (
    *_codes(
        Family.SERVICES,
        (101, _E, "Service without endpoints"),
        (102, _E, "Service with endpoints of which none is ready"),
        (103, _I, "externalTrafficPolicy Local: nodes without an endpoint drop"),
        (104, _I, "internalTrafficPolicy Local: nodes without an endpoint drop"),
        (105, _E, "Nothing listens on the target port"),
        (106, _E, "The listener is bound to the loopback only"),
        (107, _E, "A named target port that no pod has"),
        (108, _I, "Source ranges keep clients out"),
        (109, _E, "A NodePort and a hostPort are the same"),
        (110, _E, "kube-proxy is behind: endpoints are missing in a node's rules"),
        (111, _E, "kube-proxy is behind: a node's rules lead to endpoints that are gone"),
        (112, _E, "kube-proxy's rules are not on a node"),
        (113, _W, "kube-proxy's canary chain is gone: somebody flushed its rules"),
        (114, _W, "kube-proxy does not serve its health port"),
        (115, _W, "Rules in both backends of iptables"),
        (116, _W, "A load balancer's health check cannot succeed"),
        (117, _E, "Session affinity pins clients to a dead endpoint"),
        (118, _I, "The kubelet's canary chain is not there"),
        (119, _E, "Somebody else takes a Service's connections"),
    ),
    *_codes(
        Family.CONNECTIONS,
        (201, _E, "A stale UDP entry leads to an endpoint that is gone"),
        (202, _W, "A stale TCP entry leads to an endpoint that is gone"),
        (203, _W, "A connection is older than the rule that would now apply to it"),
        (204, _W, "The connection-tracking table is nearly full"),
        (205, _E, "The connection-tracking table is full"),
        (206, _W, "Connection-tracking entries fail to be inserted"),
        (207, _W, "Ports for source translation run out"),
        (208, _E, "One-sided connections: the answers take another way"),
        (209, _W, "Packets are dropped as INVALID"),
        (210, _W, "Connections to one place are not answered"),
    ),
    *_codes(
        Family.PATH,
        (301, _E, "Forwarding is off"),
        (302, _E, "The policy of a base chain drops"),
        (303, _E, "A rule drops or rejects"),
        (304, _E, "The reverse-path filter drops"),
        (305, _E, "A route is missing"),
        (306, _E, "A route leads the wrong way"),
        (308, _E, "A policy rule bypasses the route"),
        (309, _E, "A stale route for a single address"),
        (310, _E, "A local route covers the pod range"),
        (311, _E, "Two pods have one address"),
        (312, _E, "A neighbour does not answer"),
        (313, _E, "A link or bridge port is down"),
        (314, _E, "Bridged packets bypass the rules"),
        (315, _E, "Hairpin is off: a pod cannot reach itself through its Service"),
        (316, _W, "The MTU is smaller along the path"),
        (317, _E, "Path MTU black hole"),
        (318, _E, "Masquerading is missing"),
        (319, _W, "Masquerading is too wide"),
        (320, _E, "NodeLocal DNS is bypassed or does not answer"),
        (321, _E, "A NetworkPolicy drops"),
        (322, _I, "Rules inside a pod"),
        (323, _I, "Dataplane V2: the kernel's rules do not decide"),
        (324, _I, "A gVisor sandbox: its sockets are not visible"),
        (325, _I, "An endpoint uses its node's network"),
    ),
)

_BY_CODE: Final = {one.code: one for one in CODES}


def code_of(text: str) -> Code:
    """``GKT-101``, ``gkt101`` or ``101`` → the code.  Raises `NotFoundError`."""
    digits = "".join(c for c in text if c.isdigit())
    found = _BY_CODE.get(f"GKT-{digits}")
    if found is None or not text.upper().replace("-", "").replace("GKT", "").isdigit():
        raise NotFoundError(
            f"there is no finding {text!r}", hint="gketrace explain without a code lists them all"
        )
    return found
