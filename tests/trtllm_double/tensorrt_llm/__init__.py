"""The double of TensorRT-LLM."""

from tensorrt_llm.llmapi.llm import LLM

__all__ = ["LLM"]
__version__ = "1.3.0.double"
