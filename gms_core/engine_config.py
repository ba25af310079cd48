"""The configuration block that an engine carries for GMS, in the engine's own style, under the key ``gms``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gms_core.errors import ConfigurationError


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be an absolute path: the processes of an engine have different working directories")
    return value


Seconds = Annotated[float, Field(gt=0), AfterValidator(_finite)]


class GmsConfig(BaseModel):
    """What an engine's user can say to GMS.

    Attributes:
        socket_path: Socket of the device server; None finds it in the runtime directory by the device's UUID.
        mode: ``auto`` publishes if nothing is published and attaches if something is; ``rw`` always publishes; ``ro`` only ever attaches.
        tag: Name of the pool.
        inner: The engine's own load format that reads the checkpoint when this engine publishes.
        identity: Further fields that a reader's and a writer's identity must agree in.
        acquire_timeout_s: Seconds to wait for the lease, that is, for another engine to load and publish.
        connect_timeout_s: Seconds to connect to the server.
        memory_timeout_s: Seconds to wait for memory that other processes are releasing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket_path: Annotated[Path, AfterValidator(_absolute)] | None = None
    mode: Literal["auto", "rw", "ro"] = "auto"
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "weights"
    inner: Annotated[str, Field(min_length=1)] = "auto"
    identity: dict[str, str] = {}
    acquire_timeout_s: Seconds = 1800.0
    connect_timeout_s: Seconds = 10.0
    memory_timeout_s: Seconds = 60.0


def parse_block(block: object, *, where: str) -> GmsConfig:
    """Make a `GmsConfig` of what the user wrote.

    Args:
        block: The value under the key ``gms``; None is the empty block.
        where: How the user knows the place, such as ``--model-loader-extra-config: gms``.

    Raises:
        ConfigurationError: A key is unknown or a value is wrong. The message names each of them.
    """
    if block is None:
        return GmsConfig()
    if isinstance(block, GmsConfig):
        return block
    if not isinstance(block, dict):
        raise ConfigurationError(f"{where} is a {type(block).__name__}, not a block of options", hint=_HINT)
    try:
        return GmsConfig.model_validate(block)
    except ValidationError as error:
        details = {".".join(map(str, problem["loc"])): _sentence(problem["type"], problem["msg"], problem["input"]) for problem in error.errors()}
    problems = "; ".join(f"{key}: {sentence}" for key, sentence in details.items())
    raise ConfigurationError(f"{where}: {problems}", hint=_HINT, details=details)


def _sentence(kind: str, message: str, value: object) -> str:
    if kind == "extra_forbidden":
        return "no such option"
    return f"{message.removeprefix('Value error, ')} (got {value!r})"


_HINT = f"The options are {', '.join(GmsConfig.model_fields)}."
