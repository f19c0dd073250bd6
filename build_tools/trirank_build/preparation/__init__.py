"""Logs and other sources → a dataset: reading, cleaning, splitting, finding candidates."""
