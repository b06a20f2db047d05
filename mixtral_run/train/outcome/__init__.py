"""What a run leaves for people: its record, generations, counts of the routers, plots, the page, other loggers."""
