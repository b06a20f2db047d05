"""Soak tests: fuzzed inputs, killed processes and a simulated fleet; `make soak` runs them for up to 30 minutes."""
