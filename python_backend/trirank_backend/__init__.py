"""What runs inside Triton: numpy code for features, stores and rerank policies, free of Triton itself.

``stages`` holds the three steps as plain callables; ``triton`` is the thin layer that a ``model.py`` uses.
"""
