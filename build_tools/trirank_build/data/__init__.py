"""Raw logs → a dataset directory."""
