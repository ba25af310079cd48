"""The beginning of an engine that fails over, in the process that serves: before anything of it has been started."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import EngineUnsupported
from gms_core.failover.cohort import begin_cohort
from gms_core.failover.config import failover_config
from gms_core.failover.front_end.api_server import open_early
from gms_core.failover.front_end.gate import bind_port
from gms_core.failover.life_line import hold_life_line


@dataclass(frozen=True)
class Begun:
    """An engine that fails over, as this process has begun it.

    Attributes:
        gms: The engine's block.
        failover: How it fails over.
        listener: Bound to the engine's address; nobody listens there yet.
    """

    gms: GmsConfig
    failover: FailoverConfig
    listener: socket.socket

    @property
    def port(self) -> int:
        """Where clients come to."""
        return int(self.listener.getsockname()[1])


_begun: Begun | None = None


def begun() -> Begun | None:
    """The engine that this process has begun; None if it does not fail over."""
    return _begun


def wanted() -> FailoverConfig | None:
    """How engines of this process fail over, as the environment says; None if they do not.

    Raises:
        ConfigurationError: The environment has a block with a mistake.
    """
    return failover_config(GmsConfig())


def begin(failover: FailoverConfig, host: str, port: int, words: Sequence[str]) -> None:
    """Make sure that an engine can have its lock and its address, and name its cohort.

    Args:
        failover: How it fails over.
        host: Where it is to serve.
        port: As well.
        words: Of its command line.

    Raises:
        EngineUnsupported: It cannot fail over; says why.
        GmsError: The lock or the address cannot be had.
    """
    global _begun
    grpc = next((word for word in words if word.startswith("--grpc")), None)
    if grpc is not None:
        raise EngineUnsupported(f"failover: {grpc}: a server of that kind cannot be held until its engine is promoted", hint="Serve HTTP.")
    if failover.gate != "port":
        raise EngineUnsupported(
            "failover: engines of TensorRT-LLM have the gate port alone: there is no server before they are promoted",
            hint="Leave gate out. A status_address answers at all times.",
        )
    open_early(failover)
    listener = bind_port(host, port, shared=True)
    begin_cohort("tensorrt_llm")
    hold_life_line()
    _begun = Begun(GmsConfig(), failover, listener)
