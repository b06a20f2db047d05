"""Settings of the verbs, one module each. Standard library only."""
