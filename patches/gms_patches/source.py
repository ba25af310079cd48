"""Finding a symbol in source text: by syntax tree, through re-exports and base classes, with nothing imported."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Read = Callable[[str], str | None]
"""Gives a module's source, or None if there is no such module."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_MOST_HOPS = 12
"""Re-exports and base classes that are followed before the search gives up: a cycle of imports must not hang it."""


@dataclass(frozen=True, slots=True)
class Found:
    """A symbol as it stands in the source.

    Attributes:
        module: Where it is defined, which may not be where it is looked up.
        line: Its first line.
        parameters: Of a function: its parameter list; None for anything else.
        fingerprint: Of a function: changes when its code does, not when its comments or blank lines do.
    """

    module: str
    line: int
    parameters: str | None = None
    fingerprint: str = ""


def find(target: str, read: Read) -> Found | None:
    """Find ``module:qualified.name``; None if it is not there."""
    module, _, name = target.partition(":")
    return _find(module, name.split("."), read, _MOST_HOPS)


def _find(module: str, path: Sequence[str], read: Read, hops: int) -> Found | None:
    text = read(module)
    if text is None or hops == 0:
        return None
    tree = _parse(text)
    node = _binding(tree.body, path[0])
    if isinstance(node, ast.ImportFrom):
        origin = _imported(node, path[0], module, is_package=_is_package(module, read))
        return _find(origin[0], [origin[1], *path[1:]], read, hops - 1) if origin else None
    if len(path) == 1:
        return _describe(module, node, text) if node is not None else None
    owner = _remade(tree.body, path[0], node) if isinstance(node, ast.Assign) else node
    return _member(module, owner, path[1:], text, read, hops) if isinstance(owner, ast.ClassDef) else None


def _remade(body: Sequence[ast.stmt], name: str, node: ast.Assign) -> ast.stmt | None:
    """The class that an assignment makes another of the same name from, as in ``Record = make(vars(Record))``: its members are that one's."""
    if not any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node.value)):
        return None
    classes = [statement for statement in _statements(body) if isinstance(statement, ast.ClassDef) and statement.name == name]
    return classes[-1] if classes else None


def _member(module: str, owner: ast.ClassDef, path: Sequence[str], text: str, read: Read, hops: int) -> Found | None:
    node = _binding(owner.body, path[0]) or _assigned_to_self(owner, path[0])
    if node is not None:
        if len(path) == 1:
            return _describe(module, node, text)
        return _member(module, node, path[1:], text, read, hops) if isinstance(node, ast.ClassDef) else None
    for base in owner.bases:
        if isinstance(base, ast.Name) and (found := _find(module, [base.id, *path], read, hops - 1)):
            return found
    return None


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements that run when the body does, those under ``if``, ``try`` and ``with`` included."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(statement, (_Function, ast.ClassDef)):
                yield from _statements(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _binding(body: Sequence[ast.stmt], name: str) -> ast.stmt | None:
    """The statement that gives ``name`` its value: the last one that defines it, else one that imports it."""
    statements = list(_statements(body))
    defined = [node for node in statements if name in _defines(node)]
    imported = [node for node in statements if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names)]
    return (defined or imported or [None])[-1]


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    return [target.id for target in _targets(node) if isinstance(target, ast.Name)]


def _targets(node: ast.AST) -> list[ast.expr]:
    """What an assignment assigns to."""
    if isinstance(node, ast.Assign):
        return [part for target in node.targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _assigned_to_self(owner: ast.ClassDef, name: str) -> ast.stmt | None:
    for method in owner.body:
        if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(method):
                if isinstance(node, ast.stmt) and any(_is_attribute_of_self(target, name) for target in _targets(node)):
                    return node
    return None


def _is_attribute_of_self(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Attribute) and target.attr == name and isinstance(target.value, ast.Name) and target.value.id == "self"


def _is_package(module: str, read: Read) -> bool:
    # A package has submodules; only `__init__` can answer for itself under this name.
    return read(f"{module}.__init__") is not None


def _imported(node: ast.ImportFrom, name: str, module: str, *, is_package: bool) -> tuple[str, str] | None:
    original = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), None)
    if original is None:
        return None
    if node.level == 0:
        return node.module or "", original
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, *([node.module] if node.module else [])]), original


def _describe(module: str, node: ast.stmt, text: str) -> Found:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
        return Found(module, node.lineno, _tree_parameters(node.args), fingerprint("\n".join(lines)))
    return Found(module, node.lineno)


def fingerprint(source: str) -> str:
    """A short digest of a function's source: blank lines, comment lines and the indentation as a whole do not count."""
    lines = [line.rstrip() for line in inspect.cleandoc("\n" + source).splitlines()]
    code = [line for line in lines if line and not line.lstrip().startswith(("#", "@"))]
    return hashlib.blake2b("\n".join(code).encode(), digest_size=8).hexdigest()


def _tree_parameters(arguments: ast.arguments) -> str:
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = len(positional) - len(arguments.defaults)
    parts = [f"{argument.arg}=" if index >= optional else argument.arg for index, argument in enumerate(positional)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [
        argument.arg if default is None else f"{argument.arg}=" for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)


def parameters(function: Callable[..., Any]) -> str:
    """A live function's parameter list in the notation of this module: names, ``=`` after those with a default, no annotations."""
    parts: list[str] = []
    separated = False
    found = list(inspect.signature(function).parameters.values())
    for index, parameter in enumerate(found):
        name = parameter.name + ("=" if parameter.default is not parameter.empty else "")
        if parameter.kind is parameter.VAR_POSITIONAL:
            name, separated = f"*{parameter.name}", True
        elif parameter.kind is parameter.VAR_KEYWORD:
            name = f"**{parameter.name}"
        elif parameter.kind is parameter.KEYWORD_ONLY and not separated:
            parts.append("*")
            separated = True
        parts.append(name)
        last_positional_only = parameter.kind is parameter.POSITIONAL_ONLY and (
            index + 1 == len(found) or found[index + 1].kind is not parameter.POSITIONAL_ONLY
        )
        if last_positional_only:
            parts.append("/")
    return ", ".join(parts)
