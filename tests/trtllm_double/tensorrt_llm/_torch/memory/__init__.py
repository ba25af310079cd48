"""Memory that other processes own. Only where upstream knows GMS."""

from tensorrt_llm._double import HAS_GMS

if not HAS_GMS:
    raise ModuleNotFoundError("No module named 'tensorrt_llm._torch.memory'", name=__name__)
