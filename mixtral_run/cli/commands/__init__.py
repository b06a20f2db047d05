"""The verbs: flags → config → one call. A verb a file; heavy modules are imported inside the function."""
