"""Known failures with cause and remedy."""
