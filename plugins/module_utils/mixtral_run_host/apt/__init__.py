"""apt's output, sources, locks and keys."""
