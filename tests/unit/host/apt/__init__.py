"""Packages and package sources."""
