"""What a process of an engine that fails over serves of it. Light: it is sent to the processes that the first one starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.failover.cohort import ApiPlace
from gms_core.failover.front_end.rehearsal import Request
from gms_sglang.arguments import Option
from gms_sglang.failover import Begun

_TOKENS = {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Part:
    """One API server's part in its engine.

    Attributes:
        place: Which of the engine's API servers this is.
        gms: The engine's block.
        failover: How it fails over.
        port_args: SGLang's ``PortArgs``.
        keys: That the app wants one of.
        requests: Of SGLang's own API, for the rehearsal.
    """

    place: ApiPlace
    gms: GmsConfig
    failover: FailoverConfig
    port_args: Any
    keys: tuple[str, ...]
    requests: tuple[Request, ...]

    def at(self, place: ApiPlace) -> Part:
        """The same for another API server."""
        return replace(self, place=place)


def part_of(engine: Begun, port_args: Any) -> Part:
    """The part of an engine's only API server.

    Args:
        engine: As this process has begun it.
        port_args: SGLang's ``PortArgs``.
    """
    return Part(ApiPlace(), engine.gms, engine.failover, port_args, _keys(engine.option), _requests(engine.option))


def _keys(option: Option) -> tuple[str, ...]:
    return tuple(key for key in (option("api_key"), option("admin_api_key")) if key)


def _requests(option: Option) -> tuple[Request, ...]:
    asked = {"input_ids": [1, 2, 3]} if option("skip_tokenizer_init") else {"text": "hello"}
    return tuple(("/generate", {**asked, "sampling_params": _TOKENS, "stream": stream}) for stream in (False, True))
