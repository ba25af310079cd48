"""The loader of the load format ``gms``: publish what is not published yet, attach to what is."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader import loader as stock
from sglang.srt.model_loader.loader import BaseModelLoader
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.plugins.hook_registry import HookType

from gms_core.client import ReadLease, WriteLease
from gms_core.pytorch import Slot, capture, check_no_meta, materialise, publish
from gms_core.vmm.driver import Access
from gms_core.weights.holdings import Due, Figures, Holding, commit, commit_due, defer_commits, keep, report
from gms_core.weights.identity import check_content, final_identity, known_content
from gms_core.weights.leases import Granted, acquire
from gms_core.weights.options import LoaderOptions, loader_options
from gms_sglang.files import check_checkpoint, weight_files
from gms_sglang.hooks import Hook, engage
from gms_sglang.identity import expected_identity
from gms_sglang.place import all_ranks, connect, pool_name, torch_device

NO_INNER = {
    "gms": "a GMS loader cannot read the checkpoint for itself",
    "ipc_cache": "it shares the weights of another daemon",
    "bitsandbytes": "its weights cannot be shared after post-processing",
}


def _publish_first(*_: Any, **__: Any) -> None:
    """An engine that publishes measures its memory first: a reader that attached meanwhile would be in the measurement."""
    commit_due()


HOOKS = (Hook("sglang.srt.managers.scheduler.Scheduler.run_event_loop", HookType.BEFORE, _publish_first),)


class GmsModelLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads a model through GMS. Making one costs nothing and connects to nothing."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.options: LoaderOptions = loader_options(load_config.model_loader_extra_config or {}, NO_INNER)
        self.preloaded_weights_bytes = 0

    def download_model(self, model_config: Any) -> None:
        """Fetch the checkpoint, unless this engine only ever attaches."""
        if self.options.gms.mode != "ro":
            self._inner(model_config).download_model(model_config)

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """Publish or attach.

        Raises:
            GmsError: Neither was possible; the message says why. Nothing of this engine is left in the server.
        """
        engage(HOOKS)
        defer_commits()
        options, inner = self.options.gms, self.options.gms.inner.lower()
        files = weight_files(model_config, inner, self.load_config.download_dir)
        content = known_content(files, inner)
        identity = expected_identity(model_config, content=content, extra=options.identity)
        session = connect(options)
        try:
            pool = pool_name(options, is_draft=model_config.is_draft_model)
            granted = acquire(session, pool, identity, options, all_ranks())
            holding = Holding(session, granted.lease)
            if isinstance(granted.lease, WriteLease):
                check_checkpoint(model_config, inner)
                model = self._publish(model_config, device_config, holding, granted.lease, granted, files, identity)
            else:
                if not content:
                    check_content(files, granted.lease.layout.identity)
                model = self._attach(model_config, holding, granted.lease, granted)
            keep(holding)
        except BaseException:
            session.close()
            raise
        return model

    def _publish(
        self, model_config: Any, device_config: Any, holding: Holding, lease: WriteLease, granted: Granted, files: Any, identity: Any
    ) -> torch.nn.Module:
        start, device = time.perf_counter(), torch_device()
        checkpoint_bytes = sum(path.stat().st_size for path in files) if files else -1
        final = final_identity(identity, files)
        with capture(lease.arena, device):
            model = self._inner(model_config).load_model(model_config=model_config, device_config=device_config)
        gc.collect()
        manifest = publish(model, lease.arena, device=device)
        lease.trim()
        lease.arena.set_access(Access.READ)
        commit(Due(holding, lease, manifest, final, time.perf_counter() - start, granted.wait_seconds, checkpoint_bytes))
        return model

    def _attach(self, model_config: Any, holding: Holding, lease: ReadLease, granted: Granted) -> torch.nn.Module:
        start, device = time.perf_counter(), torch_device()
        arena, config = lease.map(), self._inner_config()
        quantisation = stock._get_quantization_config(model_config, config)  # noqa: SLF001 - what SGLang's own loaders call
        with set_default_torch_dtype(model_config.dtype), torch.device("meta"):
            model = stock._initialize_model(model_config, config, quantisation)  # noqa: SLF001 - as above
        materialise(model, lease.layout.manifest, arena, device=device, rebuilt=_always, allow_changes=True)
        check_no_meta(model)
        layout = lease.layout
        self.preloaded_weights_bytes = holding.external_bytes = layout.size
        seconds = time.perf_counter() - start
        report(holding, Figures("attached", lease.pool, layout.generation, layout.size, seconds, granted.wait_seconds, checkpoint_bytes=0))
        return model.eval()

    def _inner(self, model_config: Any) -> BaseModelLoader:
        return stock.get_model_loader(self._inner_config(), model_config)

    def _inner_config(self) -> LoadConfig:
        """The configuration of SGLang's own loader that reads the checkpoint."""
        return dataclasses.replace(self.load_config, load_format=self.options.gms.inner.lower(), model_loader_extra_config=dict(self.options.rest))


def _always(slot: Slot) -> bool:  # noqa: ARG001 - a filter of slots
    """Anything may be on one side only before post-processing."""
    return True
