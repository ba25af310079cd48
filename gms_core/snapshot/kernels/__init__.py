"""Code that runs on GPUs, as PTX, which every driver compiles for the GPU that is there. `make kernels` makes it from the sources beside it."""
