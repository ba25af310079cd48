"""The patches for TensorRT-LLM, each for one function. What takes the function's place belongs to the adapter.

None of them names versions: it is looked for what a version offers.
"""

from __future__ import annotations

from gms_patches.patch import Kind, Patch

TESTED = ""
"""Versions of TensorRT-LLM that were tested: none can be installed where GMS is built, so that signatures alone decide."""

DISTRIBUTIONS = ("tensorrt-llm", "tensorrt_llm")

_LOADER = "tensorrt_llm._torch.pyexecutor.model_loader:ModelLoader"

LOAD_MODEL = Patch(
    name="trtllm-load-model",
    target=f"{_LOADER}.load",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, checkpoint_dir, checkpoint_loader",),
    reason="A checkpoint loader is called when the model has memory of its own already, and is not given the model.",
    upstream="LoadFormat.GMS (NVIDIA/TensorRT-LLM#13926) makes it unnecessary.",
)

RELOAD_MODEL = Patch(
    name="trtllm-reload-model",
    target=f"{_LOADER}.reload",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, model, weights", "self, model, weights, allow_partial_loading="),
    reason="It would write to weights that are shared, and read-only.",
    upstream="Later versions refuse it for readers.",
)

_MEMORY = "tensorrt_llm._torch.virtual_memory"

RELEASE_MEMORY = Patch(
    name="trtllm-release-memory",
    target=f"{_MEMORY}:release_with_tag",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("*tags",),
    reason="An engine that sleeps gives up memory of its own alone: shared weights would stay mapped.",
    upstream="It leaves memory of GMS to whoever has placed it.",
)

MATERIALISE_MEMORY = Patch(
    name="trtllm-materialise-memory",
    target=f"{_MEMORY}:materialize_with_tag",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("*tags",),
    reason="Shared weights have to be mapped again before the engine computes.",
    upstream="It leaves memory of GMS to whoever has placed it.",
)

SERVE = Patch(
    name="trtllm-serve",
    target="tensorrt_llm.serve.openai_server:OpenAIServer.__call__",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, host, port, sockets=",),
    reason="A server listens as soon as its engine is up: a shadow must not.",
    upstream="There is no way to hold a server.",
)

_CREATOR = "tensorrt_llm._torch.pyexecutor._util:KvCacheCreator"

PREPARE_ESTIMATION = Patch(
    name="trtllm-prepare-estimation",
    target=f"{_CREATOR}.try_prepare_estimation",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self",),
    reason="A shadow would measure beside the engine that it stands in for, and take that one's memory for used.",
    upstream="It knows nothing of a KV cache that was planned by another engine.",
)

BUILD_MANAGERS = Patch(
    name="trtllm-build-managers",
    target=f"{_CREATOR}.build_managers",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, resources, estimating_kv_cache", "self, resources, estimating_kv_cache="),
    reason="The KV cache of an engine that stands by needs addresses, and memory only once it is promoted.",
    upstream="It gives memory to every address at once.",
)

PATCHES = (LOAD_MODEL, RELOAD_MODEL, RELEASE_MEMORY, MATERIALISE_MEMORY, SERVE, PREPARE_ESTIMATION, BUILD_MANAGERS)
"""The first two are applied where this version has no LoadFormat.GMS, the next two wherever it sleeps, the others where its engine fails over."""
