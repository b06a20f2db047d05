"""Files of the roles, and the collection."""
