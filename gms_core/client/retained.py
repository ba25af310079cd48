"""A session's use of a retained pool: its plan, its memory, and the right to be its one holder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gms_core.client.arena import Take
from gms_core.client.session import Session
from gms_core.layout import Identity
from gms_core.protocol.messages import AwaitWhole, Done, Export, Held, Hold, Plan, PlanDue, Planned, Provide, Release


class RetainedPool:
    """Memory that outlives its holder. The session's process has to have joined a cohort.

    Attributes:
        name: The pool's name.
        planned: Plan and allocations; None until they are known.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.name = name
        self.planned: Planned | None = None
        self._session = session

    def plan(self, identity: Identity, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> Planned | None:
        """The plan that this engine adopts, or None if this session has to `provide` one while others wait for it.

        Raises:
            AcquireTimeout: Another engine did not provide it in time.
            IdentityMismatch: Memory that others use is laid out for something else; the fields that differ are in ``details``.
        """
        answer = self._session.ask(Plan(self.name, identity, timeout_s), (Planned, PlanDue), timeout_s, on_wait)
        self.planned = answer if isinstance(answer, Planned) else None
        return self.planned

    def provide(self, plan: bytes, sizes: Sequence[int], timeout_s: float, *, front: Sequence[int] = ()) -> Planned:
        """Create the memory, for this engine and those that come after it.

        Args:
            plan: What they adopt.
            sizes: Bytes of each allocation, in arena order.
            timeout_s: Seconds to wait for memory that others are releasing.
            front: Indices of the allocations of which there are to be two, so that the next holder can begin with the one that this one never had.

        Raises:
            OutOfMemory: There was no room in time.
        """
        self.planned = self._session.ask(Provide(self.name, plan, tuple(sizes), timeout_s, tuple(front)), Planned, timeout_s)
        return self.planned

    def receive(self, take: Take) -> None:
        """Get the allocations, in arena order. Mapping them is for the holder alone."""
        self._session.receive_allocations(Export(self.name), take)

    def hold(self, timeout_s: float, on_wait: Callable[[str], None] | None = None, *, bridge: bool = False) -> Held:
        """Become the holder.

        Args:
            timeout_s: Seconds to wait at most.
            on_wait: Called with the reason, each time that it changes, while it waits.
            bridge: Whether the caller can begin with the front alone, and `await_whole` before it maps the rest.

        Raises:
            AcquireTimeout: The holder before has not ended in time.
            FenceFailed: It cannot be ended.
        """
        return self._session.ask(Hold(self.name, timeout_s, bridge), Held, timeout_s, on_wait)

    def await_whole(self, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> None:
        """Wait until all of the memory may be mapped.

        Raises:
            AcquireTimeout: Processes of an earlier holder were still there.
            FenceFailed: They cannot be ended.
        """
        self._session.ask(AwaitWhole(self.name, timeout_s), Done, timeout_s, on_wait)

    def release(self) -> None:
        """Give up the hold and the use of the pool.

        The caller's device has finished, and its arena has disowned the memory (`RetainedArena.disown`). To unmap it is not enough: what
        `RetainedArena.remap` maps again is another engine's by then.
        """
        self._session.perform(Release(self.name))
