"""A load that publishes, where TensorRT-LLM's own loader knows nothing of GMS: it loads as it always does, into memory that is going to be shared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorrt_llm._torch.pyexecutor.model_loader as home

from gms_core.errors import EngineUnsupported
from gms_core.pytorch.population import marking
from gms_trtllm.checkpoint_loaders import Watched
from gms_trtllm.clients import Client

_MODELS = "AutoModelForCausalLM"
_OWN_TAG = "model_weights_memory_tag"


def write(original: Callable[..., tuple[Any, Any]], loader: Any, checkpoint_dir: Any, checkpoint_loader: Any, client: Client) -> tuple[Any, Any]:
    """Load a model, publish it, and go on as a reader of it.

    Args:
        original: TensorRT-LLM's `ModelLoader.load`.
        loader: The `ModelLoader`.
        checkpoint_dir: As it is called.
        checkpoint_loader: As it is called.
        client: Writes.

    Returns:
        What it returns: the model, and the balancer of its experts.

    Raises:
        UnpopulatedModule: The checkpoint has nothing for the model, for its draft or for some of the parameters, here or on another rank.
        GmsError: It could not be published.
    """
    watched = Watched(checkpoint_loader)
    with _without_own_memory(loader), _in_memory_of(client):
        model, balancer = original(loader, checkpoint_dir, watched)
    watched.check()
    client.publish(model)
    return model, balancer


@contextlib.contextmanager
def _without_own_memory(loader: Any) -> Iterator[None]:
    """Let TensorRT-LLM not put weights into memory of its own that it can take away."""
    tag = getattr(loader, _OWN_TAG, None)
    if tag is None:
        yield
        return
    setattr(loader, _OWN_TAG, None)
    try:
        yield
    finally:
        setattr(loader, _OWN_TAG, tag)


@contextlib.contextmanager
def _in_memory_of(client: Client) -> Iterator[None]:
    """Let what a model that is made meanwhile has of weights lie in a client's memory, from the moment on at which it gets any.

    Communicators make their buffers before, with the modules: these are written to for as long as the engine runs, and must not be shared.

    Raises:
        EngineUnsupported: TensorRT-LLM gave it memory in a way that is not known.
    """
    with contextlib.ExitStack() as stack:
        making = _Making(getattr(home, _MODELS), client, stack)
        setattr(home, _MODELS, making)
        try:
            yield
        finally:
            setattr(home, _MODELS, making.original)
        if not making.has_begun:
            raise EngineUnsupported(
                f"{home.__name__}: expected a model of {_MODELS}.from_config to get its memory by Module._apply, found that it was not called",
                hint="Use a version that this adapter knows.",
            )


class _Making:
    """In the place of the class that makes models."""

    def __init__(self, original: Any, client: Client, stack: contextlib.ExitStack) -> None:
        self.original = original
        self.has_begun = False
        self._client, self._stack = client, stack

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def from_config(self, config: Any) -> Any:
        """Make a model, and begin when it gets its memory.

        Raises:
            EngineUnsupported: One has got it already.
        """
        if self.has_begun:  # TensorRT-LLM does so when it could not give the first one its memory: communicators would be made in shared memory
            raise EngineUnsupported(f"{_MODELS} was to make a second model for one load", hint="TensorRT-LLM's log says what became of the first.")
        with marking(self._client.device):  # a model that cannot be made on `meta` has its memory from here on
            model = self.original.from_config(config)
        apply = model._apply  # noqa: SLF001 - what `to`, `cuda` and the loader itself come down to

        def begin_and_apply(*args: Any, **options: Any) -> Any:
            self._stack.enter_context(self._client.writing())
            self.has_begun = True
            del model._apply  # noqa: SLF001
            return apply(*args, **options)

        model._apply = begin_and_apply  # noqa: SLF001
        return model
