"""What compression leaves of a module's form, and how a checkpoint gets it back.

A checkpoint of a compressed ranker holds the decisions of every step, as JSON, and the weights. Whoever loads it gives
a fresh module the same form, step by step (``rebuild``), and reads the weights; how the steps came to their decisions
is in trirank_build.compression, which nothing here knows.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trirank_build.errors import BadRecipe
from trirank_build.models.ranker import SharedContextRanker

Decisions = dict[str, Any]
"""What a step decided about the form of the module, as JSON."""


class Quantised:
    """Marks the layers that the quantise step makes; no other step knows their inside."""


def shared_context(model: nn.Module, kind: str) -> SharedContextRanker:
    """The module, if it is of the family that compression knows the inside of.

    Raises:
        BadRecipe: it is another one, or quantised.
    """
    if not isinstance(model, SharedContextRanker):
        raise BadRecipe(
            f'"{kind}" does not fit {type(model).__name__}: it needs a ranker of architecture "shared_context"; '
            "after an ensemble, distil it first"
        )
    if any(isinstance(module, Quantised) for module in model.modules()):
        raise BadRecipe(f'"{kind}" does not fit a quantised ranker; quantise once, as the last step')
    return model


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module where ``name`` (dotted) is."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
