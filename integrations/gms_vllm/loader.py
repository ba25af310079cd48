"""The load format ``gms``: publish what is not published yet, attach to what is."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from gms_core.client import WriteLease
from gms_core.errors import EngineUnsupported
from gms_core.weights.options import LOAD_FORMAT, LoaderOptions
from gms_vllm.config import inner_load_config, loader_options

# vLLM also imports this where it only looks at a model's class: what loading needs is imported when it is needed.

log = logging.getLogger("vllm.gms")


def register_loader() -> None:
    """Tell vLLM about the load format."""
    register_model_loader(LOAD_FORMAT)(GmsModelLoader)


class GmsModelLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads a model through GMS. Making one costs nothing and connects to nothing: vLLM makes several in a process."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.options: LoaderOptions = loader_options(load_config.model_loader_extra_config or {})

    def download_model(self, model_config: Any) -> None:
        """Fetch the checkpoint, unless this engine only ever attaches."""
        if self.options.gms.mode != "ro":
            self._inner().download_model(model_config)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:  # noqa: ARG002 - vLLM's interface
        """Refused: vLLM calls it to load into a model that is there already, and these weights are shared."""
        raise EngineUnsupported("weights that GMS shares are not loaded a second time into the same model", hint="Start another engine.")

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes of weights that other processes have put on this device already, for vLLM's budget (0.32 on)."""
        from gms_vllm.accounting import external_bytes

        return external_bytes(vllm_config, self.options.gms)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """Publish or attach.

        Raises:
            GmsError: Neither was possible; the message says why. Nothing of this engine is left in the server.
        """
        from gms_core.pytorch.device import free_memory
        from gms_core.weights.identity import known_content
        from gms_core.weights.leases import acquire
        from gms_core.weights.loading import publish_or_attach
        from gms_vllm import reader, writer
        from gms_vllm.files import check_checkpoint, weight_files
        from gms_vllm.identity import expected_identity
        from gms_vllm.place import LoadRequest, all_ranks, connect, pool_name
        from gms_vllm.unsupported import check_config, check_engine, check_worker, is_draft

        check_engine()
        request = LoadRequest(vllm_config, model_config, prefix)
        if is_draft(vllm_config, model_config):
            log.info("%s is the draft model of speculative decoding: it is loaded into this engine's own memory", model_config.model)
            return self._inner().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        check_config(vllm_config)
        check_worker(str(vllm_config.parallel_config.worker_cls))
        options = self.options.gms
        inner = options.inner.lower()
        files = weight_files(model_config, inner, self.load_config.download_dir)
        identity = expected_identity(vllm_config, model_config, content=known_content(files, inner), extra=options.identity)
        session = connect(options, rank=vllm_config.parallel_config.rank)

        def publish(lease: WriteLease) -> tuple[torch.nn.Module, bytes]:
            check_checkpoint(model_config, inner)
            return writer.load(request, self._inner(), lease)

        model, _ = publish_or_attach(
            session,
            lambda: acquire(session, pool_name(vllm_config, options), identity, options, all_ranks),
            publish=publish,
            attach=partial(reader.attach, request),
            free_memory=free_memory,
            identity=identity,
            files=files,
        )
        return model

    def _inner(self) -> BaseModelLoader:
        return get_model_loader(inner_load_config(self.load_config, self.options))
