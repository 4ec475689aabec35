"""MARK and CONNMARK, in every form that iptables-save prints or takes.

Source: mark_tg() in net/netfilter/xt_mark.c, connmark_tg_shift() in xt_connmark.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.ruleset.model import Target
from gketrace.ruleset.options import Option, integer, value_mask
from gketrace.simulate.evolve import evolve
from gketrace.simulate.matches.base import by_name, is_tracked
from gketrace.simulate.matches.mark import TEMPLATE_MARK
from gketrace.simulate.state import Environment, PacketState, VerdictKind
from gketrace.simulate.targets.base import Effect, pass_on
from gketrace.trace import StepAction

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ConnmarkTarget", "MarkTarget", "set_bits"]

_ALL: Final = 0xFFFFFFFF
_SETTERS: Final = ("--set-xmark", "--set-mark", "--and-mark", "--or-mark", "--xor-mark")


def set_bits(option: Option) -> tuple[int, int]:
    """Every way of saying it → (value, mask) of ``new = (old & ~mask) ^ value``."""
    if option.name == "--set-xmark":
        return value_mask(option.value)
    if option.name == "--set-mark":
        value, mask = value_mask(option.value)
        return value, mask | value
    number = integer(option.value)
    if option.name == "--and-mark":
        return 0, ~number & _ALL
    if option.name == "--or-mark":
        return number, number
    return number, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkTarget(Target):
    """``-j MARK --set-xmark VALUE/MASK``."""

    name: ClassVar[str] = "MARK"
    OPTIONS: ClassVar[Mapping[str, int]] = dict.fromkeys(_SETTERS, 1)

    value: int
    mask: int

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        if len(options) != 1:
            raise ValueError("MARK takes one option")
        value, mask = set_bits(options[0])
        return cls(value=value, mask=mask)

    def apply(self, state: PacketState, env: Environment) -> Effect:
        mark = (state.packet.mark & ~self.mask & _ALL) ^ self.value
        return Effect(
            action=StepAction.MARK, state=evolve(state, packet=evolve(state.packet, mark=mark))
        )

    def render(self) -> str:
        return f"-j MARK --set-xmark {self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnmarkTarget(Target):
    """``-j CONNMARK``: sets the connection's mark, or copies it from or to the packet's."""

    name: ClassVar[str] = "CONNMARK"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(_SETTERS, 1),
        "--save-mark": 0,
        "--restore-mark": 0,
        "--nfmask": 1,
        "--ctmask": 1,
        "--mask": 1,
        "--left-shift-mark": 1,
        "--right-shift-mark": 1,
    }

    mode: str
    """``set``, ``save`` (packet → connection) or ``restore`` (connection → packet)."""
    value: int = 0
    ctmask: int = _ALL
    nfmask: int = _ALL
    shift: int = 0
    """Bits; negative: to the right."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        setters = [found[name] for name in _SETTERS if name in found]
        modes = [name for name in ("--save-mark", "--restore-mark") if name in found]
        if len(setters) + len(modes) != 1:
            raise ValueError("CONNMARK takes one action")
        shift = 0
        if option := found.get("--left-shift-mark"):
            shift = integer(option.value, 0, 31)
        elif option := found.get("--right-shift-mark"):
            shift = -integer(option.value, 0, 31)
        if setters:
            value, mask = set_bits(setters[0])
            return cls(mode="set", value=value, ctmask=mask, shift=shift)
        both = found.get("--mask")
        nfmask = found.get("--nfmask", both)
        ctmask = found.get("--ctmask", both)
        return cls(
            mode="save" if modes[0] == "--save-mark" else "restore",
            nfmask=integer(nfmask.value) if nfmask else _ALL,
            ctmask=integer(ctmask.value) if ctmask else _ALL,
            shift=shift,
        )

    def _shifted(self, mark: int) -> int:
        return mark >> -self.shift if self.shift < 0 else mark << self.shift & _ALL

    def apply(self, state: PacketState, env: Environment) -> Effect:
        ct = state.ct
        if ct is None or not is_tracked(state):
            return pass_on(state, "the packet is not tracked: nothing is marked")
        mark = state.packet.mark
        if ct.template:
            # It is not the connection's mark: tracking takes the template away.
            if self.mode != "restore":
                return pass_on(state, "only the template of the CT target is marked")
            return Effect(
                action=StepAction.UNKNOWN,
                state=state,
                verdict=VerdictKind.UNKNOWN,
                note=f"the packet's mark is not known afterwards: {TEMPLATE_MARK}",
            )
        if self.mode == "restore":
            taken = self._shifted(ct.mark & self.ctmask)
            mark = (mark & ~self.nfmask & _ALL) ^ taken
            after = evolve(state, packet=evolve(state.packet, mark=mark))
            return Effect(action=StepAction.MARK, state=after)
        if self.mode == "save":
            new = (ct.mark & ~self.ctmask & _ALL) ^ self._shifted(mark & self.nfmask)
        else:
            new = self._shifted((ct.mark & ~self.ctmask & _ALL) ^ self.value)
        return Effect(
            action=StepAction.MARK,
            state=evolve(state, ct=evolve(ct, mark=new)),
            note=f"connection mark {ct.mark:#x} → {new:#x}",
        )

    def render(self) -> str:
        if self.mode == "set":
            text = f"-j CONNMARK --set-xmark {self.value:#x}/{self.ctmask:#x}"
        else:
            text = f"-j CONNMARK --{self.mode}-mark --nfmask {self.nfmask:#x}"
            text += f" --ctmask {self.ctmask:#x}"
        if self.shift:
            side = "left" if self.shift > 0 else "right"
            text += f" --{side}-shift-mark {abs(self.shift)}"
        return text
