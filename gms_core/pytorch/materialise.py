"""The reader's side: let a module that was built without content use what a writer has published.

First everything is resolved and checked, then the module is changed. Parameters are bound to the arena's memory, which is read-only; whatever is
private is copied out of it. Tensor objects of the module stay what they are wherever PyTorch allows it, so that all who hold one see the content.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy

from gms_core.errors import ManifestError, UnpopulatedModule
from gms_core.pytorch.discover import Found, Steps, discover, reach
from gms_core.pytorch.manifest import decode, element
from gms_core.pytorch.memory import Report, TensorArena, check_inside, names, report_on
from gms_core.pytorch.publish import with_index
from gms_core.pytorch.regions import regions
from gms_core.pytorch.slots import MISSING, SlotFilter, never, read, write
from gms_core.pytorch.tensors import bytes_on, dressed_as, has_overlap, is_empty_meta, is_unpopulated, storage_at, tensor_on, why_not_shared
from gms_core.tensor_manifest import Slot, StorageRecord, TensorRecord

_CHANGES = "allow_changes=True takes over what the writer's engine changed after loading; rebuilt= names slots that this engine builds itself."


@dataclass(slots=True)
class _Plan:
    """One tensor to install.

    Attributes:
        target: The object of this module that becomes it, or None.
        slots: Where it goes.
        value: A plain tensor on its final memory; for a copy into the target's own memory, on the arena's.
        into_target: Whether the content is copied into the memory that the target has.
    """

    record: TensorRecord
    target: torch.Tensor | None
    slots: list[Slot]
    value: torch.Tensor
    into_target: bool


def materialise(
    module: torch.nn.Module,
    manifest: bytes,
    arena: TensorArena,
    *,
    device: torch.device,
    rebuilt: SlotFilter = never,
    opaque: tuple[type, ...] = (),
    allow_changes: bool = False,
) -> Report:
    """Install published tensors into a module.

    It may be called again for the same module, for example after an engine's post-processing has made slots that were not there before.

    Args:
        module: Built as the writer's was, on ``meta`` or with content of its own, which is overwritten.
        manifest: As `publish` wrote it.
        arena: Where the published memory is mapped, read-only or not.
        device: Of the module, and of the arena.
        rebuilt: Names the slots that the engine builds, or removes, by itself: it is no error if one of them is on one side only.
        opaque: Classes whose objects are not searched, as for `publish`.
        allow_changes: Whether parameters and buffers may be there that this module lacks (they are registered), and tensors may have another shape or
            dtype than here, because the writer's engine has processed them.

    Returns:
        What was installed.

    Raises:
        ManifestError: The manifest is damaged, does not fit the arena, or does not fit the module. The module is as it was.
        UnpopulatedModule: Parameters, or tensors on ``meta``, would be left without content; names them. The module is as it was.
    """
    device = with_index(device)
    storages = decode(manifest)
    check_inside(arena, storages)
    found = discover(module, opaque=opaque)
    slots = _resolve(module, storages, rebuilt, opaque, allow_changes=allow_changes)
    covered = {slot.steps for kept in slots.values() for slot in kept}
    _check_leftover(found, covered, rebuilt)
    plans = _plan(module, storages, slots, _alone(found), arena, device)
    other_slots = {id(item.tensor): [slot for slot in item.slots if slot.steps not in covered] for item in found}
    copied = sum(storage.size for storage in storages if not storage.shared)
    with torch.no_grad():
        for plan in plans:
            _install(module, plan, other_slots)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    check_no_meta(module, ignore=rebuilt, opaque=opaque)
    return report_on(storages, copied)


def check_no_meta(module: torch.nn.Module, *, ignore: SlotFilter = never, opaque: tuple[type, ...] = ()) -> None:
    """Refuse a module with tensors that have elements but no content.

    Args:
        module: To be searched as `publish` does.
        ignore: Slots that do not matter.
        opaque: Classes whose objects are not searched.

    Raises:
        UnpopulatedModule: Names them.
    """
    _refuse_empty([item.name for item in discover(module, opaque=opaque, ignore=ignore) if is_unpopulated(item.tensor)])


def _refuse_empty(left: list[str]) -> None:
    if left:
        raise UnpopulatedModule(
            f"{len(left)} tensors would be left without content: {names(left)}",
            hint="The writer published none for them: both sides have to build the same module; rebuilt= names slots that this engine builds itself.",
        )


def _resolve(
    module: torch.nn.Module, storages: tuple[StorageRecord, ...], rebuilt: SlotFilter, opaque: tuple[type, ...], *, allow_changes: bool
) -> dict[Steps, list[Slot]]:
    """Which slots of each tensor are installed, by the steps of its first slot."""
    kept: dict[Steps, list[Slot]] = {}
    missing, unlike = [], []
    for record in (tensor for storage in storages for tensor in storage.tensors):
        here = kept.setdefault(record.slots[0].steps, [])
        for slot in record.slots:
            value = reach(module, slot.steps, opaque)
            if not _has_place(module, slot, value, allow_changes=allow_changes):
                if not rebuilt(slot):
                    missing.append(f"{slot} (here a {type(value).__name__})" if _is_occupied(value) else str(slot))
                continue
            difference = _difference(record, value)
            if difference and not allow_changes:
                if not rebuilt(slot):
                    unlike.append(f"{slot} {difference}")
                continue
            here.append(slot)
    if missing:
        raise ManifestError(f"{len(missing)} published slots have no place in this module: {names(missing)}", hint=_CHANGES)
    if unlike:
        raise ManifestError(f"{len(unlike)} published tensors differ from this module's: {names(unlike)}", hint=_CHANGES)
    return kept


def _is_occupied(value: object) -> bool:
    return value is not MISSING and value is not None and not isinstance(value, torch.Tensor)


def _has_place(module: torch.nn.Module, slot: Slot, value: object, *, allow_changes: bool) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if _is_occupied(value):
        return False
    if slot.steps[-1].kind in ("parameter", "buffer"):
        return allow_changes and isinstance(read(module, slot.steps[:-1]), torch.nn.Module)
    return value is None


def _difference(record: TensorRecord, value: object) -> str | None:
    if not isinstance(value, torch.Tensor):
        return None
    if is_lazy(value):
        return "is a lazy parameter here"
    if tuple(value.shape) != record.shape or value.dtype != element(record):
        return f"is {record.dtype}{list(record.shape)} and here {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return None


def _check_leftover(found: list[Found], covered: set[Steps], rebuilt: SlotFilter) -> None:
    left = []
    for item in found:
        wanted = is_unpopulated(item.tensor) or (isinstance(item.tensor, torch.nn.Parameter) and item.tensor.numel() > 0)
        if wanted and not any(slot.steps in covered or rebuilt(slot) for slot in item.slots):
            left.append(item.name)
    _refuse_empty(left)


def _alone(found: list[Found]) -> set[int]:
    """The tensors, by identity, that share their memory with no other."""
    real = [item for item in found if not is_unpopulated(item.tensor) and not is_empty_meta(item.tensor) and why_not_shared(item.tensor) is None]
    return {id(block.found[0].tensor) for region in regions(real) for block in region.blocks if len(region.blocks) == len(block.found) == 1}


def _plan(
    module: torch.nn.Module,
    storages: tuple[StorageRecord, ...],
    slots: dict[Steps, list[Slot]],
    alone: set[int],
    arena: TensorArena,
    device: torch.device,
) -> list[_Plan]:
    plans: list[_Plan] = []
    claimed: set[int] = set()
    for storage in storages:
        published = storage_at(arena.base + storage.offset, storage.size, device)
        wanted = [(record, slots[record.slots[0].steps]) for record in storage.tensors if slots[record.slots[0].steps]]
        targets = [_target(module, record, here, claimed) for record, here in wanted]
        if storage.shared or not wanted:
            memory, into_target = published, False
        elif len(wanted) == 1 and id(targets[0]) in alone and _can_take(targets[0], wanted[0][0], storage, arena, device):
            memory, into_target = published, True
        else:
            source = bytes_on(published)
            memory, into_target = (source.clone() if storage.place == "arena" else source.cpu().clone()).untyped_storage(), False
        for (record, here), target in zip(wanted, targets, strict=True):
            plans.append(_Plan(record, target, here, _tensor(record, memory), into_target))
    return plans


def _tensor(record: TensorRecord, memory: object) -> torch.Tensor:
    try:
        return tensor_on(memory, element(record), record.offset, record.shape, record.stride)
    except RuntimeError as error:
        raise ManifestError(f"the tensor manifest is damaged: {record.name}: {error}", hint="Publish again.") from error


def _target(module: torch.nn.Module, record: TensorRecord, slots: list[Slot], claimed: set[int]) -> torch.Tensor | None:
    """The object here that becomes a published tensor; each object becomes at most one."""
    here = [value for slot in slots if isinstance(value := read(module, slot.steps), torch.Tensor) and id(value) not in claimed]
    alike = [value for value in here if isinstance(value, torch.nn.Parameter) == record.parameter and not is_lazy(value)]
    if not alike:
        return None
    claimed.add(id(alike[0]))
    return alike[0]


def _can_take(target: torch.Tensor | None, record: TensorRecord, storage: StorageRecord, arena: TensorArena, device: torch.device) -> bool:
    """Whether a target has memory of its own that the content can be copied into, so that everybody who knows that memory sees it."""
    if target is None or target.numel() == 0:
        return False
    alike = (tuple(target.shape), target.stride(), target.dtype) == (record.shape, record.stride, element(record))
    at_home = target.device == (device if storage.place == "arena" else torch.device("cpu"))
    return alike and at_home and not has_overlap(target) and not arena.contains(target.data_ptr())


def _install(module: torch.nn.Module, plan: _Plan, other_slots: dict[int, list[Slot]]) -> None:
    target, record = plan.target, plan.record
    slots = list(plan.slots)
    if target is not None and plan.into_target:
        target.copy_(plan.value)
        target.requires_grad_(record.requires_grad)
        result = target
    else:
        result = dressed_as(target, plan.value, parameter=record.parameter, requires_grad=record.requires_grad)
        if target is not None:
            if _becomes(target, result):
                result = target
            else:
                slots += other_slots.get(id(target), [])
    for slot in slots:
        if read(module, slot.steps) is not result:
            write(module, slot, result)


def _becomes(target: torch.Tensor, result: torch.Tensor) -> bool:
    """Give an object the content of another one; whether PyTorch allows it."""
    try:
        if target.device.type == result.device.type:
            requires_grad = result.requires_grad
            target.requires_grad_(False)
            target.data = result.data
            target.requires_grad_(requires_grad)
        else:
            torch.utils.swap_tensors(target, result)
    except RuntimeError:
        # A view of it, or a weak reference to it, is there: whoever has those keeps what is no longer in the module.
        return False
    return True
