"""What a module holds besides tensors, as far as loading changes it: flags that post-processing sets, attributes that it removes, new containers.

Who loads a module remembers it as it was built, and publishes what has changed since. Who takes over what is published builds the same module, loads
nothing, and makes the same changes. What cannot be described is refused by the one who publishes: a reader would go wrong without it.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gms_core.errors import ManifestError
from gms_core.pytorch.discover import INTERNAL, LEAVES, Steps, is_closed
from gms_core.pytorch.memory import names
from gms_core.pytorch.slots import MISSING, SEQUENCES, attributes, key_step
from gms_core.tensor_manifest import Change, Gone, Hole, Items, Plain, Same, Step, Value, Word, path

_INSIDE = Step("attribute", "inside")
"""Stands for all that is in a set."""
_REGISTERED = ("parameter", "buffer", "module")
_ANEW: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    torch.Size: "Size",
    collections.deque: "deque",
    set: "set",
    frozenset: "frozenset",
    dict: "dict",
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """That a tensor was there, with its plain attributes, and without keeping its memory."""

    identity: int
    attributes: Mapping[str, object]


@dataclass(slots=True)
class Holder:
    """A module, a container or another object, and what was in it."""

    value: Any
    steps: Steps
    content: dict[Step, Any]


class _CannotTell(Exception):
    """Stays inside of this module."""


class _Teller:
    """Describes what is new."""

    def __init__(self, places: Mapping[int, Steps]) -> None:
        self._places = places
        self._above: set[int] = set()
        self._with_tensors: set[int] = set()

    def tell(self, value: Any) -> Value:
        if value is MISSING:
            return Gone()
        if isinstance(value, (_Tensor, torch.Tensor)):
            return Hole()
        if value is None or type(value) in (bool, int, float, str):
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise _CannotTell("a number of more than 64 bits")
            return Plain(value)
        if isinstance(value, torch.dtype):
            return Word("dtype", str(value).removeprefix("torch."))
        if isinstance(value, torch.device):
            return Word("device", value.type)
        if isinstance(value, enum.Enum):
            return Word("enum", f"{type(value).__module__}:{type(value).__qualname__}:{value.name}")
        if id(value) in self._places:
            return Same(self._places[id(value)])
        return self.content(value)

    def content(self, value: Any) -> Items:
        """All that is in a container."""
        known = id(value) in self._places
        kind = next((name for base, name in _ANEW.items() if (isinstance(value, base) if known else type(value) is base)), None)
        if kind is None:
            raise _CannotTell(f"a new {type(value).__module__}.{type(value).__qualname__}")
        if id(value) in self._above:
            raise _CannotTell("it contains itself")
        if id(value) in self._with_tensors:
            raise _CannotTell("tensors in a container that is in two places")
        parts = [part for item in value.items() for part in item] if kind == "dict" else list(value)
        self._above.add(id(value))
        try:
            items = Items(kind, tuple(map(self.tell, parts)))  # type: ignore[arg-type]
        finally:
            self._above.remove(id(value))
        if not known and any(isinstance(item, Hole) for item in items.items):
            self._with_tensors.add(id(value))
        return items


class Remembered:
    """A module at one moment, without its tensors."""

    def __init__(self, module: torch.nn.Module, *, opaque: tuple[type, ...] = ()) -> None:
        """Look at a module.

        Args:
            module: To be searched as `gms_core.pytorch.discover` does.
            opaque: Classes whose objects are not searched.
        """
        self._opaque = opaque
        self._module = module
        self._holders = holders(module, opaque)
        self._places: dict[int, Steps] = {}
        for holder in self._holders.values():
            self._places.setdefault(id(holder.value), holder.steps)
            for step, value in holder.content.items():
                if not isinstance(value, _Tensor) and type(value) not in LEAVES:
                    self._places.setdefault(id(value), (*holder.steps, step))

    def changes(self, module: torch.nn.Module) -> tuple[Change, ...]:
        """What is different now.

        Args:
            module: The same one.

        Raises:
            ManifestError: It is another one, or something has become what cannot be described; names it.
        """
        if module is not self._module:
            raise ManifestError("the module that was loaded is not the one that was built", hint="Publish what the loader has built itself.")
        found: list[Change] = []
        odd: list[str] = []
        now = holders(module, self._opaque)
        teller = _Teller(self._places)
        for holder in now.values():
            known = self._holders.get(id(holder.value))
            if known is None:
                continue  # told where it hangs
            for step in _differing(known, holder):
                try:
                    value = teller.content(holder.value) if step is None else teller.tell(holder.content.get(step, MISSING))
                except _CannotTell as error:
                    odd.append(f"{path((*known.steps, step) if step else known.steps)} ({error})")
                else:
                    found.append(Change(known.steps, step, value))
        if odd:
            raise ManifestError(
                f"loading has changed what cannot be described to others: {names(odd)}",
                hint="Numbers, strings, containers of them and of tensors, and objects that the module had before can be.",
            )
        return (*(change for change in found if not _is_new_registration(change)), *self._of_tensors(now, teller))

    def _of_tensors(self, now: Mapping[int, Holder], teller: _Teller) -> Iterator[Change]:
        """Plain attributes of tensors. That a new tensor lacks some which its predecessor had is not told: nobody asks for what is not there."""
        seen: set[int] = set()
        for holder in now.values():
            known = self._holders.get(id(holder.value))
            for step, value in holder.content.items():
                if isinstance(value, _Tensor) and value.identity not in seen:
                    seen.add(value.identity)
                    before = known.content.get(step, MISSING) if known is not None else MISSING
                    had = before.attributes if isinstance(before, _Tensor) else {}
                    for name, attribute in value.attributes.items():
                        if name not in had or not _alike(had[name], attribute):
                            yield Change((*holder.steps, step), Step("attribute", name), teller.tell(attribute), of_tensor=True)


def _differing(known: Holder, holder: Holder) -> list[Step | None]:
    """Slots that have something else now; None if that is a container, of which all is told."""
    steps = dict.fromkeys((*known.content, *holder.content))
    differing = [step for step in steps if not _alike(known.content.get(step, MISSING), holder.content.get(step, MISSING))]
    return [None] if differing and isinstance(holder.value, (dict, set, *SEQUENCES)) else [*differing]


def _is_new_registration(change: Change) -> bool:
    """Parameters and buffers are registered with their tensors."""
    return isinstance(change.value, Hole) and change.step is not None and change.step.kind in _REGISTERED


def holders(module: torch.nn.Module, opaque: tuple[type, ...] = ()) -> dict[int, Holder]:
    """Everything in a module that holds something, by identity, each with the path on which it was found first."""
    found: dict[int, Holder] = {}
    waiting: list[tuple[Steps, Any]] = [((), module)]
    while waiting:
        steps, value = waiting.pop()
        if id(value) in found:
            continue
        inside = _inside(value)
        found[id(value)] = Holder(value, steps, {step: _kept(child) for step, child in inside.items()})
        children = [((*steps, step), child) for step, child in inside.items() if _is_holder(child, opaque)]
        waiting.extend(reversed(children))
    return found


def _is_holder(value: Any, opaque: tuple[type, ...]) -> bool:
    if isinstance(value, torch.Tensor):
        return False
    return isinstance(value, (torch.nn.Module, set)) or not is_closed(value, opaque)


def _inside(value: Any) -> dict[Step, Any]:
    if isinstance(value, torch.nn.Module):
        content = vars(value)
        registered = {Step(kind, name): child for kind in _REGISTERED for name, child in content[f"_{kind}s"].items()}  # type: ignore[arg-type]
        return registered | {Step("attribute", name): child for name, child in attributes(value).items() if name not in INTERNAL}
    if isinstance(value, dict):
        return {key_step(key): child for key, child in value.items()}
    if isinstance(value, SEQUENCES):
        return {Step("index", index): child for index, child in enumerate(value)}
    if isinstance(value, set):
        return {_INSIDE: frozenset(value)}
    return {Step("attribute", name): child for name, child in attributes(value).items()}


def _kept(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Tensor(id(value), {name: item for name, item in attributes(value).items() if _is_plain(item)})
    return value


def _is_plain(value: object) -> bool:
    if type(value) in (tuple, torch.Size):
        return all(_is_plain(item) for item in value)  # type: ignore[attr-defined]
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, enum.Enum))


def _alike(before: Any, now: Any) -> bool:
    """Whether a slot has what it had. What is in a container that can be changed is compared for itself."""
    if before is now or (isinstance(before, (_Tensor, torch.Tensor)) and isinstance(now, (_Tensor, torch.Tensor))):
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, tuple):
        return len(before) == len(now) and all(map(_alike, before, now))
    if isinstance(before, float):
        return bool(before == now or (before != before and now != now))
    if type(before) in LEAVES or isinstance(before, enum.Enum):
        return bool(before == now)
    return False
