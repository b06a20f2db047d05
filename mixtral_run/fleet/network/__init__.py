"""Measure the network between the hosts of a fleet, and name what is slow."""
