"""Exchange of tokens between the processes of an expert group."""
