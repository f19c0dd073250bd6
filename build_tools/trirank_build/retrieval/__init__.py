"""What finds candidates, in preparation, in training and in use; the ranker orders them."""
