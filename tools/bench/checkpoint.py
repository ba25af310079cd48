"""A checkpoint to be loaded: bfloat16 tensors of Llama's shapes with random bytes, in safetensors files, and what their bytes are.

It is written without torch and without safetensors, so that GMS can be measured where neither is installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from gms_core.errors import InvalidArgument, TransferFailed

FILES = 4
"""Over which the tensors are spread, as those of 8B models are: loaders that read files side by side have something to do."""
LIST = "tensors.json"
ITEM_BYTES = 2
PIECE_BYTES = 16 * 2**20
LEAST_BYTES = 2**20
WORDS = 32000


class Shapes(NamedTuple):
    """What determines the shapes of a Llama.

    Attributes:
        hidden: Width.
        inner: Width of the feed-forward part.
        keys: Width of keys, and of values.
    """

    hidden: int
    inner: int
    keys: int


MODELS = (Shapes(4096, 14336, 1024), Shapes(2048, 8192, 512), Shapes(512, 1536, 128), Shapes(64, 192, 16))
"""Those of 8B and of 1B, and two for tests, which have few bytes."""
LAYERS = 4
"""A model is too large for a checkpoint in which there is no room for so many of its layers."""


class Tensor(msgspec.Struct, frozen=True):
    """One tensor.

    Attributes:
        name: In the checkpoint.
        shape: Its dimensions.
        file: Number of the file that it lies in.
        position: Of its first byte in the file.
        size: Bytes.
        digest: xxh3_64 of its bytes, in hexadecimal.
    """

    name: str
    shape: tuple[int, ...]
    file: int
    position: int
    size: int
    digest: str = ""


class Checkpoint(NamedTuple):
    """A checkpoint on a disk.

    Attributes:
        files: In their order.
        tensors: In the order in which they lie there.
    """

    files: tuple[Path, ...]
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def file_sizes(self) -> list[tuple[Path, int]]:
        """Each file, and its bytes."""
        return [(path, path.stat().st_size) for path in self.files]


def shapes_of(size: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of tensors that have as many bytes, less than a row of the last one. Pure.

    Args:
        size: Bytes.

    Raises:
        InvalidArgument: There is no room for a model.
    """
    for model in MODELS:
        layer = _layer(model, 0)
        words = min(WORDS, size // 8 // (ITEM_BYTES * model.hidden))
        first = ("model.embed_tokens.weight", (words, model.hidden))
        last = ("model.norm.weight", (model.hidden,))
        left = size - bytes_of(first[1]) - bytes_of(last[1])
        layers = left // sum(bytes_of(shape) for _, shape in layer)
        if layers < LAYERS:
            continue
        tensors = [first, *(one for number in range(layers) for one in _layer(model, number)), last]
        rows = (left - layers * sum(bytes_of(shape) for _, shape in layer)) // (ITEM_BYTES * model.hidden)
        return [*tensors, ("lm_head.weight", (rows, model.hidden))] if rows else tensors
    raise InvalidArgument(f"a checkpoint of {size} bytes is no model", hint=f"Choose at least {LEAST_BYTES} bytes.")


def bytes_of(shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    count = ITEM_BYTES
    for dimension in shape:
        count *= dimension
    return count


def write(folder: Path, size: int) -> Checkpoint:
    """Write a checkpoint, and have the disk have it. Its bytes are others each time.

    Args:
        folder: It exists, and is empty.
        size: Bytes of the tensors; see `shapes_of`.

    Raises:
        InvalidArgument: See `shapes_of`.
        TransferFailed: It cannot be written.
    """
    placed: list[Tensor] = []
    paths: list[Path] = []
    try:
        for number, group in enumerate(_grouped(shapes_of(size))):
            path = folder / f"model-{number + 1:05}-of-{FILES:05}.safetensors"
            paths.append(path)
            placed += _write_file(path, number, group)
        (folder / LIST).write_bytes(msgspec.json.encode(placed))
    except OSError as error:
        raise TransferFailed(
            f"no checkpoint can be written to {folder}: {error.strerror}", hint="Choose another directory, or fewer bytes."
        ) from error
    return Checkpoint(tuple(paths), tuple(placed))


def read_list(folder: Path) -> Checkpoint:
    """The checkpoint that was written to a directory, or copied there."""
    tensors = msgspec.json.decode((folder / LIST).read_bytes(), type=tuple[Tensor, ...])
    return Checkpoint(tuple(sorted(folder.glob("*.safetensors"))), tensors)


def _layer(model: Shapes, number: int) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner, keys = model
    inside = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (keys, hidden),
    }
    return [(f"model.layers.{number}.{name}.weight", shape) for name, shape in inside.items()]


def _grouped(tensors: list[tuple[str, tuple[int, ...]]]) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """The tensors of each file: whole ones, in their order, about as many bytes in each."""
    whole = sum(bytes_of(shape) for _, shape in tensors)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(FILES)]
    done = 0
    for name, shape in tensors:
        groups[min(FILES - 1, done * FILES // whole)].append((name, shape))
        done += bytes_of(shape)
    yield from filter(None, groups)


def _write_file(path: Path, number: int, tensors: list[tuple[str, tuple[int, ...]]]) -> list[Tensor]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, offset + bytes_of(shape))}
        offset += bytes_of(shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    placed = []
    position = 8 + len(text)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            size = bytes_of(shape)
            digest = xxhash.xxh3_64()
            for begin in range(0, size, PIECE_BYTES):
                noise = os.urandom(min(PIECE_BYTES, size - begin))
                digest.update(noise)
                file.write(noise)
            placed.append(Tensor(name, shape, number, position, size, digest.hexdigest()))
            position += size
        file.flush()
        os.fsync(file.fileno())
    return placed
