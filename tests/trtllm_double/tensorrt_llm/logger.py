"""Upstream's logger."""

import logging

logger = logging.getLogger("TRT-LLM")
