"""Docker's settings, flags, unit and images."""
