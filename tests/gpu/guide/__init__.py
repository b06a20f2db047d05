"""The guide's run on real GPUs."""
