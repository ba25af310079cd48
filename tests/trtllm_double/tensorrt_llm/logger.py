"""Upstream's logger: its level is that of TLLM_LOG_LEVEL, which reaches every rank."""

import logging
import os
import sys

logger = logging.getLogger("TRT-LLM")
if "TLLM_LOG_LEVEL" in os.environ:
    logger.setLevel(os.environ["TLLM_LOG_LEVEL"].upper())
    logger.addHandler(logging.StreamHandler(sys.stderr))
