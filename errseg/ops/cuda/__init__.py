"""CUDA backends of several launches: kernels of the library with cuBLAS products between them."""
