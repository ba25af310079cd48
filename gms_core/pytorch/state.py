"""What a module holds besides tensors, as far as loading changes it: flags that post-processing sets, attributes that it removes, new containers.

Who loads a module remembers it as it was built, and publishes what has changed since. Who takes over what is published builds the same module, loads
nothing, and makes the same changes. What cannot be described is refused by the one who publishes: a reader would go wrong without it.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gms_core.errors import ManifestError
from gms_core.pytorch.discover import Steps
from gms_core.pytorch.holders import REGISTERED, Holder, KeptTensor, alike, as_built, holders
from gms_core.pytorch.memory import names
from gms_core.pytorch.slots import MISSING, SEQUENCES
from gms_core.tensor_manifest import Change, Gone, Hole, Items, Plain, Same, Step, Value, Word, path

_ANEW: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    torch.Size: "Size",
    collections.deque: "deque",
    set: "set",
    frozenset: "frozenset",
    dict: "dict",
}


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
        if isinstance(value, (KeptTensor, torch.Tensor)):
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
            if type(value).__members__.get(str(value.name)) is not value:
                raise _CannotTell("several flags of an enumeration in one")
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
    """A module at one moment, without its tensors.

    Attributes:
        built: What it was made of then; see `gms_core.pytorch.holders.as_built`.
    """

    def __init__(self, module: torch.nn.Module, *, opaque: tuple[type, ...] = ()) -> None:
        """Look at a module.

        Args:
            module: To be searched as `gms_core.pytorch.discover` does.
            opaque: Classes whose objects are not searched.
        """
        self._opaque = opaque
        self._module = module
        self._holders = holders(module, opaque)
        self._places = {identity: holder.steps for identity, holder in self._holders.items()}
        self.built = as_built(self._holders)

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
            if problem := _became(known, holder):
                odd.append(f"{path(known.steps) or 'the module'} ({problem})")
            for step in _differing(known, holder):
                try:
                    value = teller.content(holder.value) if step is None else teller.tell(holder.content.get(step, MISSING))
                except _CannotTell as error:
                    odd.append(f"{path((*known.steps, step) if step else known.steps)} ({error})")
                else:
                    found.append(Change(known.steps, step, value))
        found = [change for change in found if not _is_new_registration(change)]
        for change, problem in self._of_tensors(now, teller):
            if problem is None:
                found.append(change)
            else:
                odd.append(f"{change} ({problem})")
        if odd:
            raise ManifestError(
                f"loading has changed what cannot be described to others: {names(odd)}",
                hint="Numbers, strings, containers of them and of tensors, and objects that the module had before can be.",
            )
        return tuple(found)

    def _of_tensors(self, now: Mapping[int, Holder], teller: _Teller) -> Iterator[tuple[Change, str | None]]:
        """What was set on tensors, or was on their predecessors only, each with the reason why it cannot be told, or None."""
        seen: set[int] = set()
        for holder in now.values():
            known = self._holders.get(id(holder.value))
            for step, value in holder.content.items():
                if not isinstance(value, KeptTensor) or value.identity in seen:
                    continue
                seen.add(value.identity)
                before = known.content.get(step, MISSING) if known is not None else MISSING
                had = before.likeness if isinstance(before, KeptTensor) else {}
                for name in dict.fromkeys((*had, *value.likeness)):
                    if not alike(had.get(name, MISSING), value.likeness.get(name, MISSING)):
                        told, problem = _told_of_tensor(teller, value.attributes.get(name, MISSING))
                        yield Change((*holder.steps, step), Step("attribute", name), told, of_tensor=True), problem


def _told_of_tensor(teller: _Teller, attribute: Any) -> tuple[Value, str | None]:
    try:
        told = teller.tell(attribute)
    except _CannotTell as error:
        return Gone(), str(error)
    return told, "a new tensor" if _has_hole(told) else None


def _has_hole(value: Value) -> bool:
    return isinstance(value, Hole) or (isinstance(value, Items) and any(map(_has_hole, value.items)))


def _became(known: Holder, holder: Holder) -> str | None:
    """What has become of a holder that no reader can be told."""
    if holder.kind is not known.kind:
        return f"a {known.kind.__qualname__} that has become a {holder.kind.__qualname__}"
    return "other hooks than before" if holder.hooks != known.hooks else None


def _differing(known: Holder, holder: Holder) -> list[Step | None]:
    """Slots that have something else now; None if that is a container, of which all is told."""
    steps = dict.fromkeys((*known.content, *holder.content))
    differing = [step for step in steps if not alike(known.content.get(step, MISSING), holder.content.get(step, MISSING))]
    return [None] if differing and isinstance(holder.value, (dict, set, *SEQUENCES)) else [*differing]


def _is_new_registration(change: Change) -> bool:
    """Parameters and buffers are registered with their tensors."""
    return isinstance(change.value, Hole) and change.step is not None and change.step.kind in REGISTERED
