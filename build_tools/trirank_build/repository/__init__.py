"""A ranker and its features → a release that Triton serves."""
