"""`make mutants`: change one place of a module at a time, and list the changes that its unit tests do not notice."""
