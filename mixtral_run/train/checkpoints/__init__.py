"""Adapter checkpoints of a run: write, check, resume, remove."""
