"""One optimizer step: eager, captured, or within the backward pass."""
