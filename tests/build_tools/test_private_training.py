"""Training with differential privacy: what one user can change, what is added, and what the account says."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from trirank.contract import ANONYMOUS_USER
from trirank_build.compression.chain import compress
from trirank_build.compression.recipe import parse_recipe
from trirank_build.compression.search import Target, search
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData, BadRecipe
from trirank_build.evaluation.scoring import retrieval_ndcg, valid_ndcg
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import fit_features
from trirank_build.models.checkpoint import load_checkpoint
from trirank_build.models.family import make_ranker
from trirank_build.privacy import budget
from trirank_build.privacy.budget import counts_noise, private_counts, spent, steps_noise
from trirank_build.recipe import PrivacyRecipe, Recipe
from trirank_build.repository.assemble import assemble
from trirank_build.repository.reports import export_run
from trirank_build.training import private as private_module
from trirank_build.training.private import Private, PrivateOptimiser, Users
from trirank_build.training.ranking import Ranking, logged
from trirank_build.training.trainer import _identity, train


@pytest.fixture(scope="module")
def private_recipe(recipe):
    return recipe.changed({
        "training.privacy": {"epsilon": 8.0, "delta": 1e-5}, "training.batch_size": 32, "training.epochs": 2,
        "model.dropout": 0.0, "training.without_scores": 0.0, "training.item_dropout": 0.0,
    })  # fmt: skip


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


@pytest.fixture(scope="module")
def run(private_recipe, dataset, tmp_path_factory):
    return train(private_recipe, dataset, tmp_path_factory.mktemp("private") / "run")


# The account.


@pytest.mark.parametrize("noise", [0.7, 2.0, 10.0])
def test_the_gaussian_mechanism_costs_what_the_theory_says(noise):
    """Rényi divergence a / 2 s², and its conversion (Balle et al., AISTATS 2020, theorem 21)."""
    delta, orders = 1e-6, np.arange(1.01, 400, 0.01)
    theory = orders / (2 * noise**2) + np.log((orders - 1) / orders) - (np.log(delta) + np.log(orders)) / (orders - 1)
    assert spent([(noise, 1.0, 1)], delta) == pytest.approx(theory.min(), rel=0.01)


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_steps_and_counts_are_within_epsilon_together_and_no_further_than_need_be(epsilon):
    privacy = PrivacyRecipe(epsilon=epsilon)
    counting = counts_noise(privacy)
    noise = steps_noise(privacy, 0.05, 200)
    together = spent([(counting, 1.0, 1), (noise, 0.05, 200)], privacy.delta)
    assert 0.98 * epsilon < together <= epsilon
    assert spent([(counting, 1.0, 1)], privacy.delta) <= privacy.counts_share * epsilon
    assert steps_noise(privacy, 0.05, 400) > noise
    assert steps_noise(privacy, 0.1, 200) > noise


def test_a_promise_that_nothing_keeps():
    with pytest.raises(BadRecipe, match=r"no noise gives epsilon 2.5e-07 at delta 1e-12: take a larger epsilon"):
        steps_noise(PrivacyRecipe(epsilon=1e-6, delta=1e-12), 0.4, 100_000)


# Counts.


def test_what_a_user_adds_to_counts_is_bounded(monkeypatch):
    monkeypatch.setattr(budget, "counts_noise", lambda privacy: 0.0)
    ids, privacy = np.arange(100), PrivacyRecipe(choices_per_user=8)
    others = pl.DataFrame({"user_id": np.arange(1, 31), "item_id": np.arange(30)})
    eager = pl.DataFrame({"user_id": [99] * 300, "item_id": np.arange(300) % 60})
    without, both = (private_counts(each, ids, privacy) for each in (others, pl.concat([others, eager])))
    assert without.sum() == 30
    assert set(np.unique(both - without)) == {0, 1}
    assert (both - without).sum() == 8
    again = pl.DataFrame({"user_id": [7] * 20, "item_id": [3] * 20})
    assert private_counts(again, ids, privacy).sum() == 1
    nobody = pl.DataFrame({"user_id": [ANONYMOUS_USER] * 20, "item_id": [3] * 20})
    assert private_counts(nobody, ids, privacy)[3] == 20


def test_counts_have_noise_of_the_size_that_the_account_names():
    privacy, ids = PrivacyRecipe(epsilon=4.0), np.arange(20_000)
    events = pl.DataFrame({"user_id": np.zeros(0, np.int64), "item_id": np.zeros(0, np.int64)})
    found = private_counts(events, ids, privacy)
    # What is below zero is cut off; what is left has the second moment of the whole.
    assert np.sqrt((found[found > 0] ** 2).mean()) == pytest.approx(counts_noise(privacy) * 8**0.5, rel=0.05)
    assert (private_counts(events, ids, privacy) != found).any()


def test_words_of_queries_are_no_part_of_the_tokeniser(dataset, private_recipe, tmp_path):
    private = private_recipe.training.privacy
    asked = dataset.requests.with_columns(query=pl.lit("zyxwvu zyxwvu"))
    tokens = {}
    for name, data, privacy in (
        ("plain", dataset, private),
        ("asked", replace(dataset, requests=asked), private),
        ("without privacy", replace(dataset, requests=asked), None),
    ):
        (tmp_path / name).mkdir()
        features = fit_features(data, private_recipe.features, tmp_path / name, privacy=privacy)
        tokens[name] = (tmp_path / name / "tokenizer.json").read_text()
        assert features.catalogue.ids.shape == dataset.items["item_id"].shape
    assert tokens["plain"] == tokens["asked"] != tokens["without privacy"]


# Steps.


@pytest.fixture(scope="module")
def phase(private_recipe, dataset, run, tmp_path_factory):
    torch.manual_seed(3)
    model = make_ranker(run.features.spec, private_recipe.model)
    with torch.no_grad():  # so that every layer has a gradient
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    requests = logged(dataset, run.features, private_recipe.training, 7, tmp_path_factory.mktemp("examples"))
    return Ranking(model, private_recipe.training, dataset, *requests)


def gradients(phase, which, max_norm, noise=0.0, batch_size=8):
    """Name → gradient after one private step on these requests."""
    step = copy.deepcopy(phase.step)
    settings = PrivacyRecipe(max_norm=max_norm)
    made = SimpleNamespace(noise=noise, settings=settings, batch_size=batch_size)
    tensors = phase.batch(np.array(which), np.random.default_rng(0))
    PrivateOptimiser(step, 1e-3, 0.0, made).backward(step, tensors)
    return {name: parameter.grad for name, parameter in step.named_parameters() if parameter.requires_grad}


def norm(found):
    return float(torch.cat([each.flatten() for each in found.values()]).norm())


def test_without_noise_and_limit_it_is_the_usual_gradient(phase, monkeypatch):
    """Of all layers, those that opacus' own hooks do not know among them."""
    monkeypatch.setattr(phase.private, "chance", lambda: np.random.default_rng(5))
    which = phase._teaching[:8]
    tensors = phase.batch(which, np.random.default_rng(0))
    usual = copy.deepcopy(phase.step)
    for at in range(8):
        usual(**{name: tensor[at : at + 1] for name, tensor in tensors.items()}).backward()
    expected = {name: p.grad / 8 for name, p in usual.named_parameters() if p.grad is not None}
    for numbers in (1 << 26, 3 * sum(p.numel() for p in usual.parameters())):  # at once, and three at a time
        monkeypatch.setattr(private_module, "_NUMBERS", numbers)
        found = gradients(phase, which, max_norm=1e9)
        assert all(not found[name].any() for name in set(found) - set(expected))
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, atol=1e-5), name
    assert all(float(each.abs().max()) > 0 for name, each in expected.items() if "head" in name or "cross" in name)


@pytest.mark.parametrize("max_norm", [0.01, 0.1])
def test_no_user_moves_a_step_by_more_than_the_norm(phase, max_norm):
    """In what is divided by the expected batch. Without the limit they would move it further."""
    some, batch_size = phase._teaching[:9].tolist(), 8
    free = {at: norm(gradients(phase, [some[at]], 1e9, batch_size=1)) for at in range(9)}
    assert min(free.values()) > max_norm
    for at in range(9):
        alone = norm(gradients(phase, [some[at]], max_norm, batch_size=batch_size))
        assert alone <= max_norm / batch_size * 1.001
        assert alone == pytest.approx(max_norm / batch_size, rel=1e-3)
    assert norm(gradients(phase, some, max_norm, batch_size=batch_size)) <= 9 * max_norm / batch_size * 1.001


def test_who_else_is_there_moves_a_step_by_no_more_than_the_norm(phase, monkeypatch):
    """The last one of a batch, whom those before them do not notice if chance is the same."""
    monkeypatch.setattr(phase.private, "chance", lambda: np.random.default_rng(5))
    some, max_norm = np.sort(phase._teaching[:9]), 0.05
    without, both = (gradients(phase, which, max_norm) for which in (some[:-1], some))
    moved = norm({name: both[name] - without[name] for name in both})
    assert moved == pytest.approx(max_norm / 8, rel=1e-2)


def test_nobodys_chance_depends_on_who_comes_before_them(phase):
    """A public seed gave each place of a batch its own: who came in between moved what all behind them saw."""
    which = phase._teaching[:8]
    batches = [phase.batch(which, np.random.default_rng(0)) for _ in range(2)]
    assert not torch.equal(batches[0]["candidates"], batches[1]["candidates"])
    first, second = (torch.rand(3) for _ in range(2) if phase.batch(which, np.random.default_rng(0)))
    assert not torch.equal(first, second)  # dropout's


def test_a_gradient_that_is_no_number_is_left_out(phase, monkeypatch):
    """It could not be cut, and whether a run ends with it is seen by all."""
    which = phase._teaching[:4]
    tensors = phase.batch(which, np.random.default_rng(0))
    quiet, broken = copy.deepcopy(phase.step), {name: tensor.clone() for name, tensor in tensors.items()}
    broken["dense"][2] = torch.inf
    made = SimpleNamespace(noise=0.0, settings=PrivacyRecipe(max_norm=0.1), batch_size=4)
    loss = PrivateOptimiser(quiet, 1e-3, 0.0, made).backward(quiet, broken)
    assert torch.isfinite(loss)
    rest = copy.deepcopy(phase.step)
    others = {name: tensor[[0, 1, 3]] for name, tensor in tensors.items()}
    PrivateOptimiser(rest, 1e-3, 0.0, made).backward(rest, others)
    for one, other in zip(quiet.parameters(), rest.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_noise_is_added_to_every_number(phase, monkeypatch):
    monkeypatch.setattr(phase.private, "chance", lambda: np.random.default_rng(5))
    which, noise, max_norm, batch_size = phase._teaching[:8], 3.0, 0.5, 8
    quiet = gradients(phase, which, max_norm)
    loud = gradients(phase, which, max_norm, noise)
    table = "model.embedding.weight"
    assert not loud[table][0].any()  # "missing" means nothing, and stays so
    quiet[table], loud[table] = quiet[table][1:], loud[table][1:]
    added = torch.cat([(loud[name] - quiet[name]).flatten() for name in quiet])
    assert float(added.std()) == pytest.approx(noise * max_norm / batch_size, rel=0.05)
    assert float(added.mean().abs()) < 0.02 * float(added.std())
    assert all(((loud[name] - quiet[name]) != 0).float().mean() > 0.999 for name in quiet)
    other = gradients(phase, which, max_norm, noise)  # the seed of all else is the same
    assert not torch.equal(loud[table], other[table][1:])


def examples_of(users):
    return SimpleNamespace(users=np.array(users))


def test_a_step_takes_each_user_once_at_most_and_one_of_their_requests():
    owners = [5, 5, 5, 9, ANONYMOUS_USER, 9, ANONYMOUS_USER, 2, 2, 2]
    teaching = np.array([0, 1, 2, 3, 4, 5, 6, 9])  # 7 and 8 teach nothing
    users = Users.of(examples_of(owners), teaching)
    assert len(users) == 5  # two anonymous ones
    rng, seen = np.random.default_rng(1), []
    for _ in range(2_000):
        drawn = users.draw(0.4, rng)
        named = [owners[at] for at in drawn if owners[at] != ANONYMOUS_USER]
        assert len(named) == len(set(named))
        assert len(set(drawn.tolist())) == len(drawn)
        seen += drawn.tolist()
    often = np.bincount(seen, minlength=10) / 2_000
    assert set(seen) == set(teaching.tolist())
    assert often[[4, 6, 9]] == pytest.approx(0.4, abs=0.05)
    assert often[[0, 1, 2]] == pytest.approx(0.4 / 3, abs=0.04)
    assert often[[3, 5]] == pytest.approx(0.2, abs=0.04)


def test_there_are_users_enough(private_recipe):
    users = Users(np.arange(60), np.arange(61))
    with pytest.raises(BadData, match=r"60 users have something to teach, .* takes 32 of them in a step"):
        Private(private_recipe.training.privacy, users, 32, 3)
    with pytest.raises(BadData, match=r"delta = 0\.0005 says nothing of 3,000 users: .* take one well below 0\.0003"):
        Private(PrivacyRecipe(delta=5e-4), Users(np.arange(3_000), np.arange(3_001)), 32, 3)


# A run.


def test_a_run_says_what_it_promises(run, private_recipe):
    facts = run.facts["privacy"]
    assert facts["unit"] == "user"
    assert 0.95 * 8 < facts["epsilon"] <= 8
    account = [
        (facts["counts_noise_multiplier"], 1.0, 1),
        (facts["noise_multiplier"], facts["sampling_rate"], facts["steps"]),
    ]
    assert spent(account, facts["delta"]) == pytest.approx(facts["epsilon"], abs=1e-3)
    assert {point["loss"] for point in run.facts["curve"]} == {None}  # of users, without noise
    assert facts["steps"] == private_recipe.training.epochs * round(facts["users"] / 32)


def test_every_run_is_another_one(run, private_recipe, dataset, tmp_path):
    """Who knows the seed knows neither the noise nor who was taken."""
    again = train(private_recipe, dataset, tmp_path / "again")
    one, other = (load_checkpoint(each.directory / "best.safetensors")[0] for each in (run, again))
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert (run.features.catalogue.dense != again.features.catalogue.dense).any()


def test_validation_chooses_nothing(private_recipe, dataset, tmp_path, monkeypatch):
    falling = iter([0.9, 0.8, 0.7, 0.6, 0.5])
    monkeypatch.setattr(Ranking, "validate", lambda self: next(falling))
    changed = private_recipe.changed({"training.epochs": 3, "training.patience": 1})
    found = train(changed, dataset, tmp_path / "run")
    assert [point["valid_ndcg10"] for point in found.facts["curve"]] == [0.9, 0.8, 0.7, 0.6]
    assert found.facts["valid_ndcg10"] == 0.6
    assert load_checkpoint(found.directory / "best.safetensors")[1]["epoch"] == 3


def test_with_little_noise_it_learns(private_recipe, dataset, tmp_path):
    changed = private_recipe.changed({
        "training.privacy.epsilon": 100.0, "training.epochs": 12, "training.learning_rate": 1e-2,
    })  # fmt: skip
    found = train(changed, dataset, tmp_path / "run")
    test = Examples.read(dataset, "test", found.features)
    assert valid_ndcg(found.model(), test) > 1.2 * retrieval_ndcg(test)


def test_a_killed_run_goes_on_with_the_steps_that_are_left(private_recipe, dataset, tmp_path, monkeypatch):
    taken, backward = [], PrivateOptimiser.backward

    def counted(self, step, tensors, half=False):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(1)
        return backward(self, step, tensors, half)

    monkeypatch.setattr(PrivateOptimiser, "backward", counted)
    often = private_recipe.changed({"training.checkpoint_minutes": 1e-9})
    with pytest.raises(KeyboardInterrupt):
        train(often, dataset, tmp_path / "run")
    before = len(taken)
    taken.append(1)
    found = train(often, dataset, tmp_path / "run")
    assert len(taken) - 1 == found.facts["privacy"]["steps"] > before


# What would break the promise.


WRONG = {
    "a linear start": ({"training.start": "linear"}, "goes with start = \"nothing\", not \"linear\": the linear order"),
    "held-out requests": ({"training.requests": "held_out"}, "goes with requests = \"logged\""),
    "popular negatives": ({"training.negatives": "popularity"}, "drawn from what all users chose"),
    "negatives of others": ({"training.negatives": "in_batch"}, "drawn from what all users chose"),
    "half precision": ({"training.precision": "bfloat16"}, "precision = \"float32\""),
    "no training": ({"training.epochs": 0}, "epochs of 1 and more and a batch_size of 32 and more, not 0 and 32"),
    "a small batch": ({"training.batch_size": 31}, "not 2 and 31"),
    "pre-training": ({"pretraining.objective": "next_item"}, "pretraining.objective = \"none\""),
    "rows that move": ({"model.embedding_updates": "rows"}, "which rows move tells who was there"),
    "tuning": ({"tuning.space": {"model.dim": [32]}}, "cannot be tuned: each trial would use up"),
    "no epsilon": ({"training.privacy.epsilon": 0}, "epsilon: Input should be greater than 0"),
    "no delta": ({"training.privacy.delta": 0.5}, "delta: Input should be less than 0.001"),
    "all for counting": ({"training.privacy.counts_share": 1.0}, "counts_share: Input should be less than 1"),
    "another key": ({"training.privacy": {"sigma": 1}}, "sigma: unknown key"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_recipes_that_promise_what_they_do_not_keep(private_recipe, changes, words):
    with pytest.raises(BadRecipe, match=words):
        private_recipe.changed(changes)


def test_what_an_earlier_run_learned_is_in_no_account(private_recipe, dataset, world, run, tmp_path):
    with pytest.raises(BadRecipe, match=r"training.privacy starts from nothing: .* Leave --start-from or"):
        train(private_recipe, dataset, tmp_path / "run", start_from=world.run)
    with pytest.raises(BadRecipe, match="Leave --update or"):
        train(private_recipe, dataset, tmp_path / "run", update=world.run)
    assert not (tmp_path / "run").exists()
    newer = replace(dataset, description=replace(dataset.description, digest="0" * 64))
    with pytest.raises(BadData, match="was trained with differential privacy, and counts of"):
        run.check_refresh(newer)


STEPS = {
    "fine-tuning": ([{"kind": "fold"}], "fine-tuning would learn"),
    "importance": ([{"kind": "prune", "ffn": 0.5, "training": {"epochs": 0}}], 'importance = "taylor" would learn'),
    "calibration": ([{"kind": "quantise", "training": {"epochs": 0}}], "calibration would learn"),
    "a student": ([{"kind": "distil", "training": {"epochs": 0}}], "the student would learn"),
}


@pytest.mark.parametrize(("steps", "words"), STEPS.values(), ids=STEPS)
def test_compression_that_reads_users_is_refused(run, dataset, tmp_path, steps, words):
    chain = parse_recipe({"name": "c", "steps": steps})
    with pytest.raises(BadRecipe, match=rf"step 1 .* was trained with differential privacy, and {words}"):
        compress(chain, run, dataset, tmp_path / "compressed")


def test_a_search_of_compressions_is_refused(run, dataset, tmp_path):
    start = parse_recipe({"name": "c", "steps": [{"kind": "fold", "training": {"epochs": 0}}]})
    with pytest.raises(BadRecipe, match="was trained with differential privacy, and a search chooses by its users"):
        search(start, run, dataset, tmp_path / "search", Target(size_mb=1.0), 3)
    assert not (tmp_path / "search").exists()


def test_other_compression_keeps_the_promise(run, dataset, tmp_path):
    none = {"epochs": 0}
    steps = [
        {"kind": "prune", "ffn": 0.5, "importance": "magnitude", "training": none},
        {"kind": "fold", "training": none},
        {"kind": "quantise", "precision": "float16"},
    ]
    found = compress(parse_recipe({"name": "c", "steps": steps}), run, dataset, tmp_path / "c")
    assert found.last.facts["privacy"] == run.facts["privacy"]


def test_its_release_says_so_and_holds_nobodys_requests(run, dataset, tmp_path):
    export_run(run, tmp_path / "ranker.onnx")
    release = assemble(
        run, dataset, tmp_path / "ranker.onnx", tmp_path / "releases", engine="onnxruntime", allow_failing_gate=True
    )
    assert json.loads((release / "manifest.json").read_text())["privacy"] == run.facts["privacy"]
    card = (release / "MODEL_CARD.md").read_text()
    assert f"ε = {run.facts['privacy']['epsilon']:.2f} at δ = 1e-05" in card
    assert "last epoch" in card
    recorded = json.loads((release / "requests.json").read_text())
    assert {request["scenario"] for request in recorded} == set(dataset.split("test")["scenario"].unique())
    assert any(request["query"] for request in recorded)
    assert any(not request["query"] for request in recorded)
    real = {tuple(sorted(items)) for items in dataset.requests.select("item_ids").collect()["item_ids"].to_list()}
    queries = set(dataset.requests.filter(pl.col("query") != "").select("query").collect()["query"])
    for request in recorded:
        assert tuple(sorted(request["item_ids"])) not in real
        assert request["query"] not in queries
        assert request["retrieval_scores"] is None


def test_a_library_that_is_not_there(private_recipe, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants", None)
    with pytest.raises(BadRecipe, match=r"training.privacy needs opacus \(.*\); pip install 'trirank\[privacy\]'"):
        train(private_recipe, dataset, tmp_path / "run")


def test_other_runs_are_known_by_what_they_were_known_by_before(recipe, dataset):
    """A run that was begun before there was a section for privacy is gone on with."""
    settings = recipe.model_dump_json(exclude={"tuning": True, "training": {"checkpoint_minutes", "privacy"}})
    assert "privacy" not in settings
    known = hashlib.sha256(f"{settings}\0{dataset.description.digest}\0".encode()).hexdigest()
    assert _identity(recipe, dataset, None, False) == known
    assert _identity(recipe.changed({"training.privacy": {"epsilon": 8.0}, "training.batch_size": 32}), dataset, None,
                     False) != known  # fmt: skip


def test_a_recipe_says_it_in_a_section_of_its_own(private_recipe):
    assert Recipe.model_validate(private_recipe.model_dump()).training.privacy == PrivacyRecipe(delta=1e-5)
