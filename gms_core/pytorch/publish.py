"""The writer's side: bring every storage of a module into an arena and describe what lies where."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from gms_core.errors import ManifestError, UnpopulatedModule
from gms_core.pytorch.cuda_pool import give_out, reclaim
from gms_core.pytorch.discover import Found, discover
from gms_core.pytorch.memory import Report, TensorArena, keep, names, report_on
from gms_core.pytorch.regions import Region, regions
from gms_core.pytorch.slots import SlotFilter, never
from gms_core.pytorch.state import Remembered
from gms_core.pytorch.tensors import LACKS_BYTES, bytes_on, is_empty_meta, is_unpopulated, move_storage, storage_at, why_not_shared
from gms_core.tensor_manifest import StorageRecord, TensorRecord, encode

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    """One region and where it goes."""

    region: Region
    records: tuple[TensorRecord, ...]
    shared: bool
    in_arena: bool


def publish(
    module: torch.nn.Module,
    arena: TensorArena,
    *,
    device: torch.device,
    ignore: SlotFilter = never,
    weights: SlotFilter = never,
    opaque: tuple[type, ...] = (),
    before: Remembered | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> bytes:
    """Bring every storage that a module holds into the arena, and describe all of them.

    A storage with a parameter on it, on the module's device, is shared: the module uses the arena's bytes from now on, and nothing may write to
    them once the arena is read-only. All other storages (buffers, plain attributes, CPU tensors of a module on a GPU) are private: the arena gets a
    copy for the readers, and this module keeps memory of its own. Tensor objects stay what they are: identity, class, attributes, views.

    Args:
        module: Loaded, and post-processed as far as readers are to get it. What is searched, and what is not, says `gms_core.pytorch.discover`.
        arena: Writable. What `capture` has put there already is not copied.
        device: Of the module, and of the arena.
        ignore: Slots to leave out. A reader keeps what it has there.
        weights: Slots of tensors that are shared as parameters are, though they are none.
        opaque: Classes whose objects are not searched, such as an engine's communicators: their tensors are nobody else's business.
        before: The module as it was built, so that what loading has changed besides tensors is published too, and readers can compare what they
            have built; see `gms_core.pytorch.state`.
        on_report: Gets the sums.

    Returns:
        The manifest, for the commit.

    Raises:
        UnpopulatedModule: It has no tensors, or some that are on ``meta``, lazy or freed.
        ManifestError: A tensor is of a kind that cannot be shared, or on a third device; or something else was changed that cannot be described.
        OutOfMemory: The arena cannot grow. The module is as it was, whatever was raised.
    """
    device = with_index(device)
    found = discover(module, opaque=opaque, ignore=ignore)
    found = [item for item in found if not is_empty_meta(item.tensor)]
    _check(found, device)
    changes = before.changes(module) if before is not None else ()
    parts = [_part(region, arena, device, weights) for region in regions(found)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # memory that was freed meanwhile may still be in use by work that was given to the device before
    reclaim(arena)
    missing = [part.region.size for part in parts if not part.in_arena]
    given = iter(give_out(arena, missing))
    storages = tuple(_store(part, next(given) if not part.in_arena else part.region.address - arena.base, arena, device) for part in parts)
    clones = [_clone(part) for part in parts]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for part, storage, clone in zip(parts, storages, clones, strict=True):
        _rebind(part, storage, clone, arena, device)
    report = report_on(storages, sum(missing))
    log.debug("published %s", report)
    if on_report is not None:
        on_report(report)
    return encode(storages, changes, before.built if before is not None else None)


def with_index(device: torch.device) -> torch.device:
    """The device by number, as tensors name it."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def _check(found: list[Found], device: torch.device) -> None:
    if not found:
        raise UnpopulatedModule("the module has no tensors", hint="Load it before it is published.")
    empty = [item.name for item in found if is_unpopulated(item.tensor)]
    if empty:
        raise UnpopulatedModule(f"{len(empty)} tensors have no content: {names(empty)}", hint="Load the module before it is published.")
    odd = [f"{item.name} {reason}" for item in found if (reason := why_not_shared(item.tensor))]
    if odd:
        raise ManifestError(f"tensors that cannot be shared: {names(odd)}", hint=f"Each of them: {LACKS_BYTES}.")
    away = [f"{item.name} is on {item.tensor.device}" for item in found if item.tensor.device not in (device, torch.device("cpu"))]
    if away:
        raise ManifestError(f"tensors on a device that is neither {device} nor the CPU: {names(away)}", hint="Publish a module for each device.")


def _part(region: Region, arena: TensorArena, device: torch.device, weights: SlotFilter) -> _Part:
    at_home = region.device == device
    in_arena = at_home and region.size > 0 and arena.contains(region.address, region.size)
    return _Part(region, region.records(), at_home and region.has_weight(weights), in_arena)


def _store(part: _Part, offset: int, arena: TensorArena, device: torch.device) -> StorageRecord:
    """Put the bytes into the arena, if they are not there, and describe them."""
    region = part.region
    if region.size and not part.in_arena:
        source = storage_at(region.address, region.size, region.device)
        bytes_on(storage_at(arena.base + offset, region.size, device)).copy_(bytes_on(source))
    place: Literal["arena", "cpu"] = "arena" if region.device == device else "cpu"
    return StorageRecord(offset if region.size else 0, region.size, place, part.shared, part.records)


def _clone(part: _Part) -> torch.Tensor | None:
    """Memory of this process for what is private, but lies in the arena."""
    if part.shared or not part.in_arena:
        return None
    return bytes_on(storage_at(part.region.address, part.region.size, part.region.device)).clone()


def _rebind(part: _Part, storage: StorageRecord, clone: torch.Tensor | None, arena: TensorArena, device: torch.device) -> None:
    """Let the module use the arena's bytes, or, for what is private, its own."""
    region = part.region
    if clone is not None and len(region.blocks) == 1:
        targets = [clone.untyped_storage()]
    elif clone is not None:
        keep(arena, clone)
        targets = [storage_at(clone.data_ptr() + block.address - region.address, block.size, device) for block in region.blocks]
    elif part.shared and not part.in_arena and region.size:
        targets = [storage_at(arena.base + storage.offset + block.address - region.address, block.size, device) for block in region.blocks]
    else:
        return
    for block, target in zip(region.blocks, targets, strict=True):
        before = move_storage(block.storage, block.tensors, target)
        if clone is not None:
            # PyTorch must not give these bytes to others: readers copy from them.
            keep(arena, before)
