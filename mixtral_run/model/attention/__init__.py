"""Attention over whole rows, packed rows and rows that are split over processes; rotary positions."""
