"""Simple rankers: what the ranker has to beat, and what finds its candidates."""
