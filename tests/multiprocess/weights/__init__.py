"""Conversion, verification and loading of weights, with real process groups."""
