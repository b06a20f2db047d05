"""CUDA C++ sources of kernels, and how they are compiled."""
