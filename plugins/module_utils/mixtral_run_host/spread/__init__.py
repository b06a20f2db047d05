"""Copies from host to host: who takes it from whom, the program that serves files, the keys, and what is verified."""
