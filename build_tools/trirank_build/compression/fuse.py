"""Several rankers into one.

- ``soup``: the mean of the weights of fine-tunings of the same ranker with other seeds, each taken in only if the mean
  then ranks no worse on the validation split (the greedy soup of Wortsman et al., ICML 2022). Costs nothing to serve.
- ``ensemble``: the weighted sum of several rankers' scores, the weights learned on the validation split; exported as
  one graph, as large and slow as its members together, so `distil` should follow.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from trirank_build.compression.step import Context, StepSettings, Work, packed
from trirank_build.errors import BadRecipe
from trirank_build.features.fitting import Features
from trirank_build.models.forms.form import Decisions, shared_context
from trirank_build.models.forms.fuse import Ensemble
from trirank_build.models.sequence import SequenceRanker
from trirank_build.training.losses import listwise_softmax, targets_of
from trirank_build.training.run import TrainedRun, check_features

_STEPS = 200
_RATE = 0.05
_BATCH = 256


class Settings(StepSettings):
    """Which rankers, and how they become one."""

    kind: Literal["fuse"] = "fuse"
    mode: Literal["soup", "ensemble"] = "soup"
    members: Annotated[int, Field(ge=2)] = 3
    """Fine-tunings of the ranker as it is, each with a seed of its own."""
    runs: tuple[Path, ...] = ()
    """For an ensemble: finished runs that join the ranker as it is, instead of its fine-tunings."""

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.mode == "soup" and self.runs:
            raise ValueError("runs are for an ensemble; weights of separate trainings have no meaningful mean")
        if not self.runs and not self.training.epochs:
            raise ValueError("members differ by their fine-tuning; say training.epochs = 1 or more")
        return self

    @property
    def reads(self) -> str:
        """See StepSettings."""
        return "members and their weights"


def check(model: nn.Module, settings: Settings, features: Features) -> tuple[nn.Module, Features]:
    """See step.Step."""
    if isinstance(model, Ensemble):
        raise BadRecipe("fuse does not fit an ensemble of ensembles; distil the first one before")
    if settings.mode == "soup":
        return model, features
    others = [_member(run, features) for run in settings.runs]
    members = [model, *others] if others else [copy.deepcopy(model) for _ in range(settings.members)]
    return Ensemble(members), features


def run(work: Work, settings: Settings, context: Context) -> None:
    """See step.Step."""
    decisions: Decisions = {"mode": settings.mode, "members": settings.members, "others": []}
    if settings.runs:
        decisions["others"] = [TrainedRun.load(path).recipe.model.model_dump() for path in settings.runs]
        members = [work.model, *(_member(path, work.features) for path in settings.runs)]
    else:
        members = [_trained(work, settings, context, number) for number in range(settings.members)]
    if settings.mode == "soup":
        worth = [context.requests.valid_ndcg(member, work.features) for member in members]
        order = sorted(range(len(members)), key=lambda at: -worth[at])
        kept, best = order[:1], worth[order[0]]
        for at in order[1:]:
            tried = context.requests.valid_ndcg(averaged([members[m] for m in [*kept, at]]), work.features)
            if tried >= best:
                kept, best = [*kept, at], tried
        work.model = averaged([members[at] for at in kept])
        decisions["kept"] = kept
    else:
        ensemble = Ensemble(members)
        _learn_weights(ensemble, work, context)
        work.model = ensemble
    work.decisions.append((settings.kind, decisions))


def averaged(models: list[nn.Module]) -> nn.Module:
    """The mean of all weights, in a copy of the first."""
    mean = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, tensor in mean.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    return mean


def _trained(work: Work, settings: Settings, context: Context, number: int) -> nn.Module:
    own = Work(copy.deepcopy(work.model), work.features, list(work.decisions))
    context.finetune(own, settings.training, f"member-{number}", seed=context.seed + number)
    return own.model


def _member(path: Path, features: Features) -> SequenceRanker:
    found = TrainedRun.load(path)
    check_features(found, features)
    if found.facts.get("compression"):
        raise BadRecipe(f"fuse.runs: {path} is compressed; an ensemble is of rankers that `trirank train` made")
    return shared_context(found.model(), "fuse")


def _learn_weights(ensemble: Ensemble, work: Work, context: Context) -> None:
    """Fit the weights to the validation requests' choices (listwise loss, Adam; a handful of numbers)."""
    valid = context.requests.get()[1].seen_by(work.features)
    tasks = context.dataset.description.tasks
    thresholds = tuple(tasks[task] for task in valid.tasks)
    scores, labels, there, offsets, weights = [], [], [], [], []
    with torch.inference_mode():
        for start in range(0, len(valid), _BATCH):
            which = np.arange(start, min(start + _BATCH, len(valid)))
            batch = packed(valid, which, context.recipe.training)
            labels.append(batch.pop("labels"))
            there.append(batch.pop("valid"))
            offsets.append(batch.pop("offsets", torch.zeros_like(labels[-1])))
            weights.append(batch.pop("label_weights", torch.ones_like(labels[-1])))
            scores.append(torch.stack([member.eval()(**batch) for member in ensemble.members], -1))
    # Clones, since what inference mode makes cannot take part in a gradient.
    all_scores, all_labels, all_there, all_offsets, all_weights = (
        torch.cat(parts).clone() for parts in (scores, labels, there, offsets, weights)
    )
    targets = targets_of(all_labels, thresholds)
    optimiser = torch.optim.Adam([ensemble.weights], lr=_RATE)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        mixed = (all_scores * ensemble.weights).sum(-1)
        loss = listwise_softmax(mixed, targets, all_there, all_weights, all_offsets).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    ensemble.weights.grad = None
