"""A chain of steps is checked before it trains, goes on where it was stopped, and says what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from trirank_build.compression import distil, fold, step
from trirank_build.compression.chain import check_chain, compress
from trirank_build.compression.recipe import KINDS, RECIPES, load_compression_recipe, parse_recipe
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint, BadData, BadRecipe
from trirank_build.evaluation import scoring
from trirank_build.models.forms import FORMS
from trirank_build.preparation.sources.shop import ShopSize, make_shop
from trirank_build.training.trainer import train

NO_TRAINING = {"epochs": 0}


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


def recipe_of(*steps, **more):
    return parse_recipe({"name": "chain", "training": NO_TRAINING, "steps": list(steps)} | more)


def test_a_stopped_chain_goes_on(trained, dataset, tmp_path, monkeypatch):
    steps = [{"kind": "prune", "ffn": 0.5, "training": {"epochs": 1}}, {"kind": "fold"}]
    calls = []

    def stop(work, settings, context):
        calls.append("fold")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fold, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(recipe_of(*steps), trained, dataset, tmp_path / "out")
    first = (tmp_path / "out" / "1-prune" / "best.safetensors").stat().st_mtime_ns
    done = compress(recipe_of(*steps), trained, dataset, tmp_path / "out")
    assert (tmp_path / "out" / "1-prune" / "best.safetensors").stat().st_mtime_ns == first
    whole = compress(recipe_of(*steps), trained, dataset, tmp_path / "whole")
    one, two = done.last.model().state_dict(), whole.last.model().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "out" / "compressed").resolve() == (tmp_path / "out" / "2-fold").resolve()


def test_positions_are_corrected_in_every_step(trained, tmp_path, monkeypatch, dataset):
    """Steps that read labels are told where they stood, those that read inputs alone are not, and each number is of the
    same metric."""
    training = trained.recipe.training.model_copy(update={"position_bias": 1.0})
    biased = replace(trained, recipe=trained.recipe.model_copy(update={"training": training}))
    judged = []
    plain = scoring.valid_ndcg
    monkeypatch.setattr(step, "valid_ndcg", lambda *given: judged.append(given[2]) or plain(*given))
    steps = [
        {"kind": "prune", "ffn": 0.5, "importance": "gradient", "training": {"epochs": 1}},
        {"kind": "quantise"},
        {"kind": "fuse", "mode": "ensemble", "members": 2, "training": {"epochs": 1}},
    ]
    compress(recipe_of(*steps), biased, dataset, tmp_path / "out")
    assert judged
    assert set(judged) == {1.0}


def test_another_last_step_keeps_the_first(trained, dataset, tmp_path):
    prune_step = {"kind": "prune", "ffn": 0.5}
    compress(recipe_of(prune_step, {"kind": "fold"}), trained, dataset, tmp_path / "out")
    first = (tmp_path / "out" / "1-prune" / "best.safetensors").stat().st_mtime_ns
    other = recipe_of(prune_step, {"kind": "prune", "heads": 0.5})
    compress(other, trained, dataset, tmp_path / "out")  # 2-prune beside 2-fold
    assert (tmp_path / "out" / "1-prune" / "best.safetensors").stat().st_mtime_ns == first
    changed = recipe_of({"kind": "prune", "ffn": 0.25}, {"kind": "fold"})
    with pytest.raises(BadCheckpoint, match="other settings.*--fresh"):
        compress(changed, trained, dataset, tmp_path / "out")
    compress(changed, trained, dataset, tmp_path / "out", fresh=True)
    assert (tmp_path / "out" / "1-prune" / "best.safetensors").stat().st_mtime_ns != first


def test_the_shipped_recipes_are_whole():
    for path in RECIPES.glob("*.toml"):
        raw = load_compression_recipe(path.stem)
        assert parse_recipe(raw.to_toml()) == raw  # what is written beside a chain can be run again


def test_it_does_not_compress_twice(trained, dataset, tmp_path):
    done = compress(recipe_of({"kind": "fold"}), trained, dataset, tmp_path / "out")
    with pytest.raises(BadRecipe, match="compressed already"):
        compress(recipe_of({"kind": "fold"}), done.last, dataset, tmp_path / "again")


@pytest.mark.parametrize(("steps", "message"), [
    ([{"kind": "prune", "heads": 1.0}], "leaves none of the 2 heads"),
    ([{"kind": "prune", "heads": 0.8}], r"leaves none of the 2 heads.*say 0.5 at most"),
    ([{"kind": "prune", "ffn": 0.999}], "leaves none of the 32 places"),
    ([{"kind": "prune", "width": 0.99}], "leaves none of the 16 numbers"),
    ([{"kind": "prune", "blocks": 1}], "leaves none of the 1 encoder blocks"),
    ([{"kind": "prune", "history_length": 99}], "more than the 8 events"),
    ([{"kind": "quantise"}, {"kind": "prune", "ffn": 0.5}], r"step 2 \(prune\).*quantise once, as the last step"),
    ([{"kind": "quantise", "skip": ["nowhere"]}], "skip names"),
    ([{"kind": "quantise", "embeddings": False}], "quantise finds nothing"),
    ([{"kind": "factorise", "budget": 0.001, "matrices": "all"}], "leaves no matrix a rank of 1"),
    ([{"kind": "share", "blocks": True}], "at least two encoder blocks"),
    ([{"kind": "share", "codes": 16, "groups": 5}], "does not divide the width 16"),
    ([{"kind": "fold"}, {"kind": "fold"}], "folds twice"),
    ([{"kind": "distil", "teacher": "previous", "training": {"epochs": 1}}], "teach a ranker what it knows"),
    ([{"kind": "distil"}], "teaches nothing"),
    ([{"kind": "fuse", "mode": "ensemble", "training": {"epochs": 1}}, {"kind": "quantise"}], "does not fit Ensemble"),
])  # fmt: skip
def test_a_step_that_does_not_fit_is_told_before_training(trained, dataset, tmp_path, steps, message):
    with pytest.raises(BadRecipe, match=message):
        compress(recipe_of(*steps), trained, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("raw", "message"), [
    ({"name": "x"}, "has no \\[\\[steps\\]\\]"),
    ({"name": "x", "steps": [{"kind": "squash"}]}, "kind 'squash'; kinds are prune"),
    ({"name": "x", "steps": [{"kind": "prune", "head": 0.5}]},
     "step 1 \\(prune\\): head: unknown key \\(known: kind, training, heads, ffn"),
    ({"name": "x", "steps": [{"kind": "factorise"}]}, "either energy or budget"),
    ({"name": "x", "steps": [{"kind": "quantise", "precision": "float16", "mode": "aware"}]}, "needs no training"),
    ({"name": "x", "steps": [{"kind": "quantise", "percentile": 20}]}, "greater than 50"),
    ({"name": "x", "steps": [{"kind": "share"}]}, "blocks = true, or give codes"),
    ({"name": "x", "steps": [{"kind": "fold"}], "gate": {"min_ndcg": 0.9}},
     "gate.min_ndcg: unknown key \\(known: min_ndcg_ratio"),
    ({"name": "x", "steps": [{"kind": "fuse", "runs": ["a"]}]}, "no meaningful mean"),
])  # fmt: skip
def test_what_a_recipe_says_wrong(raw, message):
    with pytest.raises(BadRecipe, match=message):
        parse_recipe(raw)


def test_an_architecture_that_it_does_not_know(trained, dataset, tmp_path):
    lstm = train(
        trained.recipe.changed({"model.architecture": "lstm", "training.epochs": 1}), dataset, tmp_path / "lstm"
    )
    with pytest.raises(BadRecipe, match="does not fit Lstm"):
        compress(recipe_of({"kind": "prune", "ffn": 0.5}), lstm, dataset, tmp_path / "out")


@pytest.fixture(scope="module")
def other_world(tmp_path_factory, trained):
    """Another shop, and a ranker that knows its vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    other = Dataset.load(make_shop(ShopSize(60, 30, 600, 15), 9).save(folder / "data"))
    return other, train(trained.recipe.changed({"training.epochs": 1}), other, folder / "run"), folder / "data"


def test_another_dataset(trained, other_world, tmp_path):
    with pytest.raises(BadData, match="was trained on"):
        compress(recipe_of({"kind": "fold"}), trained, other_world[0], tmp_path / "out")


def test_a_teacher_with_another_vocabulary(trained, dataset, other_world, tmp_path):
    step = {"kind": "distil", "teacher": str(other_world[1].directory), "training": {"epochs": 1}}
    with pytest.raises(BadCheckpoint, match="vocabulary_size"):
        compress(recipe_of(step), trained, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_calibration_data_of_another_schema(trained, dataset, other_world, tmp_path):
    description = json.loads((other_world[2] / "dataset.json").read_text())
    assert "tasks" in description
    changed = tmp_path / "calibration"
    changed.mkdir()
    for path in other_world[2].iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    description["tasks"] = {"watched": 1.0}
    (changed / "dataset.json").write_text(json.dumps(description))
    step = {"kind": "quantise", "calibration_data": str(changed)}
    with pytest.raises(BadData, match="calibration data .* has tasks"):
        check_chain(recipe_of(step), trained)


def test_kinds_offer_what_a_step_must():
    for kind, module in KINDS.items():
        assert module.Settings.model_fields["kind"].default == kind
        assert all(callable(getattr(module, name)) for name in ("check", "run"))
    assert set(FORMS) == set(KINDS)  # what a step leaves can be built again
    assert distil in KINDS.values()
