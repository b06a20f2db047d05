"""Grouped products, SwiGLU, permutation, rotary; each with a slow reference."""
