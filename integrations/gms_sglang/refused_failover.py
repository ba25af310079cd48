"""What an engine of SGLang that fails over cannot be, each refused with the reason and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gms_core.errors import EngineUnsupported
from gms_sglang.arguments import Option

_HTTP = "Start it with `python -m sglang.launch_server` or `sglang serve`, without this option."
_ONE = "Start it without failover, or as one group of ranks on one node."

_Refusal = tuple[Any, str, str]


def check_memory(option: Option) -> None:
    """Refuse what puts more into KV memory, or more behind it, than can be handed over. What depends on the model is known later (`shadow`).

    Args:
        option: The engine's options.

    Raises:
        EngineUnsupported: Names the option.
    """
    refused = {
        "--enable-hierarchical-cache": option("enable_hierarchical_cache"),
        "--enable-hisparse": option("enable_hisparse"),
        "--enable-lmcache": option("enable_lmcache"),
        "--enable-unified-memory": option("enable_unified_memory"),
        "--pipeline-parallel-size": (option("pp_size") or 1) > 1,
        "--speculative-algorithm": option("speculative_algorithm"),
    }
    _refuse(
        (found, f"an engine with {name} cannot hand its KV memory over", f"Start it without {name}, or without failover.")
        for name, found in refused.items()
    )


def check_failover(option: Option) -> None:
    """Refuse what has an address that cannot be held until the engine is promoted, and what has ranks that could not be promoted together.

    Args:
        option: The engine's options, resolved.

    Raises:
        EngineUnsupported: Says what, why, and what to do.
    """
    _refuse((*_front_ends(option), *_tokenizer_workers(option), *_further_addresses(option), *_ranks(option)))


def _refuse(refusals: Iterable[_Refusal]) -> None:
    for refused, what, fix in refusals:
        if refused:
            raise EngineUnsupported(f"failover: {what}", hint=fix)


def _front_ends(option: Option) -> tuple[_Refusal, ...]:
    from sglang.srt.environ import envs

    rust = getattr(envs, "SGLANG_RUST_SERVER", None)
    return (
        (option("grpc_mode") or option("smg_grpc_mode"), "a gRPC front end cannot be held until its engine is promoted", _HTTP),
        (option("use_ray"), "an engine whose ranks Ray has started does not end with its first process", "Start it without --use-ray."),
        (rust is not None and rust.get(), "the front end in Rust cannot be held until its engine is promoted", "Unset SGLANG_RUST_SERVER."),
        (option("enable_http2"), "the front end for HTTP/2 listens before its engine is ready", "Start it without --enable-http2."),
        (
            (option("detokenizer_worker_num") or 1) > 1,
            "the process between several detokenizers and the schedulers is none of the engine's that are watched",
            "Start it without --detokenizer-worker-num.",
        ),
    )


def _tokenizer_workers(option: Option) -> tuple[_Refusal, ...]:
    """Several of them are started by GMS, and have one listening socket in common."""
    from sglang.srt.environ import envs

    if (option("tokenizer_worker_num") or 1) == 1:
        return ()
    app = getattr(envs, "SGLANG_HTTP_SERVER_APP_PATH", None)
    return (
        (
            option("enable_http_worker_reuseport"),
            "tokenizer workers that have a socket each listen before their engine is promoted",
            "Start it without --enable-http-worker-reuseport.",
        ),
        (
            option("enable_ssl_refresh"),
            "certificates are not refreshed where there are several tokenizer workers",
            "Start it without --enable-ssl-refresh, or without --tokenizer-worker-num.",
        ),
        (
            app is not None and app.is_set(),
            "an app of one's own cannot be held until its engine is promoted",
            "Unset SGLANG_HTTP_SERVER_APP_PATH, or start it without --tokenizer-worker-num.",
        ),
    )


def _further_addresses(option: Option) -> tuple[_Refusal, ...]:
    return (
        (
            option("grpc_port") is not None,
            "the gRPC server beside the HTTP server listens before the engine is promoted",
            "Start it without --grpc-port.",
        ),
        (option("sidecar"), "a sidecar speaks to the engine before it is promoted", "Start it without --sidecar."),
        (
            option("disaggregation_mode") not in (None, "null"),
            "an engine of one phase is known by its bootstrap address, which a shadow cannot share",
            "Start it without --disaggregation-mode.",
        ),
        (option("warmups"), "warm-ups of one's own compute before the engine is promoted", "Leave --warmups out: the rehearsal takes their place."),
        (
            option("checkpoint_engine_wait_weights_before_ready"),
            "an engine that waits for weights from elsewhere is not ready to stand by",
            "Start it without --checkpoint-engine-wait-weights-before-ready.",
        ),
    )


def _ranks(option: Option) -> tuple[_Refusal, ...]:
    return (
        ((option("nnodes") or 1) > 1, "ranks on several nodes are not promoted together yet", _ONE),
        ((option("dp_size") or 1) > 1, "with data parallelism there is nobody whom all schedulers listen to", _ONE),
    )
