"""Connections over SSH."""
