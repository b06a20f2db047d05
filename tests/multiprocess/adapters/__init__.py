"""Verbs as commands."""
