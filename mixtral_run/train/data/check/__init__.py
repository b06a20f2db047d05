"""The verb `data check`."""
