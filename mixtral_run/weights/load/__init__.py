"""Read any layout into the parameters of any other."""
