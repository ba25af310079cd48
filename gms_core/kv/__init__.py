"""KV memory of an engine's ranks, as all engines have it: planned by the first, on scratch until the promotion, the pool's afterwards. No PyTorch.

A *block* is what an engine gives out to requests whole, wherever its parts lie: a block of vLLM's, a page of SGLang's.
"""
