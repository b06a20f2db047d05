"""Data, steps, the loop and adapter checkpoints."""
