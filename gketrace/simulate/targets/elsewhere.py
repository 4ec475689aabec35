"""Targets that hand the packet to somebody whose decision cannot be seen.

Source: tproxy_tg4() in net/netfilter/xt_TPROXY.c, nfqueue_tg() in xt_NFQUEUE.c, synproxy_tg4() in
net/ipv4/netfilter/ipt_SYNPROXY.c, ip6t_snpt_tg() in net/ipv6/netfilter/ip6t_NPT.c, hmark_tg() in
xt_HMARK.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.packet import IPAddress
from gketrace.ruleset.model import Target
from gketrace.ruleset.options import Option, integer, value_mask
from gketrace.simulate.evolve import evolve
from gketrace.simulate.matches.base import by_name
from gketrace.simulate.state import Environment, PacketState, VerdictKind
from gketrace.simulate.targets.base import Effect
from gketrace.simulate.targets.passing import PassingTarget
from gketrace.trace import StepAction

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ELSEWHERE", "ElsewhereTarget", "TproxyTarget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TproxyTarget(Target):
    """``-j TPROXY``: a local socket takes the packet as it is, or it is dropped."""

    name: ClassVar[str] = "TPROXY"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--on-port": 1, "--on-ip": 1, "--tproxy-mark": 1}

    port: int
    """0: the packet's own."""
    address: IPAddress | None
    """None or 0.0.0.0: the address of the interface."""
    value: int
    mask: int

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        if "--on-port" not in found:
            raise ValueError("TPROXY without --on-port")
        mark = found.get("--tproxy-mark")
        value, mask = value_mask(mark.value) if mark else (0, 0)
        on = found.get("--on-ip")
        return cls(
            port=integer(found["--on-port"].value, 0, 65535),
            address=ip_address(on.value) if on else None,
            value=value,
            mask=mask,
        )

    def apply(self, state: PacketState, env: Environment) -> Effect:
        mark = (state.packet.mark & ~self.mask & 0xFFFFFFFF) ^ self.value
        where = f"port {self.port}" if self.port else "the packet's own port"
        drop = Effect(
            action=StepAction.DROP,
            state=state,
            verdict=VerdictKind.DROP,
            note=f"if no transparent socket listens on {where}",
        )
        return Effect(
            action=StepAction.MARK,
            state=evolve(state, packet=evolve(state.packet, mark=mark)),
            verdict=VerdictKind.ACCEPT,
            note=f"if a transparent socket listens on {where}, it gets the packet",
            otherwise=drop,
        )

    def render(self) -> str:
        text = f"-j TPROXY --on-port {self.port}"
        if self.address is not None:
            text += f" --on-ip {self.address}"
        return text + f" --tproxy-mark {self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ElsewhereTarget(PassingTarget):
    """Base of targets after which nothing is known."""

    name: ClassVar[str] = ""
    KIND: ClassVar[VerdictKind] = VerdictKind.UNKNOWN

    def apply(self, state: PacketState, env: Environment) -> Effect:
        return Effect(action=StepAction.UNKNOWN, state=state, verdict=self.KIND, note=self.NOTE)


_LIST: Final[tuple[tuple[str, VerdictKind, str, Mapping[str, int]], ...]] = (
    (
        "CLUSTERIP",
        VerdictKind.UNKNOWN,
        "whether this node answers for the cluster's address is not known",
        {
            "--new": 0,
            "--hashmode": 1,
            "--clustermac": 1,
            "--total-nodes": 1,
            "--local-node": 1,
            "--hash-init": 1,
        },
    ),
    (
        "DNPT",
        VerdictKind.UNKNOWN,
        "IPv6 prefix translation is not modelled",
        {"--src-pfx": 1, "--dst-pfx": 1},
    ),
    (
        "HMARK",
        VerdictKind.UNKNOWN,
        "the mark is a hash of the packet",
        dict.fromkeys(
            (
                "--hmark-tuple",
                "--hmark-mod",
                "--hmark-offset",
                "--hmark-src-prefix",
                "--hmark-dst-prefix",
                "--hmark-sport-mask",
                "--hmark-dport-mask",
                "--hmark-spi-mask",
                "--hmark-sport",
                "--hmark-dport",
                "--hmark-spi",
                "--hmark-proto-mask",
                "--hmark-rnd",
            ),
            1,
        ),
    ),
    (
        "NFQUEUE",
        VerdictKind.QUEUE,
        "handed to a program in user space; what it decides is not known",
        {
            "--queue-num": 1,
            "--queue-balance": 1,
            "--queue-bypass": 0,
            "--queue-cpu-fanout": 0,
        },
    ),
    (
        "SNPT",
        VerdictKind.UNKNOWN,
        "IPv6 prefix translation is not modelled",
        {"--src-pfx": 1, "--dst-pfx": 1},
    ),
    (
        "SYNPROXY",
        VerdictKind.STOLEN,
        "the kernel answers the handshake in the receiver's place",
        {"--sack-perm": 0, "--timestamp": 0, "--wscale": 1, "--mss": 1, "--ecn": 0},
    ),
)


def _class(
    name: str, kind: VerdictKind, note: str, options: Mapping[str, int]
) -> type[ElsewhereTarget]:
    fields = {
        "__doc__": f"``-j {name}``: {note}.",
        "__module__": __name__,
        "__slots__": (),
        "name": name,
        "KIND": kind,
        "NOTE": note,
        "OPTIONS": options,
    }
    return type(f"{name.title()}Target", (ElsewhereTarget,), fields)


ELSEWHERE: Final[tuple[type[ElsewhereTarget], ...]] = tuple(_class(*row) for row in _LIST)
"""One class for each."""
