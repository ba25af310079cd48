"""GMS, the GPU Memory Service: memory of inference engines, owned by a server that outlives them.

Importing this package imports no engine, no torch and no CUDA library.
"""

__version__ = "0.1.0"
