"""Under which names SGLang is distributed."""

DISTRIBUTIONS = ("sglang",)
