"""How a rank loads its model."""

import contextlib
import copy

import torch
from tensorrt_llm import _double
from tensorrt_llm._double import HAS_GMS, HAS_STAGED_HOOKS
from tensorrt_llm._torch.models import modeling_tiny
from tensorrt_llm._torch.models.modeling_utils import AutoModelForCausalLM, MetaInitMode, ModelConfig
from tensorrt_llm._torch.source_identity import SourceIdentity
from tensorrt_llm.llmapi.llm_args import LoadFormat
from tensorrt_llm.logger import logger


@contextlib.contextmanager
def timing(message):
    yield


@contextlib.contextmanager
def maybe_create_moe_load_balancer(model_config, mapping):
    yield None


def get_rank_model_storage(model):
    """Bytes of a rank's parameters; those on ``meta`` have none."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters() if not tensor.is_meta)


class _Base:
    def __init__(
        self,
        llm_args,
        mapping,
        spec_config,
        sparse_attention_config,
        max_num_tokens,
        max_seq_len,
        lora_config=None,
        model_weights_memory_tag=None,
        model_weights_restore_mode=None,
    ):
        self.llm_args = llm_args
        self.mapping = mapping
        self.spec_config = spec_config
        self.max_num_tokens = max_num_tokens
        self.max_seq_len = max_seq_len
        self.model_weights_memory_tag = model_weights_memory_tag
        self.weight_mapper = None

    def _load_and_validate_config(self, checkpoint_dir, checkpoint_loader):
        return ModelConfig.from_pretrained(checkpoint_dir, self.mapping)

    def _construct(self, config):
        """The model, and whether it has no memory yet."""
        try:
            with MetaInitMode():
                model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            if not HAS_GMS:  # upstream used to do so here, where an error is taken for a model that cannot be made on `meta`
                self._give_memory(model)
            return model, HAS_GMS
        except Exception as error:
            logger.info("the model cannot be made without memory: %s", error)
            return AutoModelForCausalLM.from_config(config), False

    def load(self, checkpoint_dir, checkpoint_loader):
        config = self._load_and_validate_config(checkpoint_dir, checkpoint_loader)
        with maybe_create_moe_load_balancer(config, self.mapping) as moe_load_balancer:
            model, is_on_meta = self._construct(config)
            self._fill(model, is_on_meta, checkpoint_dir, checkpoint_loader, config)
        return model.eval(), moe_load_balancer

    def _fill(self, model, is_on_meta, checkpoint_dir, checkpoint_loader, config):
        if is_on_meta:
            self._give_memory(model)
        model.to(_double.DEVICE)
        if self.llm_args.load_format == LoadFormat.AUTO:
            weights = checkpoint_loader.load_weights(checkpoint_dir, mapping=self.mapping)
            self._map(model, weights, checkpoint_loader, config)
        modeling_tiny.full_post_load(model)

    @staticmethod
    def _give_memory(model):
        model._apply(lambda tensor: torch.empty_like(tensor, device=_double.DEVICE) if tensor.is_meta else tensor)
        for module in model.modules():
            if isinstance(module, modeling_tiny.Block):
                module.steps.copy_(torch.arange(len(module.steps)))

    def _map(self, model, weights, checkpoint_loader, config):
        self.weight_mapper = checkpoint_loader.get_initialized_weight_mapper(model, config)
        model.load_weights(weights, self.weight_mapper)
        if self.spec_config is not None and self.spec_config.in_target:
            model.load_draft_weights(checkpoint_loader.load_weights(self.spec_config.speculative_model, mapping=self.mapping), self.weight_mapper)
        elif model.draft_model is not None:
            draft = {name: tensor for name, tensor in weights.items() if name.startswith("draft.")}
            model.load_draft_weights(draft, self.weight_mapper)

    def reload(self, model, weights):
        if self.weight_mapper is None:
            raise RuntimeError("this model cannot be loaded once more: its weights were not mapped here")
        model.load_weights(weights, self.weight_mapper)

    # Later versions walk in stages.
    _setup_aliases = staticmethod(modeling_tiny.setup_aliases)
    _walk_cache_state = staticmethod(modeling_tiny.cache_derived_state)
    _walk_full_post_load = staticmethod(modeling_tiny.full_post_load)


if not HAS_STAGED_HOOKS:
    del _Base._setup_aliases, _Base._walk_cache_state, _Base._walk_full_post_load

ModelLoader = _Base

if HAS_GMS:
    from tensorrt_llm._torch.memory.gpu_memory_backend import GMSBackend

    class ModelLoader(_Base):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self._gms_backend = None

        def _fill(self, model, is_on_meta, checkpoint_dir, checkpoint_loader, config):
            if self.llm_args.load_format != LoadFormat.GMS:
                super()._fill(model, is_on_meta, checkpoint_dir, checkpoint_loader, config)
                return
            options = self.llm_args.gms_config
            backend = GMSBackend(options.socket_path, self.mapping, mode=options.mode, tag=options.tag)
            if not backend.connect():
                raise RuntimeError(f"Failed to connect to GMS at {backend._socket_path}")
            self._gms_backend = backend
            try:
                if backend.is_rw is None:
                    raise RuntimeError("GMS lock state is unset after connect")
                if backend.is_rw:
                    self._write(backend, model, is_on_meta, checkpoint_dir, checkpoint_loader, config)
                else:
                    self._read(backend, model, checkpoint_dir, checkpoint_loader)
            except BaseException:
                backend.cleanup()
                self._gms_backend = None
                raise

        def _write(self, backend, model, is_on_meta, checkpoint_dir, checkpoint_loader, config):
            identity = self._source_identity(model, checkpoint_loader)
            with backend.mem_pool_scope(torch.device(_double.DEVICE)):
                if is_on_meta:
                    self._give_memory(model)
                model.to(_double.DEVICE)
                also = {"source_identity": identity} if HAS_STAGED_HOOKS else {}
                weights = checkpoint_loader.load_weights(checkpoint_dir, mapping=self.mapping, model=model, **also)
                preloaded = bool(getattr(checkpoint_loader, "is_weights_preloaded", lambda: False)())
                if weights:
                    self._map(model, weights, checkpoint_loader, config)
                elif not preloaded:
                    raise RuntimeError(
                        f"GMS RW: checkpoint loader '{type(checkpoint_loader).__name__}' returned empty weights ({checkpoint_dir}) and did not "
                        "preload the model. Refusing to commit an unpopulated model to the GMS pool."
                    )
                if HAS_STAGED_HOOKS:
                    checkpoint_loader.post_load_apply(model, weights_preloaded=preloaded)
                modeling_tiny.full_post_load(model)
                backend.move_untracked_params(model)
                _double.empty_cache()
                if HAS_STAGED_HOOKS:
                    checkpoint_loader.post_load_publish(model, checkpoint_dir=checkpoint_dir, weights_preloaded=preloaded, source_identity=identity)
            backend.finalize_write(model)

        def _read(self, backend, model, checkpoint_dir, checkpoint_loader):
            if not HAS_STAGED_HOOKS:
                modeling_tiny.full_post_load(model)
                backend.materialize_module(model)
                return
            checkpoint_loader.post_load_apply(model, weights_preloaded=True)
            self._setup_aliases(model)
            self._check_gms_source_identity(backend, self._source_identity(model, checkpoint_loader))
            backend.materialize_module(model)
            self._walk_cache_state(model)
            checkpoint_loader.post_load_publish(model, checkpoint_dir=checkpoint_dir, weights_preloaded=True)

        def _source_identity(self, model, checkpoint_loader):
            wanted = checkpoint_loader.checkpoint_format == "MX" or self.llm_args.load_format == LoadFormat.GMS
            return SourceIdentity(type(model).__name__, self.mapping.tp_size, self.mapping.tp_rank) if wanted and HAS_STAGED_HOOKS else None

        @staticmethod
        def _check_gms_source_identity(backend, local):
            local.check(backend.get_source_identity())

        def cleanup(self):
            backend, self._gms_backend = self._gms_backend, None
            if backend is not None:
                backend.cleanup()
