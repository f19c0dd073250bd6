"""Recipe and dataset → checkpoint."""
