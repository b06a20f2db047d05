"""Job spec, start, follow, list, stop, fetch."""
