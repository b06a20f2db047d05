"""Model files: download, copy between hosts, checks of the cache."""
