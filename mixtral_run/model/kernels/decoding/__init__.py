"""Kernels for passes of generation over one more token of each sequence: few tokens, and keys from a cache."""
