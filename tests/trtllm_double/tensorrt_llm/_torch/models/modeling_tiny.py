"""A small model in the manner of Llama: tied embeddings, a fused projection with a view of it, a projection that is packed after loading, a draft."""

import torch
from tensorrt_llm._double import HAS_STAGED_HOOKS
from tensorrt_llm._torch.distributed import AllReduce
from torch import nn


class Staged(nn.Module):
    """What has to be done after weights are loaded: in one sweep, or in the stages that upstream has made of it."""

    def setup_aliases(self):
        """Let names refer to the same tensors. It computes nothing, and can be done on ``meta``."""

    def transform_weights(self):
        """Change weights for good, once."""

    def cache_derived_state(self):
        """Compute what is no weight from weights."""

    def post_load_weights(self):
        self.setup_aliases()
        self.transform_weights()
        self.cache_derived_state()


class Block(Staged):
    def __init__(self, hidden, mapping):
        super().__init__()
        self.part = hidden // mapping.tp_size
        self.norm = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.qkv = nn.Parameter(torch.empty(3 * self.part, hidden), requires_grad=False)
        self.out = nn.Parameter(torch.empty(hidden, self.part), requires_grad=False)
        self.register_buffer("steps", torch.arange(hidden, dtype=torch.float32), persistent=False)
        self.is_packed = False
        self.allreduce = AllReduce()

    def setup_aliases(self):
        self.values = nn.Parameter(self.qkv.data[2 * self.part :], requires_grad=False)  # a view of the fused weight

    def transform_weights(self):
        if not self.is_packed:
            self.out.data = self.out.data.t().contiguous()
            self.is_packed = True

    def cache_derived_state(self):
        self.scale = self.norm.data.sum().reshape(1)  # a plain attribute

    def forward(self, x):
        x = x * self.norm + self.steps / 100
        q, k = x @ self.qkv[: self.part].t(), x @ self.qkv[self.part : 2 * self.part].t()
        return x + self.allreduce((torch.sigmoid(q) * k + x @ self.values.t()) @ self.out) * self.scale


class Draft(Staged):
    def __init__(self, hidden):
        super().__init__()
        self.head = nn.Parameter(torch.empty(hidden, hidden), requires_grad=False)


class TinyLlama(Staged):
    def __init__(self, model_config):
        super().__init__()
        config, mapping = model_config.pretrained_config, model_config.mapping
        self.model_config = model_config
        self.embed = nn.Parameter(torch.empty(config["vocab"], config["hidden"]), requires_grad=False)
        self.lm_head = nn.Module()
        self.lm_head.weight = nn.Parameter(torch.empty(config["vocab"], config["hidden"]), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config["hidden"], mapping) for _ in range(config["layers"]))
        self.draft_model = Draft(config["hidden"]) if config.get("draft") else None
        if config.get("no_meta_init"):
            self.odd = torch.ones(1).item()  # such a model cannot be made without memory

    def setup_aliases(self):
        self.lm_head.weight = self.embed

    def load_weights(self, weights, weight_mapper=None):
        """Copy what is there. What a checkpoint lacks stays as it was."""
        rank, size = self.model_config.mapping.tp_rank, self.model_config.mapping.tp_size
        if "embed" in weights:
            self.embed.data.copy_(weights["embed"])
            self.lm_head.weight.data.copy_(weights["embed"])
        for index, block in enumerate(self.blocks):
            if f"blocks.{index}.norm" in weights:
                block.norm.data.copy_(weights[f"blocks.{index}.norm"])
            if f"blocks.{index}.qkv" in weights:
                parts = [part.chunk(size)[rank] for part in weights[f"blocks.{index}.qkv"].chunk(3)]
                block.qkv.data.copy_(torch.cat(parts))
            if f"blocks.{index}.out" in weights:
                block.out.data.copy_(weights[f"blocks.{index}.out"].chunk(size, dim=1)[rank])

    def load_draft_weights(self, weights, weight_mapper=None):
        if "draft.head" in weights:
            self.draft_model.head.data.copy_(weights["draft.head"])

    def forward(self, tokens):
        x = self.embed[tokens]
        for block in self.blocks:
            x = block(x)
        if self.draft_model is not None:
            x = x @ self.draft_model.head
        return x @ self.lm_head.weight.t()


def setup_aliases(model):
    for module in model.modules():
        if isinstance(module, Staged):
            module.setup_aliases()


def cache_derived_state(model):
    for module in model.modules():
        if isinstance(module, Staged):
            module.cache_derived_state()


def full_post_load(model):
    """Each module's sweep; in stages, where upstream has those."""
    for module in list(model.modules()):
        if isinstance(module, Staged):
            if HAS_STAGED_HOOKS:
                module.setup_aliases()
                module.transform_weights()
                module.cache_derived_state()
            else:
                module.post_load_weights()
