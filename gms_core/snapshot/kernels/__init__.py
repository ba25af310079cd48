"""Code that runs on GPUs, as PTX, which every driver compiles for the GPU that is there. `make kernels` makes it from the sources beside it.

The numbers are those of ``xxh3.cu``.
"""

THREADS = 288
"""Of the thread block that hashes a block: nine warps."""
MOST_BLOCKS = 8
"""That are hashed by one launch."""
MOST_RANGES = 16
"""That a block may lie in."""
TILE_BYTES = 64 * 2**10
"""Whatever is hashed has a multiple of it. Allocations of a GPU have 2 MiB or a multiple."""
