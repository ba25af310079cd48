"""Memory that can be taken away beneath its addresses: scopes that are memory pools, one inside the other."""

import contextlib
import sys

import torch

_pool_stack = []
"""Of (context of the pool that is in use, allocator of that)."""


def _enter(allocator):
    context = torch.cuda.use_mem_pool(torch.cuda.MemPool(allocator))
    context.__enter__()
    return context, allocator


@contextlib.contextmanager
def scope(tag, mode=None):
    """Let what is allocated meanwhile belong to a tag. A scope around it is left for that time, and entered again with a fresh pool."""
    if _pool_stack:
        _pool_stack[-1][0].__exit__(None, None, None)
    _pool_stack.append(_enter(f"allocator of {tag}"))
    try:
        yield
    finally:
        _pool_stack.pop()[0].__exit__(None, None, None)
        if _pool_stack:
            _pool_stack[-1] = _enter(_pool_stack[-1][1])


_released = set()
"""Tags whose memory was taken away."""

owned = {}
"""Tensors that belong to a tag, by their owners. What was in them is lost when their memory is taken away."""


def release_with_tag(*tags):
    """Take away what belongs to these tags; returns how many were changed."""
    return _change(_released.add, [tag for tag in dict.fromkeys(tags) if tag not in _released], "released")


def materialize_with_tag(*tags):
    """Give it back."""
    return _change(_released.discard, [tag for tag in dict.fromkeys(tags) if tag in _released], "materialized")


def _change(change, tags, what):
    for tag in tags:
        change(tag)
        for tensor in owned.get(tag, {}).values():
            tensor.fill_(0xAA)
        sys.stderr.write(f"{what} {tag}\n")  # for tests
    return len(tags)
