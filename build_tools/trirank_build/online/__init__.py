"""Beside what is served: users, feedback, and what changes of the catalogue."""
