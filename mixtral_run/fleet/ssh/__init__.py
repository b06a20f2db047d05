"""Connections, host keys, what ssh's errors mean."""
