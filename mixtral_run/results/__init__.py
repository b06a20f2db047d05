"""What a training run leaves for people: its record, plots, pages, and the list of runs. No torch."""
