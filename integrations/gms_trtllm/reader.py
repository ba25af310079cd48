"""A load that attaches, where TensorRT-LLM's own loader knows nothing of GMS: a model is made without memory, and uses what is published."""

from __future__ import annotations

import copy
from typing import Any

import tensorrt_llm._torch.pyexecutor.model_loader as home

from gms_core.engine_log import log
from gms_trtllm.checkpoint_loaders import Untouched
from gms_trtllm.clients import Client


def read(loader: Any, checkpoint_dir: Any, checkpoint_loader: Any, client: Client) -> tuple[Any, Any]:
    """Make a model on top of what is published. The checkpoint loader is not asked for weights.

    Args:
        loader: The `ModelLoader`.
        checkpoint_dir: Where the model's configuration is.
        checkpoint_loader: Reads that.
        client: Reads.

    Returns:
        The model, and the balancer of its experts, as `ModelLoader.load` does.

    Raises:
        ManifestError: What is published does not fit the model.
        UnpopulatedModule: Tensors would be left without content.
        GmsError: Another rank could not attach.
    """
    config = loader._load_and_validate_config(checkpoint_dir, Untouched(checkpoint_loader))  # noqa: SLF001 - of the adapter's table of symbols
    with home.maybe_create_moe_load_balancer(config, loader.mapping) as balancer:
        model = _build(config, client)
        for module in list(model.modules()):
            process = getattr(module, "post_load_weights", None)
            if process is not None and not getattr(module, "_weights_removed", False):
                process()
        client.attach(model)
    return model.eval(), balancer


def _build(config: Any, client: Client) -> Any:
    """The model without memory; one that cannot be made so, with memory that it will not need."""
    try:
        with home.MetaInitMode():
            return home.AutoModelForCausalLM.from_config(copy.deepcopy(config))  # some models change it while they are made
    except Exception as error:  # noqa: BLE001 - whatever it is, TensorRT-LLM makes the model in the other way then
        log().info("the model cannot be made without memory: %s", error)
    return home.AutoModelForCausalLM.from_config(config).to(client.device)
