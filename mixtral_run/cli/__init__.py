"""The click root, exit codes, options generated from config fields."""
