"""What a hostile peer may send: frames that are right, nearly right, and not right at all, drawn from a source of chance."""

from __future__ import annotations

import random
import string
import typing
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from gms_core.protocol.framing import HEADER, MAGIC, MAX_DESCRIPTORS, MAX_PAYLOAD
from gms_core.protocol.messages import HandOver, Hello, Join, Reply, Request

REQUESTS = [kind for kind in typing.get_args(Request) if kind is not HandOver]
"""`HandOver` is left out: it is an operator's right to end the server with it."""
REPLIES = list(typing.get_args(Reply))
POOLS = ("a", "b", "weights", "kv", "x" * 64, "x" * 65, "", "a/b", "..", "ä", "\0")
INTEGERS = (0, 1, 2, -1, 4096, 8192, 2**20, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, 0.001, -1.0, 1e308, float("inf"), float("-inf"), float("nan"), 0.01)


class Sent(NamedTuple):
    """Bytes, and how many descriptors go with the first of them."""

    data: bytes
    descriptors: int = 0


def value(chance: random.Random, kind: inspect.Type, depth: int = 0) -> Any:
    """A value that a type allows, as far as its kind goes."""
    match kind:
        case inspect.IntType():
            return chance.choice(INTEGERS) if chance.random() < 0.7 else chance.randrange(2**16)
        case inspect.FloatType():
            return chance.choice(FLOATS)
        case inspect.StrType():
            return chance.choice(POOLS) if chance.random() < 0.7 else "".join(chance.choices(string.printable, k=chance.randrange(40)))
        case inspect.BytesType():
            return chance.randbytes(chance.choice((0, 1, 100, 3000)))
        case inspect.BoolType():
            return chance.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.LiteralType():
            return chance.choice(kind.values)
        case inspect.UnionType():
            return value(chance, chance.choice(kind.types), depth)
        case inspect.VarTupleType() | inspect.ListType():
            return [value(chance, kind.item_type, depth + 1) for _ in range(chance.choice((0, 1, 2, 5, 300) if depth == 0 else (0, 1, 2)))]
        case inspect.TupleType():
            return [value(chance, item, depth + 1) for item in kind.item_types]
        case inspect.DictType():
            return {value(chance, kind.key_type, depth + 1): value(chance, kind.value_type, depth + 1) for _ in range(chance.randrange(4))}
        case inspect.StructType():
            values = [(field.encode_name, value(chance, field.type, depth + 1)) for field in kind.fields]
            return [one for _, one in values] if kind.array_like else dict(values)
        case _:
            return None


def message(chance: random.Random, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A message of a kind, as what MessagePack has of it."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    built = value(chance, described)
    for name in ("timeout_s", "deadline_s", "grace_s"):  # most waits are short: a frame must not stand still for a day
        if name in built and chance.random() < 0.95:
            built[name] = chance.choice((0.0, 0.001, 0.01))
    return {"type": described.tag, **built}


def anything(chance: random.Random, depth: int = 0) -> Any:
    """A value of any kind."""
    kinds = 7 if depth > 3 else 9
    return [
        lambda: None,
        lambda: chance.random() < 0.5,
        lambda: chance.choice(INTEGERS),
        lambda: chance.choice(FLOATS),
        lambda: chance.choice(POOLS),
        lambda: chance.randbytes(chance.randrange(50)),
        lambda: "".join(chance.choices(string.printable, k=chance.randrange(20))),
        lambda: [anything(chance, depth + 1) for _ in range(chance.randrange(5))],
        lambda: {str(anything(chance, 9)): anything(chance, depth + 1) for _ in range(chance.randrange(5))},
    ][chance.randrange(kinds)]()


def payload(chance: random.Random, kinds: list[Any] | None = None) -> bytes:
    """What stands in a frame: a message, one with a field of the wrong type, one that is cut, or something else."""
    kind = chance.choice(kinds or REQUESTS)
    if kind in (Join, Hello) and chance.random() < 0.9:
        kind = chance.choice(kinds or REQUESTS)
    built = message(chance, kind)
    form = chance.random()
    if form < 0.15 and len(built) > 1:
        built[chance.choice(list(built))] = anything(chance)
    elif form < 0.25:
        built.pop(chance.choice(list(built)))
    elif form < 0.3:
        built[str(anything(chance, 9))] = anything(chance)
    data = msgspec.msgpack.encode(anything(chance) if form > 0.95 else built)
    if form > 0.97:
        return b"\x91" * chance.choice((10, 1000, 100000)) + data  # arrays within arrays
    if 0.3 <= form < 0.4 and data:
        cut = chance.randrange(len(data))
        return data[:cut] if form < 0.35 else data[:cut] + chance.randbytes(chance.randrange(1, 5)) + data[cut + 1 :]
    return data


def frame(chance: random.Random, kinds: list[Any] | None = None) -> Sent:
    """A frame, mostly whole."""
    content = payload(chance, kinds)
    form = chance.random()
    if form < 0.85:
        return Sent(HEADER.pack(MAGIC, len(content), 0) + content)
    if form < 0.88:
        return Sent(HEADER.pack(MAGIC, len(content), 0) + content, chance.choice((1, 2, MAX_DESCRIPTORS)))
    if form < 0.90:
        return Sent(HEADER.pack(MAGIC, len(content), chance.choice((1, MAX_DESCRIPTORS, 65535))) + content, chance.choice((0, 1)))
    if form < 0.92:
        return Sent(HEADER.pack(MAGIC, chance.choice((MAX_PAYLOAD + 1, 2**32 - 1, len(content) + 1)), 0) + content)
    if form < 0.94:
        return Sent((HEADER.pack(MAGIC, len(content), 0) + content)[: chance.randrange(len(content) + HEADER.size)])
    if form < 0.96:
        return Sent(chance.randbytes(chance.randrange(1, 200)))
    return Sent(HEADER.pack(MAGIC, len(content), 0) + content + chance.randbytes(chance.randrange(1, 20)))
