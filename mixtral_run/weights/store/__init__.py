"""Folders in object stores: copies of checkpoints there and back, with checksums. A copy continues after a kill."""
