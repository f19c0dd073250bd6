"""`trirank train auto`: a recipe whose sizes come from the data, with the reasons in words.

Nothing here is searched (that is `trirank tune`): each choice is a rule about what there is to learn from. That none of
them does harm with little data is measured in benchmarks/small.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from trirank_build.data.dataset import GRADED_TASKS, Dataset
from trirank_build.recipe import Recipe, load_recipe

AUTO = "auto"
_FEW, _SOME, _MANY = 10_000, 50_000, 1_000_000
"""Training events from which on a wider ranker is worth its numbers."""
_SHORTEST, _LONGEST = 8, 64
_FEW_REQUESTS = 2_000


def choose(dataset: Dataset) -> tuple[Recipe, list[str]]:
    """A recipe for this data, and why it is so, a line for each choice.

    Raises:
        BadRecipe: never for a dataset that `trirank data prepare` made.
    """
    events = dataset.training_events()
    base, why = _base(dataset, events)
    recipe, reasons = load_recipe(base), [f"recipe {base}: {why}"]
    if base == "judged_search":
        return recipe.changed({"name": AUTO}), reasons
    changes: dict[str, Any] = {"name": AUTO}

    def say(key: str, value: Any, reason: str) -> None:
        changes[key] = value
        if _value(recipe, key) != value:
            reasons.append(f"{key} = {value}: {reason}")

    count = events.height
    dim = 16 if count < _FEW else 32 if count < _SOME else recipe.model.dim if count < _MANY else 128
    say("model.dim", dim, f"{count:,} training events")
    say("model.ffn", 2 * dim, "twice the width")
    lengths = events.group_by("user_id").len()["len"].to_numpy()
    usual = int(np.quantile(lengths, 0.95)) if len(lengths) else 1
    length = int(np.clip(8 * -(-usual // 8), _SHORTEST, _LONGEST))
    say("features.history_length", length, f"95 % of the users have {usual} events or fewer")
    items = dataset.items
    most = int(items["attributes"].list.len().max() or 0)  # type: ignore[arg-type]
    say("features.attribute_slots", min(most, 16), f"items have up to {most} attributes")
    titles = bool((items["title"] != "").any())
    if not titles:
        say("features.title_length", 0, "items have no titles")
    if base == "sequences":
        users = len(lengths)
        say("pretraining.batch_size", int(np.clip(2 ** int(np.log2(max(users / 100, 1))), 16, 128)), f"{users:,} users")
        say("pretraining.negative_samples", min(items.height, 2_048), f"{items.height:,} items")
    else:
        requests = dataset.sizes("train").requests
        batch = 32 if requests < _FEW_REQUESTS else recipe.training.batch_size
        say("training.batch_size", batch, f"{requests:,} training requests")
    return recipe.changed(changes), reasons


def _base(dataset: Dataset, events: pl.DataFrame) -> tuple[str, str]:
    """The shipped recipe that fits, and why."""
    described = dataset.description
    if set(described.tasks) == set(GRADED_TASKS):
        return "judged_search", "results were judged by people"
    if not described.timed:
        return "sequences", "events have an order and no times: one choice follows the other"
    return "shop", f"events have times, and {dataset.sizes('train').requests:,} training requests with candidates"


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)
