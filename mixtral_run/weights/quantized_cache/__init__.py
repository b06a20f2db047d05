"""Quantized experts stored next to a base."""
