"""First contact, the play, the live view, the summary."""
