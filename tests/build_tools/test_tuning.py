"""`trirank tune`: searches what the recipe says, gives up what is no good, goes on where it stopped."""

from __future__ import annotations

import pytest
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadRecipe
from trirank_build.recipe import Recipe, load_recipe
from trirank_build.training import tuning
from trirank_build.training.tuning import tune


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


@pytest.fixture
def searching(recipe):
    space = {"model.dropout": {"low": 0.0, "high": 0.5}, "model.dim": [8, 16], "training.batch_size": {
        "low": 64, "high": 256, "log": True}}  # fmt: skip
    return Recipe.model_validate(recipe.model_dump() | {"tuning": {"space": space, "trials": 3}})


def states(study):
    return [trial.state.name for trial in study.trials]


def test_a_search_ends_with_a_recipe_that_trains(searching, dataset, tmp_path):
    short = searching.changed({"training.epochs": 1})
    study = tune(short, dataset, tmp_path / "search")
    assert states(study) == ["COMPLETE"] * 3
    best = load_recipe(str(tmp_path / "search" / "best.toml"))
    params = max(study.trials, key=lambda trial: trial.value).params
    assert (best.model.dropout, best.model.dim, best.training.batch_size) == tuple(params.values())
    assert all(0 <= trial.params["model.dropout"] <= 0.5 for trial in study.trials)
    assert all(isinstance(trial.params["training.batch_size"], int) for trial in study.trials)


def test_a_stopped_search_goes_on(searching, dataset, tmp_path, monkeypatch):
    short, plain, calls = searching.changed({"training.epochs": 1}), tuning.train, iter(range(100))

    def cut(*arguments, **more):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return plain(*arguments, **more)

    monkeypatch.setattr(tuning, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        tune(short, dataset, tmp_path / "search", trials=2)
    study = tune(short, dataset, tmp_path / "search", trials=2)
    assert states(study).count("COMPLETE") == 2
    assert len(tune(short, dataset, tmp_path / "search", trials=2).trials) == len(study.trials)


def test_bad_trials_are_given_up(searching, dataset, tmp_path, monkeypatch):
    """From the fourth trial on, one that stays below the median ends after its second epoch."""
    quality = iter([0.5, 0.6, 0.7, 0.1])

    class Facts:
        facts = {"curve": [{"phase": "ranking", "epoch": 1, "valid_ndcg10": 0.5}]}  # noqa: RUF012

    def pretend(recipe, dataset, folder, report):
        level = next(quality)
        for epoch in (1, 2, 3):
            report("ranking", epoch, level)
        return Facts

    monkeypatch.setattr(tuning, "train", pretend)
    study = tune(searching, dataset, tmp_path / "search", trials=4)
    assert states(study) == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"]


def test_a_diverging_trial_is_no_end(searching, dataset, tmp_path):
    wild = searching.changed({"training.epochs": 1})
    wild = wild.model_copy(
        update={"tuning": wild.tuning.model_copy(update={"space": {"training.learning_rate": [1e38]}})}
    )
    study = tune(wild, dataset, tmp_path / "search", trials=1)
    assert states(study) == ["PRUNED"]
    assert "the loss is" in study.trials[0].user_attrs["why"]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, r"has no \[tuning.space\]"),
        ({"model.depth": [1]}, "model.depth is no key of a recipe; known: seed, features"),
        ({"model.dropout": {"low": 0.1, "high": 1.5}}, "model.dropout: .*less than 1"),
        ({"model.dim": [16, 15]}, "heads = 2 does not divide dim = 15"),
    ],
    ids=["nothing", "unknown", "out of range", "does not fit"],
)
def test_a_bad_space_is_told_before_anything_runs(space, words, recipe, dataset, tmp_path):
    bad = Recipe.model_validate(recipe.model_dump() | {"tuning": {"space": space}})
    with pytest.raises(BadRecipe, match=words):
        tune(bad, dataset, tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_another_search_is_not_mixed_in(searching, dataset, tmp_path):
    short = searching.changed({"training.epochs": 1})
    tune(short, dataset, tmp_path / "search", trials=1)
    with pytest.raises(BadRecipe, match="the search of another recipe or dataset"):
        tune(short.changed({"seed": 1}), dataset, tmp_path / "search", trials=1)
