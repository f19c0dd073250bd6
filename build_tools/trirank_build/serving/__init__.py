"""Finding a Triton server, running it on a release, and knowing that it works."""
