"""Loaders of checkpoints: how bytes get from disk to a rank."""

from pathlib import Path

from safetensors.torch import load_file
from tensorrt_llm._double import HAS_STAGED_HOOKS
from tensorrt_llm._torch.models.modeling_utils import register_checkpoint_loader


class BaseCheckpointLoader:
    checkpoint_format = ""

    def __init__(self):
        self.reads = 0

    def load_weights(self, checkpoint_dir, **options):
        """Name to tensor; empty if they were put into the model right away, or if there are none."""
        raise NotImplementedError

    def get_initialized_weight_mapper(self, model, config):
        return WeightMapper(model)

    if HAS_STAGED_HOOKS:

        def is_weights_preloaded(self):
            return False

        def post_load_apply(self, model, *, weights_preloaded):
            pass

        def post_load_publish(self, model, *, checkpoint_dir, weights_preloaded, source_identity=None):
            pass


@register_checkpoint_loader("HF")
class HfCheckpointLoader(BaseCheckpointLoader):
    checkpoint_format = "HF"

    def load_weights(self, checkpoint_dir, **options):
        self.reads += 1
        weights = {}
        for path in sorted(Path(checkpoint_dir).glob("*.safetensors")):
            weights.update(load_file(path))
        return weights


class WeightMapper:
    """Knows which names of a checkpoint are which of a model."""

    def __init__(self, model):
        self.model = model
