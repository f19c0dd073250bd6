"""Recipes: TOML files that say all that a training run depends on, checked before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from trirank.contract import Signal
from trirank_backend.policies import Policy

from trirank_build.errors import BadRecipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
RECIPES = Path(__file__).parent / "recipes"
"""Recipes that ship with the package, by name."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FeatureRecipe(_Section):
    """What of a request the ranker sees."""

    history_length: Annotated[int, Field(ge=1, le=1024)] = 32
    """L, newest events kept."""
    query_length: Annotated[int, Field(ge=1, le=64)] = 8
    title_length: Annotated[int, Field(ge=0, le=64)] = 12
    embed_text: bool = True
    """Whether words have embeddings. Where queries are few, how well query and title match says more."""
    attribute_slots: Annotated[int, Field(ge=0, le=16)] = 4
    vocabulary: Annotated[int, Field(ge=100, le=100_000)] = 8_000
    """Subwords of the tokeniser."""


class ModelRecipe(_Section):
    """Sizes of the ranker."""

    dim: PositiveInt = 64
    heads: PositiveInt = 4
    encoder_blocks: Annotated[int, Field(ge=0)] = 2
    cross_blocks: PositiveInt = 1
    ffn: PositiveInt = 128
    """Width of the feed-forward layers."""
    dropout: Share = 0.1

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> ModelRecipe:
        if self.dim % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide dim = {self.dim}")
        return self


class TrainingRecipe(_Section):
    """How the ranker learns."""

    epochs: PositiveInt = 10
    patience: PositiveInt = 2
    """Epochs without a better validation NDCG@10 before it stops."""
    batch_size: PositiveInt = 128
    learning_rate: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    candidates: Annotated[int, Field(ge=2)] = 50
    """Kept of each request's list: what was chosen, and a sample of the rest."""
    random_negatives: Annotated[int, Field(ge=0)] = 0
    """Uniform draws from the catalogue, added in the batches that go without retrieval scores."""
    without_scores: Share = 0.1
    """Share of batches that go without retrieval scores, which a service need not send."""
    item_dropout: Share = 0.05
    """Share of candidates that lose their id in training, so that new items learn to live by their content."""
    validation_requests: PositiveInt = 5_000


class PolicyRecipe(_Section):
    """One scenario's rules; see trirank_backend.policies.Policy."""

    task_weights: dict[str, float] | None = None
    """None: all tasks count alike."""
    deduplicate: bool = True
    exclude_purchased: bool = False
    boosts: dict[str, float] = {}

    @model_validator(mode="after")
    def _signals_exist(self) -> PolicyRecipe:
        if unknown := set(self.boosts) - set(Signal.__members__):
            raise ValueError(f"boosts {sorted(unknown)}; signals are {list(Signal.__members__)}")
        return self


class Recipe(_Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    seed: int = 7
    features: FeatureRecipe = FeatureRecipe()
    model: ModelRecipe = ModelRecipe()
    training: TrainingRecipe = TrainingRecipe()
    policies: dict[str, PolicyRecipe] = {
        "search": PolicyRecipe(),
        "home": PolicyRecipe(),
        "new_items": PolicyRecipe(boosts={"NEW_ITEM": 1.0}),
    }

    def policies_for(self, tasks: tuple[str, ...]) -> dict[str, Policy]:
        """The serving policies of a ranker with these tasks."""
        equal = dict.fromkeys(tasks, 1 / len(tasks))
        return {
            name: Policy(
                task_weights=equal if policy.task_weights is None else policy.task_weights,
                deduplicate=policy.deduplicate,
                exclude_purchased=policy.exclude_purchased,
                boosts=policy.boosts,
            )
            for name, policy in self.policies.items()
        }


def load_recipe(name: str) -> Recipe:
    """A recipe by path, or by the name of one that ships with the package.

    Raises:
        BadRecipe: there is none, it is no TOML, or a key or value is wrong; the message names each.
    """
    path = Path(name)
    if not path.is_file():
        path = RECIPES / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise BadRecipe(f"{name} is neither a file nor one of the shipped recipes ({shipped})")
    try:
        raw = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path} is no valid TOML: {error}") from error
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {_words(e)}" for e in error.errors()]
        raise BadRecipe(f"{path}: " + "; ".join(lines)) from None


def _words(error: object) -> str:
    assert isinstance(error, dict)
    if error["type"] == "extra_forbidden":
        section = error["loc"][0] if len(error["loc"]) > 1 else None
        known = Recipe.model_fields[section].annotation if section in Recipe.model_fields else Recipe
        names = ", ".join(getattr(known, "model_fields", {}))
        return f"unknown key (known: {names})" if names else "unknown key"
    return f"{error['msg']} (got {error['input']!r})"
