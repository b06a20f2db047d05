"""Docker Engine, its settings and images."""
