"""Memory that can be taken away beneath its addresses: scopes that are memory pools, one inside the other."""

import contextlib

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
