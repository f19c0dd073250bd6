"""A fresh student, or an ensemble's first member."""

from __future__ import annotations

from torch import nn

from trirank_build.models.family import make_ranker
from trirank_build.models.forms.form import Decisions, shared_context
from trirank_build.models.forms.fuse import Ensemble
from trirank_build.recipe import ModelRecipe


def rebuild(model: nn.Module, decisions: Decisions) -> nn.Module:
    """See step.Step. Decisions: the sizes of a fresh student."""
    member = model.members[0] if isinstance(model, Ensemble) else model
    if (sizes := decisions["student"]) is None:
        return member
    return make_ranker(shared_context(member, "distil").spec, ModelRecipe.model_validate(sizes))
