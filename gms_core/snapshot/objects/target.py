"""Where a save to an object store goes. A pure record: whoever only sends it needs nothing of stores."""

from __future__ import annotations

import msgspec

from gms_core.snapshot.manifest import Shard
from gms_core.snapshot.on_disk import StagingPlan
from gms_core.snapshot.plan import WeightedRoot
from gms_core.snapshot.transfer import File


class ObjectTarget(msgspec.Struct, frozen=True, tag="objects"):
    """Where the images of a save go: all that a process has to know that saves one of them. It can be sent as JSON.

    Attributes:
        plan: Over what the save is laid out: one root.
        folder: URL of the version.
    """

    plan: StagingPlan
    folder: str

    @property
    def places(self) -> tuple[WeightedRoot, ...]:
        """The root that images are laid over."""
        return tuple(WeightedRoot(root, weight) for root, weight in self.plan.roots)

    def file(self, shard: Shard) -> File:
        """Where a shard goes."""
        return File(f"{self.folder}/{shard.path}", shard.root, shard.size)
