"""The beginning of an engine that fails over, in the process that the user started: before anything of it has been started."""

from __future__ import annotations

import multiprocessing
import socket
from dataclasses import dataclass, field
from typing import Any

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.failover.cohort import begin_cohort
from gms_core.failover.config import failover_config
from gms_core.failover.front_end.api_server import open_early
from gms_core.failover.front_end.gate import bind_port
from gms_core.failover.parent_death import end_forks_with_this
from gms_sglang.arguments import Option
from gms_sglang.refused_failover import check_failover
from gms_sglang.warm_up import WarmUp


@dataclass
class Begun:
    """An engine that fails over, as its first process has begun it.

    Attributes:
        record: SGLang's options, which it resolves once, though it asks for that several times.
        option: The same, resolved.
        gms: The engine's block.
        failover: How it fails over.
        warm_up: SGLang's own, which waits for the gate.
        listener: As of `take_address`; None before that. An engine that a program uses has no server.
    """

    record: Any
    option: Option
    gms: GmsConfig
    failover: FailoverConfig
    warm_up: WarmUp = field(default_factory=WarmUp)
    listener: socket.socket | None = None

    def take_address(self) -> socket.socket:
        """The engine is going to serve HTTP: make sure that it can have its lock and its address. Idempotent.

        Returns:
            Bound to that address, at which nobody listens yet.

        Raises:
            GmsError: It cannot.
        """
        if self.listener is None:
            open_early(self.failover)
            self.listener = bind_port(str(self.option("host")), int(self.option("port")), shared=self.failover.gate == "port")
        return self.listener


_begun: Begun | None = None


def begun() -> Begun | None:
    """The engine that this process has begun; None if it does not fail over, or another process has begun it."""
    return _begun


def _begins_with(record: Any) -> bool:
    """Whether the engine of these options begins here: not in a process of the engine that asks for them again, and not twice."""
    return multiprocessing.parent_process() is None and (_begun is None or _begun.record is not record)


def forget_begun() -> None:
    """The engine that this process has begun is over: what begins now is another, which does not fail over."""
    global _begun
    _begun = None


def prepare_record(record: Any, gms: GmsConfig) -> None:
    """Before SGLang resolves its options, and may complain of some: refuse those that cannot be, and leave out its warm-up.

    The rehearsal does what that is for, and before anybody waits for an answer.

    Args:
        record: A ``ServerArgs``, as the user gave it.
        gms: The engine's block.

    Raises:
        EngineUnsupported: See `begin_failover`.
    """
    failover = failover_config(gms)
    if failover is None or not _begins_with(record):
        return
    check_failover(lambda name: getattr(record, name, None))
    if failover.rehearse:
        record.skip_server_warmup = True


def begin_failover(record: Any, option: Option, gms: GmsConfig) -> None:
    """Check that this engine can fail over, if that is wanted, and give its processes their cohort.

    Args:
        record: SGLang's options.
        option: The same, resolved.
        gms: The engine's block.

    Raises:
        EngineUnsupported: It cannot; the message says why.
    """
    global _begun
    if not _begins_with(record):
        return
    forget_begun()
    failover = failover_config(gms)
    if failover is None:
        return
    check_failover(option)
    begin_cohort("sglang")
    _end_at_once()
    end_forks_with_this()  # those that prepare images, from the first image on: they are in no cohort
    _begun = Begun(record, option, gms, failover)
    from gms_sglang.hooks import engage
    from gms_sglang.serving import HOOKS

    engage(HOOKS)


def _end_at_once() -> None:
    """SGLang would write dumps before it ends an engine that has crashed; for these it waits five seconds, in which nobody serves."""
    from sglang.srt.environ import envs

    for dump in (envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH, envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH):
        if not dump.is_set():
            dump.set(False)
