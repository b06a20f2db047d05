"""The HF cache of a host."""
