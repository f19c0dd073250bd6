"""A student taught by a teacher: on its scores (listwise divergence) and on its states (Hinton et al. 2015; Jiao et
al., TinyBERT, 2020). The weights of both losses are the step's ``training``.

The student is the ranker as it is, or of an ensemble its first member; or a fresh one of other sizes, which is the
honest way to ask what a small ranker is worth without pruning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trirank_build.compression.step import Context, StepSettings, Work
from trirank_build.errors import BadRecipe
from trirank_build.features.fitting import Features
from trirank_build.models.family import make_ranker
from trirank_build.models.forms.distil import rebuild
from trirank_build.models.forms.form import Decisions
from trirank_build.models.forms.fuse import Ensemble
from trirank_build.recipe import ModelRecipe
from trirank_build.training.run import TrainedRun, check_features


class Settings(StepSettings):
    """Who teaches whom."""

    kind: Literal["distil"] = "distil"
    teacher: Literal["dense", "previous"] | Path = "dense"
    """The ranker that the chain started from, the ranker as the step finds it (an ensemble, say), or a run."""
    student: ModelRecipe | None = None
    """Sizes of a fresh student; None: the ranker as it is, of an ensemble its first member."""

    @property
    def reads(self) -> str:
        """See StepSettings."""
        return "the student"


def check(model: nn.Module, settings: Settings, features: Features) -> tuple[nn.Module, Features]:
    """See step.Step."""
    if isinstance(settings.teacher, Path):
        check_features(TrainedRun.load(settings.teacher), features)
    if settings.teacher == "previous" and settings.student is None and not isinstance(model, Ensemble):
        raise BadRecipe('distil.teacher = "previous" would teach a ranker what it knows; it is for ensembles, or for '
                        "fresh students")  # fmt: skip
    if not settings.training.epochs:
        raise BadRecipe("distil.training.epochs = 0 teaches nothing")
    return rebuild(model, _decide(settings)), features


def run(work: Work, settings: Settings, context: Context) -> None:
    """See step.Step."""
    teacher: nn.Module | None = None  # None: the dense one
    if settings.teacher == "previous":
        teacher = work.model
    elif isinstance(settings.teacher, Path):
        teacher = TrainedRun.load(settings.teacher).model()
    decisions = _decide(settings)
    torch.manual_seed(context.seed)
    if settings.student is None:
        work.model = rebuild(work.model, decisions)
    else:
        work.model = make_ranker(work.features.spec, settings.student)
    work.decisions.append((settings.kind, decisions))
    context.finetune(work, settings.training, "distillation", teacher=teacher)


def _decide(settings: Settings) -> Decisions:
    student: dict[str, Any] | None = None if settings.student is None else settings.student.model_dump()
    return {"student": student}
