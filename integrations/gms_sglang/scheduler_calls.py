"""The calls of a front end to all ranks, as they arrive at each scheduler: by SGLang's remote calls, whose own answers have no value.

All ranks do their part and gather what each has to say, so that none waits for one that has failed; the first one sends it to the front end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gms_core.engine_log import log
from gms_core.errors import EngineBusy, EngineFailed, EngineUnsupported, InvalidArgument
from gms_core.failover import cohort
from gms_core.failover.front_end.engine import RankMemory
from gms_core.kv.rank import RankKv
from gms_core.pytorch.progress import DeviceProgress
from gms_patches.for_sglang import HANDLE_RPC
from gms_sglang import rest
from gms_sglang.hooks import Hook
from gms_sglang.place import all_ranks, torch_device, world
from gms_sglang.rank import this_rank
from gms_sglang.refusals import as_error, told
from gms_sglang.rpc_answers import CALL, given, send
from gms_sglang.shadow import take_place
from gms_sglang.together import Outcome, together

PREFIX = "gms_"
"""Before the name of one of `Calls` it makes the remote call of a program: there are no answers, but a refusal fails it."""


class Calls:
    """What a front end can ask of one rank. Whatever is raised is told to it.

    Args:
        scheduler: SGLang's.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._progress = DeviceProgress(torch_device())
        self._taken: RankMemory | None = None
        self._promoted = False

    def place(self) -> dict[str, Any]:
        """Where this rank computes. Called again, it takes its place in the cohort anew, if the server has been restarted.

        Raises:
            GmsError: The server is not there, or does not want this process.
        """
        return {"rank": world().rank_in_group, "socket": str(take_place())}

    def settle(self) -> None:
        """See `gms_core.failover.cohort.settle`."""
        cohort.settle(f"rank {world().rank_in_group}")

    def rehearse(self, *, wanted: bool) -> None:
        """See `gms_core.kv.rank.RankKv.rehearse`."""
        self._kv().rehearse(wanted)

    def forget(self) -> bool:
        """Forget what requests have left in the cache; returns whether that is done: not while one of them is under way."""
        return bool(self._scheduler.flush_cache())

    def stand_by(self) -> tuple[int, str]:
        """See `gms_core.kv.rank.RankKv.stand_by`. From here on this rank's scheduler rests."""
        if self._taken is None:
            rest.begin(self._scheduler)
        return self._kv().stand_by()

    def promote(self, *, timeout_s: float) -> dict[str, Any]:
        """Wait until no other engine can touch the KV memory, and map it in the place of the scratch memory. Idempotent.

        Args:
            timeout_s: Seconds to wait at most.

        Returns:
            The fields of `RankMemory`.

        Raises:
            EngineBusy: A request is under way, on scratch memory.
            GmsError: See `gms_core.kv.rank.RankKv.promote`.
        """
        kv = self._kv()
        if self._taken is None and not self._scheduler.is_fully_idle():
            raise EngineBusy("a rehearsal is still under way", hint="End it before the promotion.")
        taken = kv.promote(timeout_s)
        if self._taken is None:
            self._forget_scratch()
            rest.end(self._scheduler)
            self._taken = RankMemory(kv.planning.rank, taken.epoch, taken.bytes, taken.hold_s, taken.map_s)
        return self._taken._asdict()

    def beat(self) -> bool:
        """Whether this rank makes progress: it answers, and its device has done what it was given before the last beat."""
        if torch_device().type != "cuda":
            return self._progress.made()
        with torch.cuda.stream(self._scheduler.forward_stream):
            return self._progress.made()

    def unfinished(self) -> int:
        """Requests that are still running or waiting in this rank."""
        if self._scheduler.is_fully_idle():
            return 0
        return max(1, len(self._scheduler.running_batch.reqs) + len(self._scheduler.waiting_queue))

    def _park(self) -> None:
        """Another rank could not be promoted, so this one must not compute either, unless all have been promoted before."""
        if not self._promoted and (kv := this_rank().kv) is not None:
            kv.park()

    def _forget_scratch(self) -> None:
        """Nothing that was computed on scratch may be found again: neither tokens nor where they were."""
        self._scheduler.req_to_token_pool.req_to_token.zero_()
        if not self._scheduler.flush_cache(empty_cache=False):  # giving cached memory back takes up to a second, and clients wait
            raise EngineFailed("SGLang has not forgotten what was computed on scratch memory", hint="Its log says why. Start this engine again.")

    @staticmethod
    def _kv() -> RankKv:
        kv = this_rank().kv
        if kv is None:
            raise EngineUnsupported("this engine does not fail over", hint="Put failover into the block gms of --model-loader-extra-config.")
        return kv


METHODS = frozenset(name for name in vars(Calls) if not name.startswith("_"))


def _handle(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Answer a remote call of ours; SGLang has the others."""
    from sglang.srt.managers.io_struct import RpcReqOutput

    method, parameters = request.method, request.parameters or {}
    failure = ""
    try:
        if method == CALL:
            _answer(scheduler, **parameters)
        elif method.startswith(PREFIX) and method.removeprefix(PREFIX) in METHODS:
            answers = _gathered(scheduler, method.removeprefix(PREFIX), parameters)
            failure = next((str(as_error(one["error"])) for one in answers if "error" in one), "")
        else:
            return original(scheduler, request)
    except Exception as error:  # noqa: BLE001 - an error would end the scheduler
        failure = str(as_error(told(error)))
    return RpcReqOutput(success=not failure, message=failure)


def _answer(scheduler: Any, method: str, arguments: str, answer_to: str) -> None:
    """Do what a front end asks, on all ranks, and tell it their answers; the parameters are as of `gms_sglang.rpc_answers.parameters`."""
    found, call = given(arguments)
    answers = _gathered(scheduler, method, found)
    if world().rank_in_group == 0:
        try:
            send(answer_to, call, answers)
        except OSError as error:
            log().warning("the front end was not told an answer: %s", error)


def _gathered(scheduler: Any, method: str, arguments: dict[str, Any]) -> list[Outcome]:
    calls, ranks = _calls_of(scheduler), all_ranks()

    def step() -> Any:
        if method not in METHODS:
            raise InvalidArgument(f"there is no call {method!r}", hint=f"Calls are {', '.join(sorted(METHODS))}.")
        return getattr(calls, method)(**arguments)

    def gather(mine: Outcome) -> list[Outcome]:
        return [mine] if ranks is None else list(ranks.all_gather_object(mine))

    if method != "promote":
        return together(step, gather, lambda: None)
    outcomes = together(step, gather, calls._park)  # noqa: SLF001 - no call of a front end
    calls._promoted = calls._promoted or not any("error" in one for one in outcomes)  # noqa: SLF001 - as above
    return outcomes


def _calls_of(scheduler: Any) -> Calls:
    found: Calls | None = getattr(scheduler, "_gms_calls", None)
    if found is None:
        found = scheduler._gms_calls = Calls(scheduler)  # noqa: SLF001 - a name that nobody else has
    return found


HOOKS = (Hook(HANDLE_RPC, "around", _handle),)
