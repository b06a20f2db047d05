"""Selective recomputation, kept results of attention, and offload to host memory."""
