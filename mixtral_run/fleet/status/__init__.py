"""Read every host, find differences, print or write a page."""
