"""Selective recomputation and offload to host memory."""
