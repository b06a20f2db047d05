"""Exchange of tokens by symmetric memory."""
