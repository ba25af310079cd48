"""How snapshots are saved and restored: the options of a command, and the environment where those say nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from gms_core.config import snapshot_environment
from gms_core.engine_config import validated
from gms_core.errors import ConfigurationError, InvalidArgument
from gms_core.snapshot.manifest import BLOCK_BYTES
from gms_core.snapshot.objects.urls import is_url, root_url
from gms_core.snapshot.plan import SHARD_BYTES, STRIPE_BYTES
from gms_core.snapshot.registry import DEFAULT, FOR_OBJECTS, find


def _shard(value: int) -> int:
    if value <= 0 or value % BLOCK_BYTES:
        raise ValueError(f"must be a multiple of {BLOCK_BYTES} (16 MiB)")
    return value


def _absolute(value: Path) -> Path:
    if not value.is_absolute() or "\0" in str(value):
        raise ValueError("must be an absolute path")
    return value


def _root(value: object) -> Path | str:
    """A directory, or the URL of a place in an object store.

    Raises:
        InvalidArgument: It is a URL that cannot be used; nothing of it is repeated that may be secret.
    """
    if isinstance(value, str) and is_url(value):
        return root_url(value)
    if not isinstance(value, str | Path):
        raise ValueError("must be a directory, or a URL")
    return _absolute(Path(value))


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
RootPlace = Annotated[Path | str, PlainValidator(_root)]
Threads = Annotated[int, Field(ge=0, le=1024)]


class SnapshotConfig(BaseModel):
    """How snapshots are saved and restored.

    Attributes:
        backend: What moves the bytes, by its name; empty for what suits the roots.
        save_workers: Threads that save an image; 0 for as many as suit the backend.
        load_workers: Threads that restore or verify an image; 0 for as many as suit the backend.
        shard_bytes: Of the largest file.
        roots: Directories that snapshots lie in, the one that gets the manifests first; or the URL of a place in an object store.
        control_dir: Directory of the sentinels; None for no sentinels.
        metrics_file: What it was like, for Prometheus; None for none.
        options: The backend's own, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = ""
    save_workers: Threads = 0
    load_workers: Threads = 0
    shard_bytes: Annotated[int, AfterValidator(_shard)] = SHARD_BYTES
    roots: tuple[RootPlace, ...] = ()
    control_dir: AbsolutePath | None = None
    metrics_file: AbsolutePath | None = None
    options: dict[str, str] = {}

    @property
    def objects(self) -> bool:
        """Whether the root is in an object store."""
        return any(isinstance(root, str) for root in self.roots)

    @property
    def mover(self) -> str:
        """Name of the backend: the one that was said, or that suits the roots."""
        return self.backend or (FOR_OBJECTS if self.objects else DEFAULT)

    @property
    def stripe_bytes(self) -> int:
        """Of the stripes: as long as they are by default, or what goes into a file without a rest."""
        return math.gcd(STRIPE_BYTES, self.shard_bytes)


_VARIABLES = {
    "GMS_TRANSFER_BACKEND": "backend",
    "GMS_SAVE_WORKERS": "save_workers",
    "GMS_LOAD_WORKERS": "load_workers",
    "GMS_SHARD_SIZE_BYTES": "shard_bytes",
    "GMS_CONTROL_DIR": "control_dir",
    "GMS_METRICS_FILE": "metrics_file",
}


def snapshot_config(given: Mapping[str, object] | None = None) -> SnapshotConfig:
    """The configuration.

    Args:
        given: What was said on the command line, by the names of the attributes: the environment is not asked about it. What is None, or an empty
            list, was not said.

    Raises:
        ConfigurationError: A variable, or an option, has a value that it cannot have; the message names it.
    """
    said = {key: value for key, value in (given or {}).items() if value is not None and value != ()}
    own = validated(SnapshotConfig, said, where="the options of gms snapshot")
    environment = snapshot_environment()
    found: dict[str, object] = {}
    for variable, key in _VARIABLES.items():
        if variable in environment and key not in said:
            found[key] = _read(variable, key, environment[variable])
    if "roots" not in said:
        found["roots"] = _roots(environment)
    if "backend" in found:
        _check_backend("GMS_TRANSFER_BACKEND", str(found["backend"]))
    return SnapshotConfig.model_validate({**found, **own.model_dump(exclude_unset=True)})


def _check_backend(variable: str, name: str) -> None:
    try:
        find(name)
    except InvalidArgument as error:
        raise ConfigurationError(f"{variable}: {error.message}", hint=error.hint) from error


def _read(variable: str, key: str, value: object) -> object:
    return getattr(validated(SnapshotConfig, {key: value}, where=variable), key)


def _url(variable: str, text: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The only root, where a variable names a URL."""
    if variable == "GMS_SHARDED_SSD_ROOTS" or "GMS_SHARDED_SSD_ROOTS" in environment:
        raise ConfigurationError(
            "GMS_SHARDED_SSD_ROOTS names directories, and a root in an object store is the only one",
            hint="Unset it, and give the URL in GMS_CHECKPOINT_DIR.",
        )
    try:
        return (root_url(text),)
    except InvalidArgument as error:
        raise ConfigurationError(f"{variable}: {error.message}", hint=error.hint) from error


def _roots(environment: Mapping[str, str]) -> tuple[Path | str, ...]:
    """All roots that the environment names. One directory can be among several: then it is the first of them."""
    for variable in ("GMS_SHARDED_SSD_ROOTS", "GMS_CHECKPOINT_DIR"):
        if is_url(text := environment.get(variable, "")):
            return _url(variable, text, environment)
    several = tuple(part for part in re.split("[:,]", environment.get("GMS_SHARDED_SSD_ROOTS", "")) if part)
    roots = _read("GMS_SHARDED_SSD_ROOTS", "roots", several)
    assert isinstance(roots, tuple)
    if "GMS_CHECKPOINT_DIR" not in environment:
        return roots
    first = _read("GMS_CHECKPOINT_DIR", "roots", (environment["GMS_CHECKPOINT_DIR"],))
    assert isinstance(first, tuple)
    if roots and first[0] not in roots:
        raise ConfigurationError(
            f"GMS_CHECKPOINT_DIR={first[0]} is none of the directories of GMS_SHARDED_SSD_ROOTS",
            hint="Leave one of the two out, or name it in both: then it gets the manifests.",
        )
    return (*first, *(root for root in roots if root != first[0]))
