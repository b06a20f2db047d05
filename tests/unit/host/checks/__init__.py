"""Checks of a host before and after its setup."""
