"""Weights on disk: HF safetensors, torch_dist checkpoints, and the streams between them."""
