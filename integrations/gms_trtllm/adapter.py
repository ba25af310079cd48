"""GMS in the loader of a TensorRT-LLM that has no `LoadFormat.GMS`: its `ModelLoader.load` publishes or attaches."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
from tensorrt_llm.llmapi.llm_args import LoadFormat

from gms_core.engine_log import log
from gms_core.errors import ConfigurationError, EngineUnsupported, LeaseConflict
from gms_patches.apply import Applied, apply
from gms_patches.for_trtllm import ADAPTER, COMMON, LOAD_MODEL, RELOAD_MODEL
from gms_patches.guard import guard
from gms_trtllm.arguments import asks_for_gms
from gms_trtllm.clients import Client, evict, get_or_create
from gms_trtllm.identity import Expected
from gms_trtllm.locks import GrantedLockType, RequestedLockType
from gms_trtllm.place import current_index, default_socket
from gms_trtllm.reader import read
from gms_trtllm.writer import write

_DRAFT = "-draft"
"""What the tag of a draft model's weights has at its end: it has a loader, and a pool, of its own."""

Load = Callable[..., tuple[Any, Any]]

_in_force: list[Applied] = []
_clients: weakref.WeakKeyDictionary[Any, Client] = weakref.WeakKeyDictionary()


def take_part() -> None:
    """Let loaders of this process share weights if their options ask for it. Idempotent.

    Raises:
        EngineUnsupported: This TensorRT-LLM is not as the adapter knows it. Nothing was changed.
    """
    guard((*COMMON, *ADAPTER))
    try:
        _in_force.append(apply(LOAD_MODEL, _sharing))
        if hasattr(ModelLoader, "reload"):
            _in_force.append(apply(RELOAD_MODEL, _refusing_to_reload))
    except BaseException:
        give_up_part()
        raise


def give_up_part() -> None:
    """Undo it. Loaders that share weights go on. Idempotent."""
    while _in_force:
        _in_force.pop().revert()


def leave(loader: Any) -> None:
    """End a loader's lease: nobody uses its model any more. Idempotent; never raises.

    It is done by itself when the model is gone.

    Args:
        loader: The `ModelLoader`.
    """
    client = _clients.pop(loader, None)
    if client is not None:
        _end(client)


def _end(client: Client) -> None:
    try:
        client.close()
    except Exception as error:  # noqa: BLE001 - upstream calls it where nothing may be raised
        log().warning("the session with GMS could not be closed: %s", error)
    finally:
        evict(client)


def _sharing(original: Load) -> Load:
    def load(self: Any, checkpoint_dir: Any, checkpoint_loader: Any) -> tuple[Any, Any]:
        if not asks_for_gms(self.llm_args):
            return original(self, checkpoint_dir, checkpoint_loader)
        _check(self)
        client = _client(self, checkpoint_dir)
        try:
            if client.granted_lock_type is GrantedLockType.RW:
                model, balancer = write(original, self, checkpoint_dir, checkpoint_loader, client)
            elif client.granted_lock_type is GrantedLockType.RO:
                model, balancer = read(self, checkpoint_dir, checkpoint_loader, client)
            else:
                raise LeaseConflict(f"GMS lock state is unset after connect: {client.granted_lock_type!r} is neither a writer's nor a reader's")
        except BaseException:
            _end(client)
            raise
        _clients[self] = client
        weakref.finalize(model, _end, client)
        return model, balancer

    return load


def _refusing_to_reload(original: Callable[..., Any]) -> Callable[..., Any]:
    def reload(self: Any, *args: Any, **options: Any) -> Any:
        if asks_for_gms(self.llm_args):
            raise LeaseConflict(
                "this model cannot be loaded once more: its weights are shared, and read-only",
                hint="Start an engine with gms_config mode rw: it publishes anew, beside what is published.",
            )
        return original(self, *args, **options)

    return reload


def _check(loader: Any) -> None:
    """Refuse a loader that would not load what GMS was asked for.

    Raises:
        EngineUnsupported: It lacks something that the adapter needs.
        ConfigurationError: The load format was changed since.
    """
    from gms_patches.for_trtllm.symbols import ATTRIBUTES

    missing = [name for name in ATTRIBUTES if not hasattr(loader, name)]
    if missing:
        raise EngineUnsupported(f"{LOAD_MODEL.target}: expected an object with {', '.join(ATTRIBUTES)}, found none of the name {missing[0]}")
    found = loader.llm_args.load_format
    if found is not LoadFormat.AUTO:
        raise ConfigurationError(
            f"load_format GMS was asked for, and the load format of this model is {getattr(found, 'name', found)} now",
            hint="Weights that are made up, or not loaded, are not shared: leave load_format of speculative_config out.",
        )


def _client(loader: Any, checkpoint_dir: Any) -> Client:
    args = loader.llm_args
    options, index = args.gms_config, current_index()
    is_draft = _is_draft(loader.spec_config, checkpoint_dir)
    tag = options.tag + (_DRAFT if is_draft else "")
    wanted = Expected(args, str(checkpoint_dir) if is_draft else "")
    return get_or_create(options.socket_path or default_socket(index, tag), index, mode=RequestedLockType(options.mode), tag=tag, wanted=wanted)


def _is_draft(speculation: Any, checkpoint_dir: Any) -> bool:
    """Whether a checkpoint is that of a draft model with a loader of its own."""
    for name in ("speculative_model", "speculative_model_dir"):
        place = getattr(speculation, name, None)
        if place is not None and str(place) == str(checkpoint_dir):
            return True
    return False
