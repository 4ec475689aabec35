"""What chains and rules made of a packet, for the next one that they cannot tell from it.

Ten endpoints are ten packets that differ in one address, and most rules behind the DNAT do not look
at it.  Once a walk has forked, each chain is run for a packet that notes what is read of it
(`gketrace.simulate.watched`).  A later packet that agrees in all that was read gets the same
result, with its own fields in it; any other one is run through the rules.  So nothing is believed:
a result is a function of the rules, of the namespace, and of what was read.

A `Recall` is of one namespace in one walk: nothing that rules ask of it changes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from gketrace.packet import Packet
from gketrace.simulate.evolve import copier
from gketrace.simulate.state import Alternative, PacketState
from gketrace.simulate.watched import Reads, Rebase, watch
from gketrace.trace import Step

__all__ = ["Memo", "Recall"]

T = TypeVar("T")
K = TypeVar("K")

_MOST: Final = 2
"""Results that are kept of one thing; what has given so many is not watched again."""

_step_of: Final = copier(Step, "before", "after")
_alternative_of: Final = copier(Alternative, "state", "steps")


class Memo(Generic[T, K]):
    """The results of one thing that is asked about packets."""

    __slots__ = ("_carry", "_keep", "_known", "_owner")

    def __init__(
        self, owner: object, keep: Callable[[T], K], carry: Callable[[K, Rebase], T]
    ) -> None:
        """`keep` makes of a result what is kept; `carry` makes the result for another state."""
        self._owner = owner
        """Kept, so that its id() stays its own."""
        self._keep, self._carry = keep, carry
        self._known: list[tuple[Reads, K]] = []

    def ask(self, state: PacketState, run: Callable[[PacketState], T]) -> T:
        """What `run` gives for `state`."""
        for reads, kept in self._known:
            if reads.agree(state):
                return self._carry(kept, Rebase(state))
        if len(self._known) >= _MOST:
            return run(state)
        watched, log = watch(state)
        kept = self._keep(run(watched))
        self._known.append((Reads(state, log), kept))
        return self._carry(kept, Rebase(state))


class Recall:
    """The memos of one namespace."""

    __slots__ = ("_chains", "_rules")

    def __init__(self) -> None:
        self._chains: dict[int, Memo[tuple[Alternative, ...], _Ways]] = {}
        self._rules: dict[int, Memo[Any, Any]] = {}

    def chain(
        self,
        owner: object,
        state: PacketState,
        run: Callable[[PacketState], tuple[Alternative, ...]],
    ) -> tuple[Alternative, ...]:
        """What `run`, which is always the same for `owner`, gives for `state`."""
        memo = self._chains.get(id(owner))
        if memo is None:
            memo = self._chains[id(owner)] = Memo(owner, _Ways, _Ways.carried)
        return memo.ask(state, run)

    def rule(
        self,
        owner: object,
        state: PacketState,
        run: Callable[[PacketState], T],
        carry: Callable[[T, Rebase], T],
    ) -> T:
        """The same for one rule of a chain; `carry` takes over what holds a state."""
        memo: Memo[T, T] | None = self._rules.get(id(owner))
        if memo is None:
            memo = self._rules[id(owner)] = Memo(owner, _same, carry)
        return memo.ask(state, run)


def _same(result: T) -> T:
    return result


class _Ways:
    """What a chain gave for a watched state, laid out to be given again for others."""

    __slots__ = ("_packets", "_ways")

    def __init__(self, found: tuple[Alternative, ...]) -> None:
        places: dict[int, int] = {}
        self._packets: list[Packet] = []
        """The packets of all steps, each once."""

        def place(packet: Packet) -> int:
            known = places.get(id(packet))
            if known is None:
                known = places[id(packet)] = len(self._packets)
                self._packets.append(packet)
            return known

        self._ways: list[tuple[Alternative, list[tuple[Step, int, int]]]] = [
            (one, [(step, place(step.before), place(step.after)) for step in one.steps])
            for one in found
        ]

    def carried(self, rebase: Rebase) -> tuple[Alternative, ...]:
        packets = [rebase.packet(packet) for packet in self._packets]
        return tuple(
            [
                _alternative_of(
                    one,
                    rebase.state(one.state),
                    tuple([_step_of(step, packets[b], packets[a]) for step, b, a in steps]),
                )
                for one, steps in self._ways
            ]
        )
