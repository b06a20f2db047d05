"""Compare a checkpoint with its source, bit by bit."""
