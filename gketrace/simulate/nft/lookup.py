"""Look-ups: is a key in a set, and what does a map hold for it (nft_lookup_eval)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

from gketrace.ruleset.nft import NftSet
from gketrace.simulate.nft.scene import Scene
from gketrace.simulate.nft.sets import Element, Elements, Key
from gketrace.simulate.nft.values import BREAK, Branch, NotKnown, Value, merged
from gketrace.simulate.state import SetChange

__all__ = ["Found", "as_key", "change_name", "element_key", "find_data", "find_element", "opened"]

Json: TypeAlias = Any
Found: TypeAlias = tuple[Element | str, bool]
"""An element, or the name of one that this packet made; and whether it is certain."""

_MANY: Final = 16
"""With more elements that may fit than this, which one it is is not followed."""


def change_name(scene: Scene, name: str) -> str:
    """How a set of this table is called in `PacketState.sets`, beside ipsets."""
    return f"{scene.ruleset.table} @{name}"


def element_key(key: Key) -> tuple[str, ...]:
    return tuple(str(part) for part in key)


def as_key(value: Value) -> Key:
    return value if isinstance(value, tuple) else () if value is BREAK else (value,)


def alive(element: Element, scene: Scene) -> bool:
    """False: it has expired since it was read."""
    if element.expires is None:
        return True
    return scene.ruleset.taken_at + element.expires >= scene.env.now


def changed(scene: Scene, name: str, key: Key) -> SetChange | None:
    """The last thing that this very packet did to an element."""
    if not scene.state.sets or any(isinstance(part, NotKnown) for part in key):
        return None
    wanted, of = element_key(key), change_name(scene, name)
    for change in reversed(scene.state.sets):
        if change.name == of and change.element == wanted:
            return change
    return None


def find_element(elements: Elements, key: Key, scene: Scene) -> tuple[list[Element], bool]:
    """Elements that `key` may be, and whether the answer is certain (then there is at most one)."""
    found = [e for e in elements.lookup(key) if alive(e, scene)]
    certain = not any(isinstance(part, NotKnown) for part in key)
    if not found and elements.default is not None and alive(elements.default, scene):
        return [elements.default], True
    if certain and len(found) > 1:
        # Overlapping intervals of a concatenation: the kernel takes the one that was added first,
        # which the listing does not tell.
        return found, all(e.data == found[0].data for e in found)
    return found, certain or not found


def opened(body: Json, scene: Scene, types: tuple[str, ...]) -> tuple[Elements, str, NftSet | None]:
    """The map or set that a look-up names: its elements, its name, and what it is."""
    if isinstance(body, str):
        declared, elements = scene.named_set(body)
        return elements, declared.name, declared
    return scene.anonymous(body["set"], types, is_map=True), "", None


def find_data(
    body: Json,
    scene: Scene,
    keys: tuple[Branch, ...],
    types: tuple[str, ...],
    read: Callable[[Json, NftSet | None], Value],
) -> tuple[Branch, ...]:
    """What map ``body["data"]`` holds for each key; `read` turns an element's data into a value."""
    elements, name, declared = opened(body["data"], scene, types)
    found = [b for key in keys for b in _one(key, elements, name, declared, scene, read)]
    return merged(found)


def _one(
    key: Branch,
    elements: Elements,
    name: str,
    declared: NftSet | None,
    scene: Scene,
    read: Callable[[Json, NftSet | None], Value],
) -> Iterator[Branch]:
    if key.value is BREAK:
        yield key
        return
    wanted = as_key(key.value)
    change = changed(scene, name, wanted) if name else None
    if change is not None and change.add:
        why = f"the data that this packet itself put into {name}"
        yield Branch(NotKnown(why), key.chance, key.drawn)
        return
    found, certain = find_element(elements, wanted, scene)
    if change is not None:
        found = []
    if not found:
        yield Branch(BREAK, key.chance, key.drawn)
        return
    if len(found) > _MANY:
        yield Branch(NotKnown(f"which of {len(found)} elements it is"), key.chance, key.drawn)
        return
    of = f" of map {name}" if name else ""
    for element in found:
        value = NotKnown(f"{element.gate} of element {element.text}") if element.gate else None
        yield Branch(
            read(element.data, declared) if value is None else value,
            key.chance if certain else None,
            key.drawn if certain else _unknown_of(wanted),
            f"element {element.text}{of}",
        )
        if certain:
            return
    if elements.default is None and _unknown_of(wanted):
        yield Branch(BREAK, None, _unknown_of(wanted))


def _unknown_of(key: Key) -> str:
    return "; ".join(part.reason for part in key if isinstance(part, NotKnown))
