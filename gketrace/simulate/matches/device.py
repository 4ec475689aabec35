"""``physdev``, ``mac``, ``owner`` and ``rpfilter``.

Source: physdev_mt() in net/netfilter/xt_physdev.c, mac_mt() in xt_mac.c, owner_mt() in xt_owner.c,
rpfilter_mt() in net/ipv4/netfilter/ipt_rpfilter.c and net/ipv6/netfilter/ip6t_rpfilter.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, flags_text, integer, interval_text
from gketrace.simulate.matches.base import by_name, every, negation, only_options
from gketrace.simulate.matches.header import interface_is
from gketrace.simulate.state import NO, YES, Answer, Environment, PacketState, decide, unknown
from gketrace.snapshot import Unavailable

if TYPE_CHECKING:
    from typing import Self

__all__ = ["MacMatch", "OwnerMatch", "PhysdevMatch", "RpfilterMatch"]

_PHYSDEV: Final[Mapping[str, int]] = {
    "--physdev-in": 1,
    "--physdev-is-in": 0,
    "--physdev-out": 1,
    "--physdev-is-out": 0,
    "--physdev-is-bridged": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysdevMatch(Match):
    """``-m physdev``: the bridge ports of a packet that a bridge hands to iptables."""

    module: ClassVar[str] = "physdev"
    OPTIONS: ClassVar[Mapping[str, int]] = _PHYSDEV

    tests: tuple[tuple[str, str, bool], ...]
    """Option, interface name (or empty), negated."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        if not found:
            raise ValueError("physdev without an option")
        return cls(tests=tuple((o.name, "".join(o.args), o.negated) for o in found.values()))

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        if not (state.bridged or state.physdev_in or state.physdev_out):
            # No bridge information: true only where every option is negated.
            return decide(all(negated for _, _, negated in self.tests))
        for name, interface, negated in self.tests:
            if not self._holds(state, name, interface, negated):
                return NO
        return YES

    @staticmethod
    def _holds(state: PacketState, name: str, interface: str, negated: bool) -> bool:
        if name == "--physdev-is-in":
            return bool(state.physdev_in) is not negated
        if name in ("--physdev-is-out", "--physdev-is-bridged"):
            # The kernel takes a known output port for "is being bridged".
            return bool(state.physdev_out) is not negated
        if name == "--physdev-in":
            return not state.physdev_in or interface_is(state.physdev_in, interface) is not negated
        return bool(state.physdev_out) and interface_is(state.physdev_out, interface) is not negated

    def render(self) -> str:
        words = (
            f" {negation(negated)}{name}" + (f" {interface}" if interface else "")
            for name, interface, negated in self.tests
        )
        return "-m physdev" + "".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class MacMatch(Match):
    """``-m mac --mac-source``; packets made here have no source address yet, and those of the
    loopback device are not Ethernet: neither matches, negated or not."""

    module: ClassVar[str] = "mac"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--mac-source": 1}

    address: str
    """Lower case with colons."""
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        parts = options[0].value.replace("-", ":").split(":")
        if len(parts) != 6:
            raise ValueError(f"no MAC address: {options[0].value}")
        address = ":".join(f"{int(part, 16):02x}" for part in parts)
        return cls(address=address, negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        if state.in_iface in ("", "lo"):
            # mac_mt(): only frames of Ethernet devices, whatever is asked for.
            return NO
        if state.packet.src_mac is None:
            return unknown("the frame's source MAC address is not known")
        return decide(state.packet.src_mac == self.address, negated=self.negated)

    def render(self) -> str:
        return f"-m mac {negation(self.negated)}--mac-source {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerMatch(Match):
    """``-m owner``: whose socket sent the packet."""

    module: ClassVar[str] = "owner"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--uid-owner": 1,
        "--gid-owner": 1,
        "--socket-exists": 0,
        "--suppl-groups": 0,
    }

    uid: tuple[int, int, bool] | None = None
    """First, last, negated."""
    gid: tuple[int, int, bool] | None = None
    exists: bool | None = None
    """``--socket-exists``; False: negated; None: not asked."""
    supplementary: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        if not found:
            raise ValueError("owner without an option")
        exists = found.get("--socket-exists")
        return cls(
            uid=_id_range(found.get("--uid-owner")),
            gid=_id_range(found.get("--gid-owner")),
            exists=None if exists is None else not exists.negated,
            supplementary="--suppl-groups" in found,
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        if state.in_iface:
            # No socket: true only where every option is negated.
            asked = [self.uid[2] if self.uid else True, self.gid[2] if self.gid else True]
            return decide(all(asked) and self.exists is not True)
        if self.exists is False:
            return NO
        return every(self._ids(state))

    def _ids(self, state: PacketState) -> Iterator[Answer]:
        if self.uid is not None:
            yield _in_ids(state.uid, self.uid, "user")
        if self.gid is not None:
            answer = _in_ids(state.gid, self.gid, "group")
            if self.supplementary and answer is (YES if self.gid[2] else NO):
                answer = unknown("the sender's supplementary groups are not known")
            yield answer

    def render(self) -> str:
        text = "-m owner"
        if self.exists is not None:
            text += f" {negation(not self.exists)}--socket-exists"
        for name, ids in (("--uid-owner", self.uid), ("--gid-owner", self.gid)):
            if ids is not None:
                text += f" {negation(ids[2])}{name} {interval_text(ids[:2], '-')}"
        return text + (" --suppl-groups" if self.supplementary else "")


def _id_range(option: Option | None) -> tuple[int, int, bool] | None:
    if option is None:
        return None
    first, _, last = option.value.partition("-")
    if not first.isdigit():
        raise ValueError(f"a name of this machine's: {option.value}")
    return integer(first), integer(last or first), option.negated


def _in_ids(number: int | None, ids: tuple[int, int, bool], what: str) -> Answer:
    if number is None:
        return unknown(f"the sending {what} is not known")
    return decide(ids[0] <= number <= ids[1], negated=ids[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class RpfilterMatch(Match):
    """``-m rpfilter``: does the way back leave by the interface that the packet came in by."""

    module: ClassVar[str] = "rpfilter"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--loose": 0,
        "--validmark": 0,
        "--accept-local": 0,
        "--invert": 0,
    }

    loose: bool = False
    validmark: bool = False
    accept_local: bool = False
    inverted: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        return cls(
            loose="--loose" in found,
            validmark="--validmark" in found,
            accept_local="--accept-local" in found,
            inverted="--invert" in found,
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        passes = env.reverse_path(
            state.packet,
            state.in_iface,
            loose=self.loose,
            validmark=self.validmark,
            accept_local=self.accept_local,
        )
        if isinstance(passes, Unavailable):
            return unknown(f"reverse path: {passes.reason}")
        return decide(passes, negated=self.inverted)

    def render(self) -> str:
        return "-m rpfilter" + flags_text(
            (
                (self.loose, "--loose"),
                (self.validmark, "--validmark"),
                (self.accept_local, "--accept-local"),
                (self.inverted, "--invert"),
            )
        )
