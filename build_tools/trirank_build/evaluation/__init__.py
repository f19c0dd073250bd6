"""How good a ranking is, and how sure that is."""
