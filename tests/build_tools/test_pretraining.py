"""Pre-training on sequences: what came next, what is hidden, where negatives come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from trirank_backend.features import DENSE
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint, BadData, BadRecipe, Diverged
from trirank_build.evaluation.catalogue import rank_catalogue
from trirank_build.evaluation.contenders import contenders
from trirank_build.evaluation.evaluate import evaluate_catalogue
from trirank_build.evaluation.scoring import score
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import fit_features
from trirank_build.features.negatives import NegativeSampler
from trirank_build.features.sequences import Sequences
from trirank_build.features.transitions import count_transitions, training_sequences
from trirank_build.models.checkpoint import load_checkpoint
from trirank_build.models.family import make_ranker
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.prepare import prepare
from trirank_build.recipe import Recipe
from trirank_build.retrieval.counting import Pctm, PctmSettings, SeqRules, SeqRulesSettings, Steps
from trirank_build.retrieval.tasks import CatalogueTasks, state_scorer
from trirank_build.retrieval.transitions import Alike, Followers
from trirank_build.training.auto import choose
from trirank_build.training.pretraining import Pretraining
from trirank_build.training.trainer import train

ITEMS, USERS = 60, 400
RECIPE = {
    "name": "chains",
    "features": {"history_length": 8},
    "model": {"dim": 16, "heads": 2, "encoder_blocks": 1, "ffn": 32, "dropout": 0.0},
    "pretraining": {"objective": "next_item", "epochs": 8, "batch_size": 32, "learning_rate": 5e-3},
    "training": {"epochs": 0},
}


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> Dataset:
    """Everyone goes from item i to i + 1, round and round, so the next item is known."""
    folder, rng = tmp_path_factory.mktemp("chains"), np.random.default_rng(0)
    lines = []
    for user in range(1, USERS + 1):
        start, length = rng.integers(ITEMS), rng.integers(5, 14)
        lines.append(" ".join(str(n) for n in [user, *(1 + (start + np.arange(length)) % ITEMS)]))
    (folder / "chains.txt").write_text("\n".join(lines))
    return Dataset.load(prepare(str(folder / "chains.txt"), PrepareOptions()).save(folder / "data"))


def recipe(**sections):
    return Recipe.model_validate({**RECIPE, **{n: {**RECIPE.get(n, {}), **v} for n, v in sections.items()}})


@pytest.fixture(scope="module")
def features(chains, tmp_path_factory):
    return fit_features(chains, recipe().features, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def pretrained(chains, tmp_path_factory):
    return train(recipe(), chains, tmp_path_factory.mktemp("pretrained") / "run")


def ndcg(run, dataset, split="test"):
    tasks = CatalogueTasks.of(dataset, split, run.features)
    return rank_catalogue(tasks, state_scorer(run.model(), run.features)).ndcg().mean()


def test_every_event_but_a_users_first_is_the_next_one_once(chains, features):
    sequences = Sequences(chains, features)
    batch = sequences.batch(np.arange(len(sequences)))
    events = chains.training_events()
    assert (batch.following >= 0).sum() == len(events) - events["user_id"].n_unique()
    found = features.catalogue.item_ids(batch.following[batch.following >= 0])
    before = features.catalogue.item_ids(batch.rows[batch.following >= 0])
    assert (found == before % ITEMS + 1).all()


def test_long_sequences_are_cut_and_overlap_by_one(chains, features):
    sequences = Sequences(chains, features)
    batch = sequences.batch(np.arange(len(sequences)))
    assert batch.rows.shape[1] == features.spec.history_length
    assert len(sequences) > chains.training_events()["user_id"].n_unique()


def test_an_epoch_holds_every_window_once(chains, features, rng):
    sequences = Sequences(chains, features)
    plan = sequences.plan(rng, 32)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(sequences)))


def test_the_next_item_is_learned(pretrained, chains):
    assert ndcg(pretrained, chains) > 0.9


def test_masked_items_are_learned(chains, tmp_path):
    masked = recipe(model={"attention": "full"}, pretraining={"objective": "masked_item", "epochs": 15})
    assert ndcg(train(masked, chains, tmp_path / "run"), chains) > 0.7


@pytest.mark.parametrize("negatives", ["all", "uniform"])
def test_in_half_precision_too(negatives, chains, tmp_path):
    half = recipe(pretraining={"epochs": 10, "negatives": negatives}, training={"precision": "bfloat16"})
    assert ndcg(train(half, chains, tmp_path / "run"), chains) > 0.8


@pytest.mark.parametrize("architecture", ["sasrec", "lstm"])
def test_the_baselines_learn_it_too(architecture, chains, tmp_path):
    run = train(recipe(model={"architecture": architecture}, pretraining={"epochs": 15}), chains, tmp_path / "run")
    assert ndcg(run, chains) > 0.8


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "in_batch"])
def test_sampled_negatives_teach_it_too(negatives, chains, tmp_path):
    run = train(
        recipe(pretraining={"negatives": negatives, "negative_samples": 30, "epochs": 12}), chains, tmp_path / "run"
    )
    assert ndcg(run, chains) > 0.7


def test_all_negatives_are_the_softmax_over_the_catalogue(chains, features):
    """The chunked loss against the plain one."""
    torch.manual_seed(0)
    model = make_ranker(features.spec, recipe().model)
    phase = Pretraining(model, recipe().pretraining, chains, features, 0)
    tensors = phase.batch(np.arange(16), np.random.default_rng(0))
    loss = phase.step(**tensors)
    states = model.states(tensors["history"]).flatten(0, 1)[tensors["at"]]
    logits = model.logits(states, model.item_vectors(tensors["others"]))
    plain = torch.nn.functional.cross_entropy(logits, tensors["chosen_row"])
    torch.testing.assert_close(loss, plain)


def test_the_ranking_step_starts_where_pre_training_ended(pretrained, chains, tmp_path):
    """On held-out choices, among retrieved candidates, with the encoder frozen."""
    second = recipe(
        pretraining={"objective": "none"},
        training={"requests": "held_out", "epochs": 2, "freeze": "encoder", "candidates": 20},
    )
    run = train(second, chains, tmp_path / "run", start_from=pretrained.directory)
    before, after = (load_checkpoint(r.directory / "best.safetensors")[0] for r in (pretrained, run))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert not moved & {"embedding", "encoder", "position", "norm_memory", "log_temperature"}
    first, *others = [point["valid_ndcg10"] for point in run.facts["curve"]]
    best = load_checkpoint(run.directory / "best.safetensors")[1]["epoch"]
    assert max([first, *others]) == run.facts["curve"][best]["valid_ndcg10"]
    assert moved == ({"cross", "head", "dense_head", "affinity"} & moved)
    assert bool(moved) == (best > 0)
    found = evaluate_catalogue(run.model(), chains, run.features, "test", others={})
    assert found.table["ranker"]["NDCG@10"].value > 0.9


def test_what_was_lent_to_training_is_learned_at_the_end_and_judges_no_more(chains, features, tmp_path):
    """States and counts are fitted once more with the held-out choices; the linear weights stay as they were."""
    whole = recipe(
        features={"transitions": True}, model={"cross_blocks": 0}, training={"requests": "held_out", "refit": True}
    )
    run = train(whole, chains, tmp_path / "run")
    curve = run.facts["curve"]
    first = [point for point in curve if point["phase"] == "next_item"]
    assert [point["epoch"] for point in curve if point["phase"] == "ranking"] == [0]
    best = max(first, key=lambda point: point["valid_ndcg10"])["epoch"]
    assert sum(point["phase"] == "refit" for point in curve) == best
    one, two = (load_checkpoint(tmp_path / "run" / f"{name}.safetensors")[0] for name in ("ranking", "best"))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert {"dense_head.weight", "affinity"} <= same
    assert not {"embedding.weight", "position"} & same

    lent, known = chains.lent_users(whole.seed), chains.with_lent(whole.seed)
    judged = run.judged(chains)
    valid = judged.events.filter(judged.events["split"] == "valid")["user_id"].unique().to_numpy()
    assert len(valid) == pytest.approx(0.2 * USERS, abs=2)
    assert not np.isin(valid, lent).any()
    assert not np.isin(judged.split("valid")["user_id"].to_numpy(), lent).any()
    with_lent = count_transitions(*training_sequences(known, features.catalogue), len(features.catalogue))
    for found, expected in zip(run.features.packer.transitions, with_lent, strict=True):
        np.testing.assert_array_equal(found, expected)
    before = count_transitions(*training_sequences(chains, features.catalogue), len(features.catalogue))
    assert with_lent.weights.sum() > before.weights.sum()
    found = evaluate_catalogue(run.model(), judged, run.features, "test", others={})
    assert found.table["ranker"]["NDCG@10"].value > 0.9


def test_held_out_choices_need_states(chains, tmp_path):
    with pytest.raises(BadRecipe, match="choose pretraining.objective, or start from a run"):
        train(
            recipe(pretraining={"objective": "none"}, training={"requests": "held_out", "epochs": 1}),
            chains,
            tmp_path / "run",
        )


def test_bst_has_no_states_to_pre_train(chains, tmp_path):
    with pytest.raises(BadRecipe, match='"bst" has no states to pre-train'):
        train(recipe(model={"architecture": "bst"}), chains, tmp_path / "run")


def test_a_vocabulary_that_does_not_fit_the_checkpoint(pretrained, chains, tmp_path):
    (tmp_path / "other.txt").write_text("\n".join(f"{u} 1 2 3 4 5 {u + 5}" for u in range(1, 30)))
    other = Dataset.load(prepare(str(tmp_path / "other.txt"), PrepareOptions()).save(tmp_path / "data"))
    with pytest.raises(BadCheckpoint, match=r"trained with vocabulary_size \d+, this dataset and recipe have \d+"):
        train(recipe(), other, tmp_path / "run", start_from=pretrained.directory)


def test_other_features_do_not_fit_either(pretrained, chains, tmp_path):
    with pytest.raises(BadCheckpoint, match="trained with history_length 8, this dataset and recipe have 9"):
        train(recipe(features={"history_length": 9}), chains, tmp_path / "run", start_from=pretrained.directory)


def test_another_architecture_does_not_fit(pretrained, chains, tmp_path):
    with pytest.raises(BadCheckpoint, match="does not fit the model"):
        train(recipe(model={"dim": 32}), chains, tmp_path / "run", start_from=pretrained.directory)


def test_an_item_left_out_of_the_inputs_is_not_seen(chains, tmp_path):
    """Here the id is all there is; without it every item looks alike."""
    run = train(recipe(features={"without": ["item"]}, pretraining={"epochs": 1}), chains, tmp_path / "run")
    assert ndcg(run, chains) < 0.2


def test_weights_that_are_no_numbers_are_no_perfect_ranker(pretrained, chains, tmp_path):
    """NaN is above nothing and below nothing. Validation tells, before such weights pass for the best ones."""
    with pytest.raises(Diverged, match="no number"):
        train(recipe(pretraining={"learning_rate": 1e38, "batch_size": 10_000}), chains, tmp_path / "run")
    assert not (tmp_path / "run" / "next_item.safetensors").is_file()
    model = pretrained.model()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    tasks = CatalogueTasks.of(chains, "test", pretrained.features)
    with pytest.raises(Diverged, match="lower learning_rate"):
        rank_catalogue(tasks, state_scorer(model, pretrained.features))
    examples = Examples.read(chains, "test", pretrained.features)
    with pytest.raises(Diverged, match="lower learning_rate"):
        score(model, examples)


# Negatives.


def test_uniform_negatives_are_even(rng):
    drawn = NegativeSampler("uniform", np.array([1000, 1, 1, 1]), 8_000).draw(rng, np.array([0], np.int32))
    assert np.bincount(drawn.rows) / 8_000 == pytest.approx(np.full(4, 0.25), abs=0.03)


def test_popular_negatives_follow_the_flattened_counts(rng):
    counts = np.array([81, 16, 1])
    drawn = NegativeSampler("popularity", counts, 20_000).draw(rng, np.array([0], np.int32))
    share = counts**0.75 / (counts**0.75).sum()
    assert np.bincount(drawn.rows) / 20_000 == pytest.approx(share, abs=0.02)
    assert np.exp(drawn.log_q) == pytest.approx(share[drawn.rows], rel=1e-5)


def test_in_batch_negatives_are_the_other_choices(rng):
    drawn = NegativeSampler("in_batch", np.array([5, 1, 3, 9]), 7).draw(rng, np.array([[3, -1], [1, 3]], np.int32))
    assert sorted(drawn.rows.tolist()) == [1, 3]
    assert np.exp(drawn.log_q) == pytest.approx(1 - (1 - np.array([1, 9]) / 18) ** 3, rel=1e-5)  # of three choices


def test_an_in_batch_draw_is_as_likely_as_it_is_to_be_among_the_choices(rng):
    """Counted over many batches of 50 choices: the popular item is in nearly all of them, and in none 25 times."""
    share = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    sampler = NegativeSampler("in_batch", (share * 10_000).astype(np.int64), 0)
    batches = [sampler.draw(rng, rng.choice(5, 50, p=share).astype(np.int32)) for _ in range(2_000)]
    seen = np.bincount(np.concatenate([batch.rows for batch in batches]), minlength=5) / len(batches)
    np.testing.assert_allclose(np.exp(sampler.log_q(np.arange(5, dtype=np.int32), 50)), seen, atol=0.03)


def test_all_negatives_are_all(rng):
    assert NegativeSampler("all", np.array([5, 1, 3]), 7).draw(rng, np.array([0], np.int32)).rows.tolist() == [0, 1, 2]


def test_every_request_has_its_own(rng):
    rows = NegativeSampler("uniform", np.ones(1000), 20).draw_each(rng, 4, np.zeros((4, 1), np.int32))
    assert rows.shape == (4, 20)
    assert len(np.unique(rows, axis=0)) == 4


# Data there is too little of.


def few(lines, folder):
    (folder / "few.txt").write_text("\n".join(lines))
    return Dataset.load(prepare(str(folder / "few.txt"), PrepareOptions()).save(folder / "data"))


def test_a_single_user_is_enough_to_train(tmp_path):
    dataset = few(["1 5 6 7 8 9"], tmp_path)
    assert np.isfinite(ndcg(train(recipe(pretraining={"epochs": 1}), dataset, tmp_path / "run"), dataset))


def test_a_single_item_has_no_next_one(tmp_path):
    with pytest.raises(BadData, match="no user chose two different items"):
        train(recipe(), few(["1 5 5 5 5", "2 5 5 5"], tmp_path), tmp_path / "run")


def test_users_with_one_event_have_no_next_item(tmp_path):
    with pytest.raises(BadData):
        train(recipe(), few(["1 5", "2 6", "3 7"], tmp_path), tmp_path / "run")


def test_the_simple_baselines_know_the_chain_less_well(pretrained, chains):
    found = evaluate_catalogue(pretrained.model(), chains, pretrained.features, "test")
    assert set(contenders(chains, pretrained.features)) == {"popularity", "item_knn", "matrix_factorisation"}
    for name in ("popularity", "matrix_factorisation"):
        assert found.differences[name].low > 0, name
    assert found.differences["item_knn"].value >= 0  # which also goes by what is bought together


def test_sampled_negatives_flatter(pretrained, chains):
    whole = evaluate_catalogue(pretrained.model(), chains, pretrained.features, "test", others={})
    sampled = evaluate_catalogue(pretrained.model(), chains, pretrained.features, "test", others={}, negatives=5)
    assert sampled.table["ranker"]["Hit@10"].value == 1  # six candidates, ten places
    assert sampled.table["ranker"]["NDCG@10"].value >= whole.table["ranker"]["NDCG@10"].value - 0.05


# Counting.


@pytest.fixture(scope="module")
def counted(chains, tmp_path_factory):
    odd = pl.Series([[["even", "odd"][at % 2], f"ten {at // 10}"] for at in range(chains.items.height)])
    chains = replace(chains, items=chains.items.with_columns(odd.alias("attributes")))
    return fit_features(
        chains,
        recipe(features={"transitions": True}, training={"requests": "held_out"}).features,
        tmp_path_factory.mktemp("counted"),
    )


def test_candidates_are_found_by_the_numbers_that_the_ranker_is_given_of_them(chains, counted):
    """Every item's transition and attribute match, from the whole catalogue at once and from serving's kernels."""
    tasks = CatalogueTasks.of(chains, "test", counted)
    examples = Examples(chains, counted, 50, ITEMS)
    examples.users[:], examples.times[:] = tasks.users[:50], tasks.times[:50]
    examples.rows[:] = np.arange(ITEMS)
    dense = examples.whole(np.arange(50)).packed.dense
    histories = examples.histories(np.arange(50), counted.spec.history_length)
    for name, source in (("transition", Followers(counted)), ("attribute_match", Alike(counted))):
        column = dense[..., DENSE.index(name)]
        assert column.any()
        np.testing.assert_allclose(source.scores(histories), column, atol=1e-5, rtol=1e-5)


USERS_OF_THREE, ROWS_OF_THREE = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 2], np.int32)
"""One user took items 0, 1, 2, another 0, 2."""


def test_pctm_is_a_sum_of_smoothed_log_counts():
    steps = Steps(USERS_OF_THREE, ROWS_OF_THREE, 3)
    settings = PctmSettings(window=2, counted="inverse", count_rate=1.0, tau=6.0, decay=0.5, popularity=-1.0)
    found = Pctm(steps, settings).scores(np.array([[-1, 0, 1]], np.int32))[0]
    # after 0 came 1 once, 2 once next and once two steps on; after 1 came 2 once; item 1 is newer, 2/3 of the weight
    background = -np.log((np.array([2, 1, 2]) + 1) / 8)
    evidence = [0, np.log1p(1 * 3 / 6) / 3, np.log1p(1.5 * 3 / 6) / 3 + np.log1p(1 * 3 / 6) * 2 / 3]
    np.testing.assert_allclose(found, background + evidence, rtol=1e-5)


def test_an_even_tail_has_the_mass_that_the_newest_events_leave():
    steps = Steps(USERS_OF_THREE, ROWS_OF_THREE, 3)
    settings = PctmSettings(window=1, tau=3.0, head=1, recent=0.8, decay=0.5)
    found = Pctm(steps, settings).scores(np.array([[1, 1, 0]], np.int32))[0]
    np.testing.assert_allclose(found, [0, 0.8 * np.log1p(1), 0.8 * np.log1p(1) + 0.2 * np.log1p(1)], rtol=1e-5)


def test_sequential_rules_keep_the_strongest_and_weigh_older_events():
    steps = Steps(USERS_OF_THREE, ROWS_OF_THREE, 3)
    settings = SeqRulesSettings(window=2, counted="inverse", kept=1, events=2, aged="inverse")
    found = SeqRules(steps, settings).scores(np.array([[2, 0, 1]], np.int32))[0]
    # of item 0's rules 1 (1.0) and 2 (1.5) the second stays, and counts half; item 2 is too old to start any
    np.testing.assert_allclose(found, [0, 0, 1 + 1.5 / 2], rtol=1e-6)


def test_sizes_come_from_the_data(chains):
    chosen, reasons = choose(chains)
    assert (chosen.name, chosen.model.dim, chosen.features.history_length) == ("auto", 16, 16)
    assert chosen.pretraining.negative_samples == ITEMS
    assert reasons[0] == "recipe sequences: events have an order and no times: one choice follows the other"
    assert any(reason == f"pretraining.negative_samples = {ITEMS}: {ITEMS} items" for reason in reasons)
