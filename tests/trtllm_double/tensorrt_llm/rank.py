"""What a rank does with its options: it loads its part of the model, and computes."""

import copy

import torch
from tensorrt_llm._torch.models.modeling_utils import CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING
from tensorrt_llm._torch.pyexecutor._util import KvCacheCreator
from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
from tensorrt_llm._torch.pyexecutor.resource_manager import ResourceManagerType
from tensorrt_llm.llmapi.llm_args import LoadFormat
from tensorrt_llm.mapping import Mapping


class Rank:
    def __init__(self, args, rank, size):
        self.mapping = Mapping(size, rank, size)
        self.loaders = []
        self.reads = 0
        self.model = self._load(args, args.model)
        speculation = args.speculative_config
        self.draft = None
        if speculation is not None and not speculation.in_target:
            draft_args = copy.copy(args)
            if speculation.load_format == "dummy":
                draft_args.load_format = LoadFormat.DUMMY
            self.draft = self._load(draft_args, speculation.speculative_model)
        self.kv = self._make_kv_cache(args)
        self.forward([1, 2, 3])  # as a warm-up does, which graphs are captured of

    def _make_kv_cache(self, args):
        creator = KvCacheCreator(model_engine=self.model, kv_cache_config=args.kv_cache_config)
        resources = {}
        is_estimating = creator.try_prepare_estimation()
        creator.build_managers(resources, is_estimating)
        if is_estimating:
            creator.configure_kv_cache_capacity()
            creator.teardown_managers(resources)
            creator.build_managers(resources, False)
        return resources[ResourceManagerType.KV_CACHE_MANAGER]

    def kv_blocks(self):
        return self.kv.blocks_in_primary_pool

    def _load(self, args, checkpoint_dir):
        checkpoint_loader = args.checkpoint_loader or CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING[args.checkpoint_format]()
        loader = ModelLoader(args, self.mapping, args.speculative_config, None, 64, 64)
        self.loaders.append(loader)
        model, _ = loader.load(checkpoint_dir, checkpoint_loader)
        self.reads += checkpoint_loader.reads
        return model

    def forward(self, tokens):
        with torch.no_grad():
            return self.model(torch.tensor(self.kv.keep(tokens)) % len(self.model.embed)).tolist()

    def forward_draft(self, tokens):
        with torch.no_grad():
            return self.draft(torch.tensor(tokens)).tolist()

    def was_read(self):
        """How often the checkpoint loader was asked for weights."""
        return self.reads

    def sleep(self, sleep_tags):
        from tensorrt_llm._torch.virtual_memory import release_with_tag

        if "kv_cache" in sleep_tags:
            self.kv.reset_reuse_state()  # whether upstream does is not known
        release_with_tag(*sleep_tags)

    def wakeup(self, wakeup_tags):
        from tensorrt_llm._torch.virtual_memory import materialize_with_tag

        materialize_with_tag(*wakeup_tags)

    def mapped(self):
        """How many mappings of published memory this process has."""
        with open("/proc/self/maps") as maps:
            return sum("memfd:gms" in line for line in maps)

    def cleanup(self):
        for loader in self.loaders:
            cleanup = getattr(loader, "cleanup", None)
            if cleanup is not None:
                cleanup()
