from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from e2e.kubeapi.harness import until
from gketrace.errors import ExhaustedError
from gketrace_agent.access.seats import Seats


class Crowd:
    """Callers that sit until they are told to go, in the order in which they were seated."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._threads: list[threading.Thread] = []
        self._go: dict[str, threading.Event] = {}
        self.seated: list[str] = []
        self.refused: list[str] = []

    def come(self, name: str, who: str = "", *, known: bool = False) -> None:
        """Returns when the caller is in the room, seated or refused."""
        go = self._go[name] = threading.Event()
        before = self._inside()

        def run() -> None:
            try:
                with self._seats.take(who or name, known=known):
                    self.seated.append(name)
                    go.wait(20)
            except ExhaustedError:
                self.refused.append(name)

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()
        until(lambda: self._inside() > before, seconds=10)

    def _inside(self) -> int:
        waiting = len(self._seats._known) + len(self._seats._others)
        return waiting + len(self.seated) + len(self.refused)

    def go(self, name: str) -> None:
        self._go[name].set()

    def leave(self, name: str) -> None:
        """As `go`; returns when it has gone."""
        self.go(name)
        self._threads[[*self._go].index(name)].join(20)

    def end(self) -> None:
        for one in self._go.values():
            one.set()
        for thread in self._threads:
            thread.join(20)


@contextmanager
def crowd(seats: int, *, kept: int, waiting: int, seconds: float = 20.0) -> Iterator[Crowd]:
    made = Crowd(Seats(seats, kept=kept, waiting=waiting, seconds=seconds))
    try:
        yield made
    finally:
        made.end()


def _seated(found: Crowd, *names: str) -> None:
    until(lambda: len(found.seated) >= len(names), seconds=10)
    assert found.seated == list(names)


def test_some_are_kept_for_who_is_known() -> None:
    with crowd(3, kept=1, waiting=4) as found:
        for name in "abc":
            found.come(name)
        _seated(found, "a", "b")
        found.come("known", known=True)
        _seated(found, "a", "b", "known")


def test_who_is_known_comes_first() -> None:
    with crowd(1, kept=0, waiting=4) as found:
        found.come("a")
        found.come("b")
        found.come("known", known=True)
        found.go("a")
        _seated(found, "a", "known")


def test_whoever_has_asked_least_comes_next() -> None:
    with crowd(1, kept=0, waiting=8) as found:
        for name, who in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("a4", "a"), ("b", "b")):
            found.come(name, who)
        for name in ("a1", "b", "a2", "a3", "a4"):
            until(lambda name=name: found.seated[-1] == name, seconds=10)  # type: ignore[misc]
            found.go(name)
        assert found.seated == ["a1", "b", "a2", "a3", "a4"]


def test_whoever_has_most_is_turned_away() -> None:
    with crowd(1, kept=0, waiting=3) as found:
        found.come("held")
        for name, who in (("a1", "a"), ("a2", "a"), ("b", "b")):
            found.come(name, who)
        found.come("c")
        until(lambda: found.refused == ["a2"], seconds=10)
        found.come("d")
        until(lambda: found.refused == ["a2", "d"], seconds=10)


def test_the_known_have_a_room_of_their_own() -> None:
    with crowd(2, kept=1, waiting=1) as found:
        for name in "abcd":
            found.come(name)
        found.come("known", known=True)
        found.come("known too", known=True)
        _seated(found, "a", "known")
        assert sorted(found.refused) == ["c", "d"]
        found.go("known")
        _seated(found, "a", "known", "known too")


def test_nobody_waits_for_ever() -> None:
    with crowd(1, kept=0, waiting=3, seconds=0.05) as found:
        found.come("a")
        found.come("b")
        until(lambda: found.refused == ["b"], seconds=10)
        found.leave("a")
        found.come("c")
        _seated(found, "a", "c")


def test_a_seat_is_free_again_after_a_failure() -> None:
    seats = Seats(1, kept=0, waiting=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), seats.take("a", known=False):
            raise ZeroDivisionError
