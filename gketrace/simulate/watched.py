"""Packets that note what is read of them.

What a chain makes of a packet is a function of what its rules read: a packet that agrees in those
fields, and may differ in all others, takes the same way.  `watch` gives a state whose packet and
connection note each field that is read, and keep what is changed beside them; `Reads` then tells
whether another state agrees, and `Rebase` carries the changes over to it.

They are what they stand for: subclasses whose fields are properties, so that methods, comparisons
and `dataclasses.replace` read, and note, the fields that they use.  `evolve` notes nothing: what is
copied has not been looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final, Protocol, TypeAlias

from gketrace.packet import Packet
from gketrace.simulate.evolve import COPIERS, evolve
from gketrace.simulate.state import CtInfo, PacketState

__all__ = ["Guard", "Reads", "Rebase", "note_instead", "noted", "watch"]


class Guard(Protocol):
    """A question with the same answer, which stands for the fields that were read for it."""

    def holds(self, rebase: Rebase) -> bool:
        """Whether the answer is the same for another state."""


Log: TypeAlias = "dict[str | Guard, None]"
"""The fields that were read, as paths from the state: ``packet.mark``, ``ct.state``; guards."""


def _subclass(kind: type, path: str) -> tuple[type, Callable[..., Any]]:
    """A class that stands for `kind`, and what makes one: ``make(real, log, changed)``."""
    slots = ("_watched_real", "_watched_log", "_watched_changed")

    def plain(cls: type, **values: Any) -> Any:
        # dataclasses.replace() has read all fields: what it makes is known.
        return kind(**values)

    own: dict[str, Any] = {"__slots__": slots, "__new__": plain}
    for field in fields(kind):
        if (kind, field.name) not in _PARTS:
            own[field.name] = _field(field.name, path + field.name)
    for (of, name), part in _PARTS.items():
        if of is kind:
            own[name] = part
    made = type(f"Watched{kind.__name__}", (kind,), own)
    set_real, set_log, set_changed = (vars(made)[slot].__set__ for slot in slots)
    names = frozenset(field.name for field in fields(kind))

    def make(real: Any, log: Log, changed: dict[str, Any]) -> Any:
        it: Any = object.__new__(made)
        set_real(it, real)
        set_log(it, log)
        set_changed(it, changed)
        return it

    def copy(old: Any, changes: dict[str, Any]) -> Any:
        if not names.issuperset(changes):
            raise TypeError(f"{kind.__name__} has no field {sorted(set(changes) - names)}")
        changed = {**old._watched_changed, **changes}
        return make(old._watched_real, old._watched_log, changed)

    COPIERS[made] = copy
    return made, make


def _field(name: str, path: str) -> property:
    def read(self: Any) -> Any:
        changed = self._watched_changed
        if name in changed:
            return changed[name]
        self._watched_log[path] = None
        return getattr(self._watched_real, name)

    return property(read)


def _part(name: str) -> property:
    """The packet or the connection: always among what is `changed`, a watched one at first."""
    return property(lambda self: self._watched_changed[name])


_PARTS: Final = {(PacketState, name): _part(name) for name in ("packet", "ct")}
_PACKET, _make_packet = _subclass(Packet, "packet.")
_CT, _make_ct = _subclass(CtInfo, "ct.")
_STATE, _make_state = _subclass(PacketState, "")


def watch(state: PacketState) -> tuple[PacketState, Log]:
    """A state that stands for `state`, and where it notes what is read."""
    log: Log = {}
    ct = None if state.ct is None else _make_ct(state.ct, log, {})
    parts = {"packet": _make_packet(state.packet, log, {}), "ct": ct}
    watched: PacketState = _make_state(state, log, parts)
    return watched, log


def noted(state: PacketState) -> Log | None:
    """What has been read of a watched state so far; None: it is not watched."""
    return dict(state._watched_log) if type(state) is _STATE else None  # type: ignore[attr-defined]


def note_instead(state: PacketState, before: Log, guard: Guard) -> None:
    """Takes `guard` for all that was read of a watched state since `noted` gave `before`."""
    log: Log = state._watched_log  # type: ignore[attr-defined]
    log.clear()
    log.update(before)
    log[guard] = None


class Reads:
    """What was read of a state, and what it was."""

    __slots__ = ("_guards", "_read", "_tracked", "_values", "names")

    def __init__(self, state: PacketState, log: Log) -> None:
        self.names: Final = frozenset(name for name in log if isinstance(name, str))
        self._guards = tuple(guard for guard in log if not isinstance(guard, str))
        self._tracked = state.ct is not None
        # One that every state has, so that there are always two: attrgetter then gives a tuple.
        self._read = attrgetter("hook", "hook", *self.names)
        self._values = self._read(state)

    def agree(self, state: PacketState) -> bool:
        """Whether `state` has the same in all that was read."""
        if (state.ct is not None) is not self._tracked or self._read(state) != self._values:
            return False
        if not self._guards:
            return True
        rebase = Rebase(state)
        return all(guard.holds(rebase) for guard in self._guards)


class Rebase:
    """Turns what was made of a watched state into what it is of another one."""

    __slots__ = ("_made", "_state")

    def __init__(self, state: PacketState) -> None:
        self._state = state
        self._made: dict[int, Any] = {}

    def packet(self, packet: Packet) -> Packet:
        """One object for one."""
        if type(packet) is not _PACKET:
            return packet
        return self._carried(packet, self._state.packet)  # type: ignore[no-any-return]

    def state(self, state: PacketState) -> PacketState:
        if type(state) is not _STATE:
            return state
        known = self._made.get(id(state))
        if known is None:
            changed: dict[str, Any] = dict(state._watched_changed)  # type: ignore[attr-defined]
            for name, now in (("packet", self._state.packet), ("ct", self._state.ct)):
                part = changed[name]
                if type(part) is _PACKET or type(part) is _CT:
                    changed[name] = part = self._carried(part, now)
                if part is now:
                    del changed[name]
            known = evolve(self._state, **changed) if changed else self._state
            self._made[id(state)] = known
        return known

    def _carried(self, watched: Any, now: Any) -> Any:
        known = self._made.get(id(watched))
        if known is None:
            changed = watched._watched_changed
            known = self._made[id(watched)] = evolve(now, **changed) if changed else now
        return known
