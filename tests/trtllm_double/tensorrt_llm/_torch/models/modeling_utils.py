"""How models are made, and which loaders of checkpoints there are."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING = {}


def register_checkpoint_loader(name):
    def register(kind):
        CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING[name] = kind
        return kind

    return register


class MetaInitMode:
    """While it lasts modules are made without memory; a model that cannot be made so raises."""

    def __enter__(self):
        self._device = torch.device("meta")
        self._device.__enter__()
        return self

    def __exit__(self, *error):
        self._device.__exit__(*error)


@dataclass
class ModelConfig:
    """What a model is built from: the file ``config.json`` of its checkpoint, and the rank's part."""

    pretrained_config: dict
    mapping: object

    @classmethod
    def from_pretrained(cls, checkpoint_dir, mapping):
        return cls(json.loads(Path(checkpoint_dir, "config.json").read_text()), mapping)


class AutoModelForCausalLM:
    @staticmethod
    def from_config(config):
        from tensorrt_llm._torch.models.modeling_tiny import TinyLlama

        return TinyLlama(config)


from tensorrt_llm._torch.models import checkpoints  # noqa: E402, F401 - it registers its loader
