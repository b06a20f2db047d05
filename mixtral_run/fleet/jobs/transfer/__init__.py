"""Files from a host: listing, rsync, a checked tar stream."""
