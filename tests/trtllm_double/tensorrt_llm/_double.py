"""Which version this double stands for, and the device that takes the place of ``cuda``."""

import os

import torch

VARIANT = os.environ["TRTLLM_DOUBLE"]
HAS_GMS = VARIANT != "without_gms"
HAS_STAGED_HOOKS = VARIANT == "staged_hooks"
DEVICE = torch.device("cpu")


def current_device() -> int:
    """In the place of ``torch.cuda.current_device()``: each rank of a node has the device of its own number."""
    return int(os.environ.get("TRTLLM_DOUBLE_DEVICE", "0"))


def mem_get_info() -> tuple[int, int]:
    """In the place of ``torch.cuda.mem_get_info()``: bytes that are free, and all. Memory of other engines is not free."""
    return int(os.environ.get("TRTLLM_DOUBLE_FREE", str(2**22))), 2**32


def empty_cache() -> None:
    """In the place of ``torch.cuda.empty_cache()``, so that tests can see when it is called."""
