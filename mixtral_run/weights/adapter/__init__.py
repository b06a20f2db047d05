"""Adapter checkpoints, PEFT and vLLM layouts, merging."""
