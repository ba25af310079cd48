"""What decides whether weights that another engine has loaded are those that this one needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from gms_core.checkpoint import WEIGHTS, find_weights
from gms_core.errors import ConfigurationError
from gms_core.layout import Identity
from gms_core.pytorch.device import device_name
from gms_core.weights.files import model_folder
from gms_core.weights.identity import digest_of, known_content, whereabouts
from gms_trtllm.place import is_cpu
from gms_trtllm.ranks import rank, world_size

_OF_NO_WEIGHT = frozenset(
    {
        "model",
        "revision",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "skip_tokenizer_init",
        "load_format",
        "gms_config",
        "sleep_config",
        "batching_type",
        "cuda_graph_config",
        "disable_overlap_scheduler",
        "enable_chunked_prefill",
        "enable_iter_perf_stats",
        "enable_iter_req_stats",
        "free_gpu_memory_fraction",
        "host_cache_size",
        "enable_block_reuse",
        "enable_partial_reuse",
        "iter_stats_max_iterations",
        "max_batch_size",
        "max_gpu_total_bytes",
        "max_num_tokens",
        "max_tokens",
        "otlp_traces_endpoint",
        "perf_metrics_max_requests",
        "postprocess_tokenizer_dir",
        "num_postprocess_workers",
        "print_iter_log",
        "request_stats_max_iterations",
        "return_perf_metrics",
        "scheduler_config",
        "stream_interval",
        "use_kv_cache_manager_v2",
    }
)
"""Options, at whatever depth, that say where things come from, how requests are scheduled and watched, and how large the KV cache is. Any other that
is not at its default, one that is not known here too, may choose kernels, or how weights are divided, and with them the layout of weights."""

_CONFIGURATION = ("config.json", "hf_quant_config.json", "quantize_config.json", "quant_cfg.json")

_SHORT = 64
"""Characters of a value that is shown as it is; longer ones are compared by a digest."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What this process loads.

    Attributes:
        args: Options of its engine.
        draft: Where the checkpoint of a draft model is, if it is that; else empty.
    """

    args: Any
    draft: str = ""

    @property
    def _place(self) -> tuple[str, str | None]:
        """Where the checkpoint is, and its revision."""
        return (self.draft, None) if self.draft else (str(self.args.model), getattr(self.args, "revision", None))

    def files(self) -> list[Path]:
        """Weight files of the checkpoint, as far as they lie on this machine. Reads none."""
        folder = model_folder(*self._place, None)
        return [] if folder is None else find_weights(folder, WEIGHTS)

    def _configuration(self) -> str:
        """Digest of the files beside the weights that say what these mean, such as how they are quantised; empty where there are none."""
        folder = model_folder(*self._place, None)
        found = [] if folder is None else [folder / name for name in _CONFIGURATION if (folder / name).is_file()]
        return digest_of({path.name: path.read_text(encoding="utf-8", errors="replace") for path in found}) if found else ""

    def identity(self, files: list[Path]) -> Identity:
        """The identity of this rank's weights.

        Args:
            files: Of the checkpoint.
        """
        import tensorrt_llm
        from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

        model, revision = self._place
        fields = {
            "content": known_content(files, "auto"),
            "model": whereabouts(model),
            "revision": str(revision or ""),
            "configuration": self._configuration(),
            "engine": "tensorrt_llm",
            "engine_version": str(tensorrt_llm.__version__),
            "torch_version": str(torch.__version__),
            "device": device_name(is_cpu=is_cpu()),
            "rank": f"{rank()}/{world_size()}",
            "transforms": "staged" if hasattr(ModelLoader, "_setup_aliases") else "one sweep",
            **options(self.args),
        }
        return Identity({name: value for name, value in fields.items() if value})


_expected: dict[str, Expected] = {}


def expect(args: Any) -> None:
    """Say what this process loads from now on under the tag of these options."""
    _expected[args.gms_config.tag] = Expected(args)


def expected(tag: str) -> Expected:
    """What this process loads under a tag.

    Raises:
        ConfigurationError: Nobody has said it.
    """
    if tag not in _expected:
        raise ConfigurationError(
            "it is not known what this process loads, so that it cannot be compared with what is published",
            hint="Call gms_trtllm.install() before the engine is made.",
        )
    return _expected[tag]


def options(args: Any) -> dict[str, str]:
    """Options that may decide what weights look like, as far as they are not at their defaults."""
    chosen = args.model_dump(exclude_defaults=True)
    values = {name: plain(value, _OF_NO_WEIGHT) for name, value in chosen.items() if name not in _OF_NO_WEIGHT}
    return {f"option {name}": _shown(value) for name, value in values.items() if value not in (None, {}, [])}


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHORT and not isinstance(value, (dict, list)) else digest_of(value)


def plain(value: object, leave_out: Collection[str]) -> object:
    """An option as JSON can hold it; an object counts as its class, for where it lies in memory means nothing elsewhere.

    Args:
        value: Of the option.
        leave_out: Options inside it, at whatever depth, that do not count.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, leave_out) for key, item in value.items() if key not in leave_out}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(item, leave_out) for item in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (str, int, float, Path)):
        return value if not isinstance(value, Path) else str(value)
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
