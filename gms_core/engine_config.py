"""The configuration block that an engine carries for GMS, in the engine's own style, under the key ``gms``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gms_core.errors import ConfigurationError
from gms_core.failover.elector.address import parse as parse_store_address

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be an absolute path: the processes of an engine have different working directories")
    return value


def _name(value: str) -> str:
    if _NAME.fullmatch(value) is None:
        raise ValueError("must be 1 to 64 letters, digits, '_', '.' or '-', and begin with a letter or a digit")
    return value


def _lock(value: str) -> str:
    kind, _, where = value.partition(":")
    if kind == "gms" and _NAME.fullmatch(where):
        return value
    if kind == "flock" and where.startswith("/") and "\0" not in where:
        return value
    if kind in ("etcd", "k8s"):
        parse_store_address(value)
        return value
    raise ValueError("must be gms:NAME, flock:/ABSOLUTE/PATH, etcd://... or k8s:...")


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("must be HOST:PORT")
    return value


def _command(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("must name a program")
    return value


def _web_address(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value


AnyBlock = TypeVar("AnyBlock", bound=BaseModel)
Seconds = Annotated[float, Field(gt=0), AfterValidator(_finite)]
PoolName = Annotated[str, AfterValidator(_name)]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SECRET = frozenset({"webhook"})
"""Keys whose values may have secrets in them, and are never shown."""
_WITHOUT_VALUE = frozenset({"extra_forbidden", "model_type"})
"""What is wrong whatever the value is; that may be a block with secrets."""
_SENTENCES = {
    "extra_forbidden": "no such option",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a block of strings",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be more than 0",
    "greater_than_equal": "must not be less than 0",
    "less_than": "is too large",
    "missing": "must be given",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "model_type": "must be a block of options",
    "path_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "tuple_type": "must be a list of strings",
}
"""What is wrong with a value, by pydantic's names for it: its own sentences are about Python."""


class NodesConfig(BaseModel):
    """How the parts of an engine on several nodes know of each other; see `gms_core.failover.nodes`. The same on all of its nodes.

    Attributes:
        secret_file: File with at least 16 bytes that nobody but the engine's user may read: agents sign with it what they say.
        port: Where the agent of the first node listens, at the address at which the engine's own ranks meet. Each engine needs one of its own.
        timeout_s: Seconds of silence after which a node is lost, and the engine with it.
        patience_s: Seconds from a part's start until the agents of all nodes have to be there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    secret_file: Annotated[Path, AfterValidator(_absolute)]
    port: Annotated[int, Field(gt=0, lt=65536)]
    timeout_s: Seconds = 2.0
    patience_s: Seconds = 1800.0


class FailoverConfig(BaseModel):
    """How an engine fails over: it starts as a shadow, and serves once it is elected.

    Attributes:
        lock: What elects the primary: ``gms:NAME`` is arbitrated by the server of the device, ``flock:/PATH`` is a file that all engines of this
            host see, ``etcd://…`` and ``k8s:…`` are in stores that several nodes share (see `gms_core.failover.elector.address`). Engines with the
            same lock stand in for one another.
        gate: How a shadow is held back: ``port`` binds but does not listen, so that all engines can have the same port; ``503`` answers every
            request with that status.
        kv_tag: Name of the retained pool of KV memory.
        autonomous: Whether a shadow takes over by itself; otherwise it waits for ``gms failover promote``.
        deadline_s: Seconds without a sign of progress after which the engine counts as hung and is ended; None does not watch for that.
        promotion_timeout_s: Seconds from election to serving, after which the engine ends and the next shadow takes its turn.
        drain_timeout_s: Seconds that running requests get when an operator demotes the engine.
        alias_bytes: Bytes of the memory that all of a shadow's KV addresses share.
        bridge_bytes: About how much KV memory a promoted engine begins with while processes of the last one are still exiting; 0 to wait for
            those, None for 1 GiB, or a sixteenth of a smaller KV memory. The first engine of a pool decides, and the server keeps so much memory
            beside the pool's.
        rehearse: Whether a shadow asks itself a few requests before it stands by, so that the first one after its promotion is no slower than others.
        huge_pages: Whether an engine's processes put their own host memory into huge pages before they stand by: the kernel ends them much sooner
            then, and for that their successor waits.
        status_address: ``HOST:PORT`` where ``/gms/status`` and ``/health`` answer at all times, besides the engine's own port; None for nowhere.
        on_promoted: Command that is run once the engine serves, with ``GMS_*`` facts in its environment; None for none.
        webhook: URL to which each change of role is posted as JSON; None for none.
        nodes: For an engine whose ranks are on several nodes; None for one node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lock: Annotated[str, AfterValidator(_lock)] = "gms:primary"
    gate: Literal["port", "503"] = "port"
    kv_tag: PoolName = "kv_cache"
    autonomous: bool = True
    deadline_s: Seconds | None = None
    promotion_timeout_s: Seconds = 60.0
    drain_timeout_s: Annotated[float, Field(ge=0), AfterValidator(_finite)] = 30.0
    alias_bytes: Annotated[int, Field(gt=0)] = 256 * 2**20
    bridge_bytes: Annotated[int, Field(ge=0)] | None = None
    rehearse: bool = True
    huge_pages: bool = True
    status_address: Annotated[str, AfterValidator(_address)] | None = None
    on_promoted: Annotated[tuple[str, ...], AfterValidator(_command)] | None = None
    webhook: Annotated[str, AfterValidator(_web_address)] | None = None
    nodes: NodesConfig | None = None


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
        memory_timeout_s: Seconds to wait for memory that other processes are releasing, when the engine publishes and when it wakes up.
        failover: How the engine fails over; None if it does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket_path: Annotated[Path, AfterValidator(_absolute)] | None = None
    mode: Literal["auto", "rw", "ro"] = "auto"
    tag: PoolName = "weights"
    inner: Annotated[str, Field(min_length=1)] = "auto"
    identity: dict[str, str] = {}
    acquire_timeout_s: Seconds = 1800.0
    connect_timeout_s: Seconds = 10.0
    memory_timeout_s: Seconds = 60.0
    failover: FailoverConfig | None = None


def parse_block(block: object, *, where: str) -> GmsConfig:
    """Make a `GmsConfig` of what the user wrote.

    Args:
        block: The value under the key ``gms``; None is the empty block.
        where: How the user knows the place, such as ``--model-loader-extra-config: gms``.

    Raises:
        ConfigurationError: A key is unknown or a value is wrong. The message names each of them.
    """
    return GmsConfig() if block is None else validated(GmsConfig, block, where=where)


def validated(kind: type[AnyBlock], block: object, *, where: str, options: Iterable[str] = ()) -> AnyBlock:
    """Make a block of options of what the user wrote.

    Args:
        kind: The block's class.
        block: The block itself, or a mapping.
        where: How the user knows the place.
        options: What there is to choose from there, for the hint; empty for the keys of the block.

    Raises:
        ConfigurationError: A key is unknown or a value is wrong. The message names each of them.
    """
    hint = f"The options are {', '.join(options or kind.model_fields)}."
    if isinstance(block, kind):
        return block
    if not isinstance(block, dict):
        raise ConfigurationError(f"{where} is {_kind(block)}, not a block of options", hint=hint)
    try:
        return kind.model_validate(block)
    except ValidationError as error:
        details = {".".join(map(str, problem["loc"])): _sentence(problem) for problem in error.errors()}
    problems = "; ".join(f"{key}: {sentence}" for key, sentence in details.items())
    raise ConfigurationError(f"{where}: {problems}", hint=hint, details=details)


def _sentence(problem: ErrorDetails) -> str:
    kind = problem["type"]
    if kind == "literal_error":
        sentence = f"must be {problem['ctx']['expected']}"
    else:
        sentence = _SENTENCES.get(kind, problem["msg"].removeprefix("Value error, "))
    if kind in _WITHOUT_VALUE or not _SECRET.isdisjoint(problem["loc"]):
        return sentence
    return f"{sentence} (got {json.dumps(problem['input'], default=repr, ensure_ascii=False)})"


def _kind(value: object) -> str:
    """What a value is in JSON."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")
