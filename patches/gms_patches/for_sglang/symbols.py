"""Every symbol of SGLang that the adapter touches besides what it hooks, with the parameter lists that it can work with."""

from __future__ import annotations

from gms_patches.for_sglang.arguments import ARGUMENTS
from gms_patches.for_sglang.memory import MEMORY
from gms_patches.for_sglang.serving import SERVING
from gms_patches.patch import Symbol, group

_PLUGIN = "loading as a plugin of SGLang"
_FORMAT = "the load format"
_META = "building a model without memory"
_IDENTITY = "the identity of the weights"
_RANKS = "one decision for all ranks"
_UPDATES = "refusing new weights"

_LOAD = (
    *group(_PLUGIN, "sglang.srt.plugins", {"GENERAL_PLUGINS_GROUP": (), "load_plugins": ("",)}),
    *group(
        _PLUGIN,
        "sglang.srt.plugins.hook_registry",
        {
            "HookRegistry": (),
            "HookRegistry.register": ("cls, target, hook, hook_type=, *, source=",),
            "HookRegistry.apply_hooks": ("cls",),
            "HookRegistry._hooks": (),
            "HookSource": (),
            "HookType": (),
            "HookType.BEFORE": (),
            "HookType.AFTER": (),
            "HookType.AROUND": (),
            "HookType.REPLACE": (),
        },
    ),
    Symbol("sglang.srt.server_args:LOAD_FORMAT_CHOICES", _FORMAT),
    Symbol("sglang.srt.server_args:add_load_format_choices", _FORMAT, ("choices",), "<0.5.19"),
    # From here on it is a list's own `extend`, which takes one argument too.
    Symbol("sglang.srt.server_args:add_load_format_choices", _FORMAT, (), ">=0.5.19"),
    *group(
        _FORMAT,
        "sglang.srt.configs.load_config",
        {
            "LoadConfig": (),
            "LoadConfig.load_format": (),
            "LoadConfig.model_loader_extra_config": (),
            "LoadConfig.draft_model_idx": (),
            "LoadFormat": (),
        },
    ),
    *group(
        _FORMAT,
        "sglang.srt.model_loader.loader",
        {
            "get_model_loader": ("load_config, model_config=",),
            "BaseModelLoader": (),
            "BaseModelLoader.__init__": ("self, load_config",),
            "BaseModelLoader.download_model": ("self, model_config",),
            "BaseModelLoader.load_model": ("self, *, model_config, device_config",),
        },
    ),
    *group(_FORMAT, "sglang.srt.configs.device_config", {"DeviceConfig.device": (), "DeviceConfig.gpu_id": ()}),
    *group(
        _META,
        "sglang.srt.model_loader.loader",
        {
            "_get_quantization_config": ("model_config, load_config",),
        },
    ),
    Symbol("sglang.srt.model_loader.utils:set_default_torch_dtype", _META, ("dtype",)),
)

_WHO = (
    *group(
        _IDENTITY,
        "sglang.srt.configs.model_config",
        {
            "ModelConfig.model_path": (),
            "ModelConfig.revision": (),
            "ModelConfig.dtype": (),
            "ModelConfig.quantization": (),
            "ModelConfig.hf_config": (),
            "ModelConfig.model_impl": (),
            "ModelConfig.is_draft_model": (),
            "ModelConfig.context_len": (),
            "ModelConfig._is_already_quantized": ("self",),
        },
    ),
    # From 0.5.19 on the record keeps what the user gave, and this says what the engine made of it.
    Symbol("sglang.srt.arg_groups.overrides:resolution_result", _IDENTITY, ("server_args, field, default=",), ">=0.5.19"),
    Symbol("sglang.srt.runtime_context:get_server_args", _IDENTITY, ("",)),
    *group(
        _RANKS,
        "sglang.srt.distributed.parallel_state",
        {
            "get_world_group": ("",),
            "get_tp_group": ("",),
            "get_pp_group": ("",),
            "get_moe_ep_group": ("",),
            "GroupCoordinator": (),
            "GroupCoordinator.broadcast_object": ("self, obj=, src=",),
            "GroupCoordinator.rank_in_group": (),
            "GroupCoordinator.world_size": (),
            "GroupCoordinator.cpu_group": (),
        },
    ),
)

_WEIGHTS = (
    *group(
        _UPDATES,
        "sglang.srt.managers.io_struct",
        {
            "UpdateWeightFromDiskReqOutput": (),
            "UpdateWeightsFromDistributedReqOutput": (),
            "UpdateWeightsFromTensorReqOutput": (),
            "UpdateWeightsFromIPCReqOutput": (),
            "CheckWeightsReqInput.action": (),
            "CheckWeightsReqOutput": (),
        },
    ),
    *group(
        _UPDATES,
        "sglang.srt.managers.io_struct",
        {"BeginWeightUpdateReqOutput": (), "EndWeightUpdateReqOutput": ()},
        ">=0.5.21",
    ),
)

SYMBOLS: tuple[Symbol, ...] = (*_LOAD, *_WHO, *_WEIGHTS, *ARGUMENTS, *MEMORY, *SERVING)
