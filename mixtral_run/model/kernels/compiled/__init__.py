"""Compiled kernels: their cache, and compilation before there is a GPU."""
