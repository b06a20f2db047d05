"""Memory model, choice of layout and recomputation, suggestions."""
