"""Text that is understood: classifiers of reviews and other short texts, from a file of labels to a gated graph."""
