"""DNAT, SNAT, MASQUERADE, REDIRECT and NETMAP.

They only say what is asked for (`NatRequest`); the walk carries it out, as nf_nat_setup_info() and
the nat hooks do.  Source: net/netfilter/xt_nat.c, xt_MASQUERADE.c, xt_REDIRECT.c, xt_NETMAP.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, ClassVar

from gketrace.packet import IPAddress
from gketrace.ruleset.model import Target
from gketrace.ruleset.options import Option, flags_text, integer
from gketrace.simulate.matches.base import by_name
from gketrace.simulate.matches.header import masked_address, masked_text
from gketrace.simulate.state import Environment, NatRequest, PacketState, VerdictKind
from gketrace.simulate.targets.base import Effect
from gketrace.trace import Hook, StepAction

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DnatTarget", "MasqueradeTarget", "NetmapTarget", "RedirectTarget", "SnatTarget"]


def _accept(state: PacketState, nat: NatRequest, note: str) -> Effect:
    return Effect(
        action=StepAction.ACCEPT, state=state, verdict=VerdictKind.ACCEPT, nat=nat, note=note
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NatRange:
    """``ADDRESS[-ADDRESS][:PORT[-PORT[/BASE]]]``; IPv6 addresses with ports in brackets, a range
    in one pair of them."""

    addresses: tuple[IPAddress, IPAddress] | None
    ports: tuple[int, int] | None
    base: int | None

    @classmethod
    def parse(cls, text: str, family: int) -> NatRange:
        hosts, ports = text, ""
        if family == 4:
            hosts, _, ports = text.partition(":")
        elif "]:" in text:
            hosts, _, ports = text.rpartition("]:")
            hosts += "]"
        elif text.startswith(":") and not text.startswith("::"):
            hosts, ports = "", text[1:]
        addresses = None
        if hosts:
            low, _, high = hosts.replace("[", "").replace("]", "").partition("-")
            first, last = ip_address(low), ip_address(high or low)
            if first.version != family or last.version != family:
                raise ValueError(f"{hosts} is not IPv{family}")
            addresses = (first, last)
        pair, base = None, None
        if ports:
            span, slash, shifted = ports.partition("/")
            low, _, high = span.partition("-")
            pair = (integer(low, 0, 65535), integer(high or low, 0, 65535))
            base = integer(shifted, 0, 65535) if slash else None
        if addresses is None and pair is None:
            raise ValueError(f"neither address nor port: {text!r}")
        return cls(addresses=addresses, ports=pair, base=base)

    def __str__(self) -> str:
        text = ""
        if self.addresses is not None:
            first, last = self.addresses
            brackets = first.version == 6 and self.ports is not None
            text = str(first) if first == last else f"{first}-{last}"
            text = f"[{text}]" if brackets else text
        if self.ports is not None:
            text += f":{_ports_text(self.ports)}"
            text += "" if self.base is None else f"/{self.base}"
        return text


def _ports_text(ports: tuple[int, int]) -> str:
    return f"{ports[0]}" if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"


def _parse_ports(option: Option | None) -> tuple[int, int] | None:
    if option is None:
        return None
    low, _, high = option.value.partition("-")
    return integer(low, 0, 65535), integer(high or low, 0, 65535)


@dataclass(frozen=True, slots=True, kw_only=True)
class DnatTarget(Target):
    """``-j DNAT --to-destination``."""

    name: ClassVar[str] = "DNAT"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--to-destination": 1, "--random": 0, "--persistent": 0}

    to: NatRange
    random: bool = False
    persistent: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        if "--to-destination" not in found:
            raise ValueError("DNAT without --to-destination")
        return cls(
            to=NatRange.parse(found["--to-destination"].value, family),
            random="--random" in found,
            persistent="--persistent" in found,
        )

    def apply(self, state: PacketState, env: Environment) -> Effect:
        request = NatRequest(
            source=False,
            addresses=self.to.addresses,
            ports=self.to.ports,
            base_port=self.to.base,
            random=self.random,
            persistent=self.persistent,
        )
        return _accept(state, request, f"destination to {self.to}")

    def render(self) -> str:
        flags = ((self.random, "--random"), (self.persistent, "--persistent"))
        return f"-j DNAT --to-destination {self.to}" + flags_text(flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnatTarget(Target):
    """``-j SNAT --to-source``."""

    name: ClassVar[str] = "SNAT"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--to-source": 1,
        "--random": 0,
        "--random-fully": 0,
        "--persistent": 0,
    }

    to: NatRange
    random: bool = False
    random_fully: bool = False
    persistent: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        if "--to-source" not in found:
            raise ValueError("SNAT without --to-source")
        return cls(
            to=NatRange.parse(found["--to-source"].value, family),
            random="--random" in found,
            random_fully="--random-fully" in found,
            persistent="--persistent" in found,
        )

    def apply(self, state: PacketState, env: Environment) -> Effect:
        request = NatRequest(
            source=True,
            addresses=self.to.addresses,
            ports=self.to.ports,
            base_port=self.to.base,
            random=self.random,
            random_fully=self.random_fully,
            persistent=self.persistent,
        )
        return _accept(state, request, f"source to {self.to}")

    def render(self) -> str:
        return f"-j SNAT --to-source {self.to}" + flags_text(
            (
                (self.random, "--random"),
                (self.random_fully, "--random-fully"),
                (self.persistent, "--persistent"),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MasqueradeTarget(Target):
    """``-j MASQUERADE``."""

    name: ClassVar[str] = "MASQUERADE"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--to-ports": 1, "--random": 0, "--random-fully": 0}

    ports: tuple[int, int] | None = None
    random: bool = False
    random_fully: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        return cls(
            ports=_parse_ports(found.get("--to-ports")),
            random="--random" in found,
            random_fully="--random-fully" in found,
        )

    def apply(self, state: PacketState, env: Environment) -> Effect:
        request = NatRequest(
            source=True,
            masquerade=True,
            ports=self.ports,
            random=self.random,
            random_fully=self.random_fully,
        )
        return _accept(state, request, "source to the address of the output interface")

    def render(self) -> str:
        ports = "" if self.ports is None else f" --to-ports {_ports_text(self.ports)}"
        flags = ((self.random, "--random"), (self.random_fully, "--random-fully"))
        return f"-j MASQUERADE{ports}" + flags_text(flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedirectTarget(Target):
    """``-j REDIRECT``."""

    name: ClassVar[str] = "REDIRECT"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--to-ports": 1, "--random": 0}

    ports: tuple[int, int] | None = None
    random: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        return cls(ports=_parse_ports(found.get("--to-ports")), random="--random" in found)

    def apply(self, state: PacketState, env: Environment) -> Effect:
        request = NatRequest(source=False, redirect=True, ports=self.ports, random=self.random)
        return _accept(state, request, "destination to this machine")

    def render(self) -> str:
        ports = "" if self.ports is None else f" --to-ports {_ports_text(self.ports)}"
        return f"-j REDIRECT{ports}" + flags_text(((self.random, "--random"),))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetmapTarget(Target):
    """``-j NETMAP --to NETWORK``: the network part is exchanged, the host part stays."""

    name: ClassVar[str] = "NETMAP"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--to": 1}

    address: IPAddress
    mask: int

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        if "--to" not in found:
            raise ValueError("NETMAP without --to")
        address, mask = masked_address(found["--to"].value, family)
        return cls(address=address, mask=mask)

    def apply(self, state: PacketState, env: Environment) -> Effect:
        source = state.hook in (Hook.POSTROUTING, Hook.INPUT)
        request = NatRequest(
            source=source,
            netmap=True,
            addresses=(self.address, self.address),
            prefixlen=self.mask.bit_count(),
        )
        side = "source" if source else "destination"
        return _accept(state, request, f"{side} into {masked_text(self.address, self.mask)}")

    def render(self) -> str:
        return f"-j NETMAP --to {masked_text(self.address, self.mask)}"
