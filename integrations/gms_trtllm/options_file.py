"""A file of options for an engine of TensorRT-LLM, and what a command line adds to it. TensorRT-LLM is not imported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gms_core.errors import ConfigurationError

_FORMAT = "load_format"
_BLOCK = "gms_config"
_GMS = ("gms", "3")
"""The load format, as TensorRT-LLM takes it: by its name or its number."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command line says.

    Attributes:
        load_format: None if it says nothing.
        block: Of GMS; empty if it says nothing.
    """

    load_format: str | None
    block: Mapping[str, Any]


def parse_block(words: Sequence[str]) -> dict[str, Any]:
    """The block of several words, each of which is JSON, or ``KEY=VALUE``.

    Raises:
        ConfigurationError: A word is neither, or a key is there twice.
    """
    block: dict[str, Any] = {}
    for word in words:
        for key, value in _parse(word).items():
            if key in block:
                raise ConfigurationError(f"--gms-config: {key} is given twice")
            block[key] = value
    return block


def _parse(word: str) -> dict[str, Any]:
    if word.lstrip().startswith("{"):
        try:
            found: dict[str, Any] = json.loads(word)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"--gms-config: {word!r} is no JSON: {error}") from error
        return found
    key, equals, value = word.partition("=")
    if not equals or not key.strip():
        raise ConfigurationError(f"--gms-config: {word!r} is neither JSON nor KEY=VALUE", hint='Such as mode=ro, or \'{"mode": "ro"}\'.')
    return {key.strip(): value}


def read_file(path: str | None) -> dict[str, Any]:
    """What a user's file says; nothing without one.

    Raises:
        ConfigurationError: It cannot be read, or is no block of options.
    """
    if path is None:
        return {}
    import yaml  # TensorRT-LLM brings it along

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read as a file of options: {error}") from error
    if not isinstance(found, (dict, type(None))):
        raise ConfigurationError(f"{path} is not a block of options")
    return found or {}


def merged(options: Mapping[str, Any], asked: Asked, path: str) -> dict[str, Any] | None:
    """What the engine is to be told; None if it is what the file says already.

    Args:
        options: Of the user's file.
        asked: By the command line.
        path: The file, for people.

    Raises:
        ConfigurationError: The two contradict each other, or a block has no effect.
    """
    found = options.get(_FORMAT)
    if asked.load_format is not None and found is not None and not _same(found, asked.load_format):
        raise ConfigurationError(f"--load-format {asked.load_format}, but load_format is {found} in {path}", hint="Say it once.")
    load_format = asked.load_format if asked.load_format is not None else found
    if load_format is None or str(load_format).lower() not in _GMS:
        if asked.block:
            raise ConfigurationError("--gms-config has no effect: the load format is not gms", hint="Add --load-format gms.")
        return None if asked.load_format is None else {**options, _FORMAT: load_format}
    block = options.get(_BLOCK) or {}
    if not isinstance(block, Mapping):
        raise ConfigurationError(f"{_BLOCK} in {path} is not a block of options")
    twice = sorted(key for key in asked.block if key in block and block[key] != asked.block[key])
    if twice:
        raise ConfigurationError(f"--gms-config {twice[0]}={asked.block[twice[0]]}, but it is {block[twice[0]]} in {path}", hint="Say it once.")
    whole = {**block, **asked.block}
    return {**options, _FORMAT: "GMS", **({_BLOCK: whole} if whole else {})}


def _same(one: object, other: object) -> bool:
    return str(one).lower() == str(other).lower()
