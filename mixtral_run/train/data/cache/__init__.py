"""The token cache: examples are tokenized once per host and memory-mapped."""
