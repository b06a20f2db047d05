"""Names that users bring along: of other programs' flags and verbs, and of models on the hub."""
