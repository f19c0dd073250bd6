"""Several rankers whose scores are summed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from trirank_build.models.family import make_ranker
from trirank_build.models.forms.form import Decisions, shared_context
from trirank_build.recipe import ModelRecipe


def rebuild(model: nn.Module, decisions: Decisions) -> nn.Module:
    """See step.Step. Decisions: the mode, how many members there are, and the sizes of those that were runs."""
    if decisions["mode"] == "soup":
        return model
    if not decisions["others"]:
        return Ensemble([copy.deepcopy(model) for _ in range(decisions["members"])])
    spec = shared_context(model, "fuse").spec
    return Ensemble([model, *(make_ranker(spec, ModelRecipe.model_validate(sizes)) for sizes in decisions["others"])])


class Ensemble(nn.Module):
    """Weighted sum of the members' scores; all see the same features."""

    has_states = False

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = nn.Parameter(torch.full((len(members),), 1 / len(members)))

    def forward(self, history: Tensor, query: Tensor, candidates: Tensor, dense: Tensor, context: Tensor) -> Tensor:
        scores = [member(history, query, candidates, dense, context) for member in self.members]
        return (torch.stack(scores, -1) * self.weights).sum(-1)
