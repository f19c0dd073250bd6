"""What a shop's own titles and queries teach about words (trirank_backend.words reads it)."""
