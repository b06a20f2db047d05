"""Lines, progress and the live view of a terminal."""
