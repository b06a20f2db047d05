"""The optimizer of the adapters."""
