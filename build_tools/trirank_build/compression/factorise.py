"""Truncated SVD: a matrix [m, n] of rank r as two of m · r and r · n numbers (Eckart and Young 1936), where that is
fewer. Ranks are the smallest that keep a share of the energy (the squares of the singular values), or the ones of the
highest such share that fits a budget."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trirank_build.compression.step import Context, StepSettings, Work
from trirank_build.errors import BadRecipe
from trirank_build.features.fitting import Features
from trirank_build.models.forms.factorise import rebuild
from trirank_build.models.forms.form import Decisions, shared_context

Share = Annotated[float, Field(gt=0, le=1)]


class Settings(StepSettings):
    """Which matrices, and how much of them is kept."""

    kind: Literal["factorise"] = "factorise"
    matrices: Literal["linear", "embeddings", "all"] = "linear"
    energy: Share | None = None
    """Share of the energy that each matrix keeps."""
    budget: Share | None = None
    """Share of all these matrices' numbers that may be left."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Settings:
        if (self.energy is None) == (self.budget is None):
            raise ValueError("give either energy or budget")
        return self


def check(model: nn.Module, settings: Settings, features: Features) -> tuple[nn.Module, Features]:
    """See step.Step."""
    shared_context(model, "factorise")
    if not (found := _matrices(model, settings.matrices)):
        raise BadRecipe(f'factorise.matrices = "{settings.matrices}" finds no matrix of this ranker; factorise before '
                        "quantising or sharing")  # fmt: skip
    if settings.budget is not None:
        smallest = sum(sum(weight.shape) for weight in found.values())
        whole = sum(weight.numel() for weight in found.values())
        if settings.budget * whole < smallest:
            raise BadRecipe(f"factorise.budget = {settings.budget:g} leaves no matrix a rank of 1; say at least "
                            f"{smallest / whole:.3f}")  # fmt: skip
    return rebuild(model, _decide(model, settings)[0]), features


def run(work: Work, settings: Settings, context: Context) -> None:
    """See step.Step."""
    decisions, parts = _decide(work.model, settings)
    work.model = rebuild(work.model, decisions)
    for name, rank in decisions["ranks"].items():
        u, s, v = parts[name]
        root = s[:rank].sqrt()
        factors = work.model.get_submodule(name)
        assert isinstance(factors, nn.Sequential)
        with torch.no_grad():
            left, right = (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()  # weight = left @ right
            if isinstance(factors[0], nn.Embedding):
                factors[0].weight.copy_(left)
                factors[1].weight.copy_(right.T)  # type: ignore[operator]
            else:
                factors[0].weight.copy_(right)  # type: ignore[operator]
                factors[1].weight.copy_(left)  # type: ignore[operator]
    work.decisions.append((settings.kind, decisions))
    context.finetune(work, settings.training, "finetuning")


def _matrices(model: nn.Module, which: str) -> dict[str, Tensor]:
    kinds: dict[str, tuple[type[nn.Module], ...]] = {"linear": (nn.Linear,), "embeddings": (nn.Embedding,)}
    wanted = kinds.get(which, (nn.Linear, nn.Embedding))
    return {
        name: module.weight
        for name, module in model.named_modules()
        if type(module) in wanted and isinstance(module.weight, Tensor) and min(module.weight.shape) > 1
    }


def _decide(model: nn.Module, settings: Settings) -> tuple[Decisions, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """The decisions, and the decomposition u, s, v of every matrix."""
    matrices = {name: weight.detach() for name, weight in _matrices(model, settings.matrices).items()}
    parts = {name: torch.linalg.svd(weight.double(), full_matrices=False) for name, weight in matrices.items()}
    return {"ranks": _ranks({name: s for name, (_, s, _) in parts.items()}, matrices, settings)}, parts


def _ranks(spectra: dict[str, Tensor], matrices: dict[str, Tensor], settings: Settings) -> dict[str, int]:
    """Rank of each matrix that gets smaller by it."""
    kept = {name: (s.square().cumsum(0) / s.square().sum().clamp_min(1e-30)) for name, s in spectra.items()}

    def at(energy: float) -> dict[str, int]:
        ranks = {name: int((share < energy - 1e-12).sum()) + 1 for name, share in kept.items()}
        return {n: min(r, len(kept[n])) for n, r in ranks.items() if r * sum(matrices[n].shape) < matrices[n].numel()}

    if settings.energy is not None:
        return at(settings.energy)

    def size(ranks: dict[str, int]) -> int:
        return sum(ranks[n] * sum(m.shape) if n in ranks else m.numel() for n, m in matrices.items())

    assert settings.budget is not None
    allowed = settings.budget * sum(m.numel() for m in matrices.values())
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= allowed else (low, middle)
    return at(low)
