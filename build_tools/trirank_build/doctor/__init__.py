"""`trirank doctor`: what is wrong with a Triton model repository or server, ours or any other, and how to mend it."""
