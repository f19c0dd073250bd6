"""Rankers, and how their weights are kept."""
