"""STAND-INS for packages that are not installed for the tests. A test puts this folder on the path."""
