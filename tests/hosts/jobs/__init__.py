"""Jobs on hosts."""
