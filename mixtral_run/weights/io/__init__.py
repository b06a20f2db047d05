"""Atomic folders, positional reads, mapped writes, checksums, interrupts."""
