"""A chain of compression steps and the thresholds of its gate, as a TOML file, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trirank_build.compression import distil, factorise, fold, fuse, prune, quantise, share
from trirank_build.compression.step import FineTuning, Positive, Step, StepSettings
from trirank_build.errors import BadRecipe
from trirank_build.recipe import error_lines, read_recipe

KINDS: dict[str, Step] = {
    "prune": prune, "quantise": quantise, "factorise": factorise, "share": share, "fold": fold, "fuse": fuse,
    "distil": distil,
}  # fmt: skip
"""Kinds of steps by name."""
RECIPES = Path(__file__).parent / "recipes"
"""Recipes that ship with the package, by name."""
CHAIN = "compression.toml"
"""The recipe in the directory of a chain."""
Share = Annotated[float, Field(ge=0, le=1)]


class Thresholds(BaseModel):
    """What the gate demands; see trirank_build.gate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_ndcg_ratio: Share = 0.99
    """NDCG@10 of every stage over that of the dense ranker."""
    min_ndcg_ratio_low: Share = 0.97
    """The low end of its 95 % interval."""
    min_retrieval_ratio: Annotated[float, Field(ge=0)] = 1.0
    """NDCG@10 of every stage over that of retrieval's order, which costs nothing."""
    min_kendall_tau: Annotated[float, Field(ge=-1, le=1)] = 0.7
    """Mean over requests, against the dense ranker's order."""
    min_overlap: Share = 0.7
    """Mean share of the dense ranker's best ten that are among the stage's best ten."""
    max_difference: Positive = 0.1
    """Largest difference of a score between a stage and the one before, where both compute the same thing (the last
    step in PyTorch, ONNX, engine, ensemble), as a share of the scores' standard deviation."""
    max_latency_ms: Positive | None = None
    """Of the engine at 200 candidates; None: whatever it takes, since it depends on the machine."""
    max_size_mb: Positive | None = None
    """Of the ONNX graph."""


class CompressionRecipe(BaseModel):
    """A whole chain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    seed: int = 7
    training: FineTuning = FineTuning()
    """Of every step that does not say otherwise."""
    steps: tuple[StepSettings, ...]
    gate: Thresholds = Thresholds()

    def to_toml(self) -> dict[str, Any]:
        """Plain values, each step with what it says itself."""
        raw = self.model_dump(mode="json", exclude_none=True, exclude={"steps"})
        steps = [step.model_dump(mode="json", exclude_none=True) for step in self.steps]
        return raw | {"steps": steps}


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> CompressionRecipe:
    """A recipe from plain values.

    Raises:
        BadRecipe: a key or value is wrong, a kind is unknown, or there are no steps.
    """
    steps = raw.get("steps")
    if not isinstance(steps, list) or not steps:
        raise BadRecipe(f"{where} has no [[steps]]; write at least one, with kind = one of {', '.join(KINDS)}")
    training = raw.get("training", {})
    parsed: list[StepSettings] = []
    of: type[BaseModel] = CompressionRecipe
    try:
        for number, step in enumerate(steps, 1):
            place = f"{where}: step {number}"
            if not isinstance(step, dict) or (kind := step.get("kind")) not in KINDS:
                given = step.get("kind") if isinstance(step, dict) else step
                raise BadRecipe(f"{place} has kind {given!r}; kinds are {', '.join(KINDS)}")
            own = step.get("training", {})
            merged = step | ({"training": training | own} if isinstance(own, dict) else {})
            place, of = f"{place} ({kind})", KINDS[kind].Settings
            parsed.append(KINDS[kind].Settings.model_validate(merged))
        place, of = where, CompressionRecipe
        # Steps are of their own kinds, which the base they are declared as would cut down.
        whole = CompressionRecipe.model_validate(raw | {"steps": [{"kind": step.kind} for step in parsed]})
    except ValidationError as error:
        raise BadRecipe(f"{place}: " + error_lines(error, of)) from None
    return whole.model_copy(update={"steps": tuple(parsed)})


def load_compression_recipe(name: str) -> CompressionRecipe:
    """A recipe by path, or by the name of one that ships with the package.

    Raises:
        BadRecipe: there is none, it is no TOML, or a key or value is wrong; the message names each.
    """
    path, raw = read_recipe(name, RECIPES, "compression recipes")
    return parse_recipe(raw, str(path))
