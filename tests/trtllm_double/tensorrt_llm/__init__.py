"""The double of TensorRT-LLM."""

from tensorrt_llm.llmapi.llm import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams"]
__version__ = "1.3.0.double"
