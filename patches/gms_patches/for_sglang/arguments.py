"""The options of SGLang's server that the adapter reads or sets: one record before 0.5.20, declared by subject from then on."""

from __future__ import annotations

from gms_patches.patch import Symbol

_REFUSED = "refusals"
_GATE = "holding a shadow"
_IDENTITY = "the identity of the weights"
_KV = "the identity of the KV memory"


def _options(feature: str, module: str, owner: str, *names: str) -> tuple[Symbol, ...]:
    """Options, and the class of ``sglang.srt.arg_groups.fields`` that declares them from 0.5.20 on."""
    record = (Symbol(f"sglang.srt.server_args:ServerArgs.{name}", feature, (), "<0.5.20") for name in names)
    return (*record, *_new_options(feature, module, owner, *names))


def _new_options(feature: str, module: str, owner: str, *names: str) -> tuple[Symbol, ...]:
    """Options that 0.5.16 does not have."""
    return tuple(Symbol(f"sglang.srt.arg_groups.fields.{module}:{owner}.{name}", feature, (), ">=0.5.20") for name in names)


def _newest_options(feature: str, module: str, owner: str, *names: str) -> tuple[Symbol, ...]:
    """Options that 0.5.20 does not have."""
    return tuple(Symbol(f"sglang.srt.arg_groups.fields.{module}:{owner}.{name}", feature, (), ">=0.5.23") for name in names)


ARGUMENTS: tuple[Symbol, ...] = (
    *_options("the load format", "model", "Model", "load_format", "model_path", "model_loader_extra_config"),
    *_options("draft models", "spec", "Spec", "speculative_algorithm", "speculative_draft_load_format"),
    # Whatever writes to published weights, or puts a second allocator under KV memory.
    *_options(_REFUSED, "exec_", "ExecFeatures", "enable_memory_saver", "enable_weights_cpu_backup", "enable_draft_weights_cpu_backup"),
    *_options(_REFUSED, "exec_", "ExecOffload", "cpu_offload_gb", "offload_group_size"),
    *_new_options(_REFUSED, "exec_", "ExecOffload", "ple_offload_embedding"),
    *_options(_REFUSED, "exec_", "ExecMoe", "enable_eplb", "elastic_ep_backend", "kt_weight_path"),
    *_options(_REFUSED, "model", "Model", "modelopt_quant", "quantization", "quantize_and_serve", "rl_quant_profile"),
    *_new_options(_REFUSED, "model", "Model", "weight_cache_mode", "startup_weight_load_mode"),
    Symbol("sglang.srt.server_args:ServerArgs.torchao_config", _REFUSED, (), "<0.5.18"),
    *_options(_REFUSED, "memory", "Memory", "enable_hierarchical_cache", "enable_hisparse", "enable_lmcache", "enable_unified_memory"),
    # Ways to serve that never come to the function which the gate hooks.
    *_options(_REFUSED, "disagg", "Disagg", "disaggregation_mode", "encoder_only"),
    *_options(_REFUSED, "device", "Device", "use_ray"),
    *_options(_REFUSED, "serving", "Serving", "smg_grpc_mode", "grpc_mode", "grpc_port", "sidecar", "enable_http2", "warmups", "enable_ssl_refresh"),
    *_newest_options(_REFUSED, "serving", "Serving", "enable_http_worker_reuseport"),
    *_options(_REFUSED, "model", "Model", "checkpoint_engine_wait_weights_before_ready"),
    *_options(_REFUSED, "parallel", "Parallel", "nnodes"),
    *_options(_GATE, "serving", "Serving", "host", "port", "skip_server_warmup", "skip_tokenizer_init"),
    *_options(_GATE, "serving", "Serving", "tokenizer_worker_num", "detokenizer_worker_num"),
    *_options(_GATE, "serving", "Serving", "api_key", "admin_api_key"),
    *_options(_IDENTITY, "device", "Device", "device"),
    *_options(_IDENTITY, "parallel", "Parallel", "tp_size", "pp_size", "dp_size", "ep_size", "moe_dp_size", "moe_dense_tp_size"),
    *_options(_IDENTITY, "parallel", "Parallel", "attn_cp_size", "dcp_size", "enable_dp_attention", "enable_dp_lm_head"),
    *_new_options(_IDENTITY, "parallel", "Parallel", "dwdp_size", "enable_shared_experts_attn_tp", "enable_dense_mlp_attn_tp"),
    *_newest_options(_IDENTITY, "parallel", "Parallel", "attn_dp_size", "shared_experts_tp_size"),
    *_options(_IDENTITY, "mm", "Mm", "mm_enable_dp_encoder"),
    *_options(_IDENTITY, "lora", "Lora", "enable_lora"),
    *_options(_IDENTITY, "exec_", "ExecMoe", "moe_runner_backend", "moe_a2a_backend", "ep_num_redundant_experts", "init_expert_location"),
    *_options(_IDENTITY, "exec_", "ExecMoe", "disable_shared_experts_fusion"),
    *_options(_IDENTITY, "exec_", "ExecKernel", "attention_backend", "decode_attention_backend", "prefill_attention_backend"),
    *_options(_IDENTITY, "exec_", "ExecKernel", "fp8_gemm_runner_backend", "fp4_gemm_runner_backend"),
    *_options(_IDENTITY, "exec_", "ExecDeterministic", "rl_on_policy_target"),
    *_options(_IDENTITY, "spec", "Spec", "speculative_moe_runner_backend"),
    *_options(_IDENTITY, "model", "Model", "json_model_override_args"),
    *_options(_KV, "model", "Model", "kv_cache_dtype"),
    *_options(_KV, "schedule", "Schedule", "mem_fraction_static", "max_total_tokens", "page_size"),
)
