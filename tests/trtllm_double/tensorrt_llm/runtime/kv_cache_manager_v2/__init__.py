"""The second KV cache manager, which is Python."""
