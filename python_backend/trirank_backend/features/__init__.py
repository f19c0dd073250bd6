"""What the ranker is told of a request and its candidates: the table of features, their kernels, and the packing."""

from trirank_backend.features.batch import Lines, Packed, even_starts
from trirank_backend.features.kernels import TIME_GAPS
from trirank_backend.features.packer import Packer
from trirank_backend.features.spec import FeatureSpec
from trirank_backend.features.table import CONTEXT, DENSE, HISTORY_EXTRA, INPUTS, STATIC_DENSE, WORDS
from trirank_backend.features.transitions import Transitions

__all__ = [
    "CONTEXT", "DENSE", "HISTORY_EXTRA", "INPUTS", "STATIC_DENSE", "TIME_GAPS", "FeatureSpec", "Lines", "Packed",
    "Packer", "Transitions", "WORDS", "even_starts",
]  # fmt: skip
