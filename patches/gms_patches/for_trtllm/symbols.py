"""Every symbol of TensorRT-LLM that the adapter touches besides what it patches, with the parameter lists that it can work with."""

from __future__ import annotations

from gms_patches.patch import Symbol, group

_OPTIONS = "the load format, and options that reach every rank"
_RANKS = "one decision for all ranks"
_LIBRARY = "the library that its own loader imports"
_LOADING = "loading into shared memory"
_READER = "building a model without memory"

LOAD_FORMAT = "tensorrt_llm.llmapi.llm_args:LoadFormat.GMS"
"""Whoever has it loads through the library `gpu_memory_service` by itself."""

COMMON: tuple[Symbol, ...] = (
    *group(
        _OPTIONS,
        "tensorrt_llm.llmapi.llm_args",
        {"LoadFormat": (), "LoadFormat.AUTO": (), "TorchLlmArgs": (), "TorchLlmArgs.model": (), "TorchLlmArgs.load_format": ()},
    ),
    Symbol("tensorrt_llm.llmapi.llm:TorchLlmArgs", _OPTIONS),
    *group(
        _RANKS,
        "tensorrt_llm._utils",
        {"mpi_rank": ("",), "mpi_world_size": ("",), "mpi_broadcast": ("obj, root=",), "mpi_allgather": ("obj",)},
    ),
)
"""Of any version."""

NATIVE: tuple[Symbol, ...] = (
    Symbol(LOAD_FORMAT, _LIBRARY),
    Symbol("tensorrt_llm.llmapi.llm_args:TorchLlmArgs.gms_config", _LIBRARY),
    Symbol("tensorrt_llm._torch.memory.gpu_memory_backend:GMSBackend", _LIBRARY),
)
"""Of versions that have the load format themselves."""

_MODEL_LOADER = "tensorrt_llm._torch.pyexecutor.model_loader"

ATTRIBUTES = ("llm_args", "mapping", "spec_config")
"""What an object of `ModelLoader` has to have."""

ADAPTER: tuple[Symbol, ...] = (
    *group(_LOADING, _MODEL_LOADER, {"ModelLoader": (), **{f"ModelLoader.{name}": () for name in ATTRIBUTES}}),
    *group(
        _READER,
        _MODEL_LOADER,
        {
            "ModelLoader._load_and_validate_config": ("self, checkpoint_dir, checkpoint_loader",),
            "AutoModelForCausalLM": (),
            "AutoModelForCausalLM.from_config": ("config",),
            "MetaInitMode": (),
            "maybe_create_moe_load_balancer": ("model_config, mapping",),
        },
    ),
)
"""Of versions in whose loader the adapter takes part."""

_PLACING = "KV memory that is mapped once an engine is promoted"

VIRTUAL_MEMORY = "tensorrt_llm.runtime.kv_cache_manager_v2._cuda_virt_mem"
GPU_STORAGE = "tensorrt_llm.runtime.kv_cache_manager_v2._storage._core"

PLACING: tuple[Symbol, ...] = (
    Symbol(f"{GPU_STORAGE}:VirtMem", _PLACING),
    *group(
        _PLACING,
        VIRTUAL_MEMORY,
        {
            "PooledPhysMemAllocator.__init__": ("self, phys_mem_size",),
            "VirtMem.__init__": ("self, vm_size, phys_mem_allocator, init_num_phys_mem=",),
            "VirtMem.extend": ("self, num_phys_mem",),
            "VirtMem.shrink": ("self, num_phys_mem",),
            "VirtMem.realloc": ("self, num_bytes",),
            "VirtMem.destroy": ("self",),
            **{f"VirtMem.{name}": () for name in ("address", "phys_mem_size", "mapped_bytes", "virtual_bytes", "num_phys_mem")},
        },
    ),
)
"""Of the KV cache manager V2 as far as it is Python; without them the KV memory of an engine that stands by is its own."""
