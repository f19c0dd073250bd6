"""What happens while a release is served, kept beside it: users' events, and what changes of the catalogue."""
