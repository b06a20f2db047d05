"""Settings as frozen dataclasses: declaration, check, JSON."""
