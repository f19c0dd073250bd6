"""Forms that compression gives a ranker, by kind of step."""

from __future__ import annotations

from torch import nn

from trirank_build.errors import BadRecipe
from trirank_build.models.forms import distil, factorise, fold, fuse, prune, quantise, share
from trirank_build.models.forms.form import Decisions

FORMS = {
    "prune": prune.rebuild, "quantise": quantise.rebuild, "factorise": factorise.rebuild, "share": share.rebuild,
    "fold": fold.rebuild, "fuse": fuse.rebuild, "distil": distil.rebuild,
}  # fmt: skip


def rebuild(kind: str, model: nn.Module, decisions: Decisions) -> nn.Module:
    """Give a module the form that a step's decisions say.

    Raises:
        BadRecipe: this version knows no such kind.
    """
    if kind not in FORMS:
        raise BadRecipe(f"the checkpoint was compressed by a step {kind!r}; this version knows {', '.join(FORMS)}")
    return FORMS[kind](model, decisions)
