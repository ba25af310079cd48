"""Options of a loader: the block ``gms`` of ``--model-loader-extra-config``; all other keys belong to the engine's own loader, the inner one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gms_core.engine_config import GmsConfig, parse_block
from gms_core.errors import ConfigurationError

LOAD_FORMAT = "gms"
BLOCK = "gms"
WHERE = "--model-loader-extra-config: gms"


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """What the user wrote.

    Attributes:
        gms: The block for GMS.
        rest: Every other key, for the inner loader.
    """

    gms: GmsConfig
    rest: Mapping[str, Any]


def loader_options(extra: object, no_inner: Mapping[str, str]) -> LoaderOptions:
    """Split the value of ``model_loader_extra_config``.

    Args:
        extra: The value.
        no_inner: Inner loaders that cannot be used, and why.

    Raises:
        ConfigurationError: It is no mapping, or the block has an unknown key or a wrong value.
    """
    if not isinstance(extra, Mapping):
        raise ConfigurationError(
            f"--model-loader-extra-config is a {type(extra).__name__}, not a mapping", hint='Write it as JSON, such as {"gms": {}}.'
        )
    rest = dict(extra)
    options = LoaderOptions(parse_block(rest.pop(BLOCK, None), where=WHERE), rest)
    reason = no_inner.get(options.gms.inner.lower())
    if reason is not None:
        raise ConfigurationError(
            f"{WHERE}: inner: {options.gms.inner!r} cannot be used, because {reason}", hint="Leave it out, or name a loader that reads files."
        )
    return options
