"""Training learns, is deterministic, and goes on where it was stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from trirank_build.compression.finetune import Finetuning
from trirank_build.compression.step import FineTuning
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint, TrirankBuildError
from trirank_build.evaluation.evaluate import evaluate
from trirank_build.evaluation.scoring import log_propensities, propensity_weights, retrieval_ndcg, score, valid_ndcg
from trirank_build.features.examples import Examples, HistoryIndex
from trirank_build.features.fitting import Features, fit_features
from trirank_build.features.negatives import NegativeSampler
from trirank_build.models.checkpoint import load_checkpoint
from trirank_build.training import losses, ranking
from trirank_build.training.loop import Loop
from trirank_build.training.losses import listwise_softmax
from trirank_build.training.trainer import train


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


def weights(folder):
    return load_checkpoint(folder / "best.safetensors")[0]


def world_features(world):
    return Features.load(world.run / "features")


def changed(recipe, **training):
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_ranker_beats_what_it_must_beat(world, trained, dataset):
    found = evaluate(trained.model(), Examples.read(dataset, "test", trained.features), dataset, trained.features)
    for other in ("retrieval", "random"):
        assert found.differences[other].low > 0, other
        assert found.differences[other].p_value < 0.05, other
    ndcg = {name: row["NDCG@10"].value for name, row in found.table.items()}
    assert max(ndcg, key=ndcg.get) == "optimum"


def test_the_same_seed_gives_the_same_weights(recipe, dataset, world, tmp_path):
    train(recipe, dataset, tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(world.run))


def test_the_run_keeps_its_recipe_with_every_default(recipe, trained):
    assert trained.recipe == recipe


def test_a_run_knows_what_it_had_to_beat(trained, dataset):
    examples = Examples.read(dataset, "valid", trained.features)
    found = trained.facts["valid_retrieval_ndcg10"]
    assert found == pytest.approx(retrieval_ndcg(examples), abs=1e-6)
    assert found < max(point["valid_ndcg10"] for point in trained.facts["curve"])
    assert retrieval_ndcg(examples, 1.0) == pytest.approx(found, abs=1e-6)  # no position is known


def test_another_seed_gives_others(recipe, dataset, world, tmp_path):
    train(recipe.model_copy(update={"seed": 99}), dataset, tmp_path / "other")
    assert not same(weights(tmp_path / "other"), weights(world.run))


def test_a_killed_run_goes_on_at_the_very_batch(recipe, dataset, world, tmp_path, monkeypatch):
    """Cut in the middle of the second epoch, after a place was saved; the weights are those of an unbroken run."""
    steps = -(-int((Examples.read(dataset, "train", world_features(world)).labels > 0).any(1).sum()) // 128)
    plain, calls = ranking.Ranking.batch, iter(range(10**6))

    def cut(self, which, rng):
        if next(calls) == steps + 3:
            raise KeyboardInterrupt
        return plain(self, which, rng)

    monkeypatch.setattr(ranking.Ranking, "batch", cut)
    often = changed(recipe, checkpoint_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        train(often, dataset, tmp_path / "run")
    place = load_checkpoint(tmp_path / "run" / "last.safetensors")[1]
    assert (place["epoch"], place["at"]) == (1, 3)
    assert not (tmp_path / "run" / "run.json").is_file()
    monkeypatch.setattr(ranking.Ranking, "batch", plain)
    run = train(often, dataset, tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(world.run))
    assert len(run.facts["curve"]) == 1 + recipe.training.epochs


def test_a_finished_run_is_used_again(recipe, dataset, world, monkeypatch):
    monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("trained again"))
    assert train(recipe, dataset, world.run).facts["recipe"] == "tiny"


def test_another_recipe_does_not_overwrite(recipe, dataset, world):
    before = (world.run / "best.safetensors").read_bytes()
    with pytest.raises(BadCheckpoint, match="choose another --out, or say --fresh"):
        train(recipe.model_copy(update={"seed": 5}), dataset, world.run)
    assert (world.run / "best.safetensors").read_bytes() == before


def test_a_folder_that_is_no_run_is_never_replaced(recipe, dataset, tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(BadCheckpoint, match="no training run"):
        train(recipe, dataset, tmp_path, fresh=True)
    assert (tmp_path / "precious").read_text() == "data"


def test_early_stopping(recipe, dataset, tmp_path, monkeypatch):
    curve = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(ranking, "valid_ndcg", lambda *_: next(curve))
    run = train(changed(recipe, epochs=4, patience=2), dataset, tmp_path / "run")
    assert [point["valid_ndcg10"] for point in run.facts["curve"]] == [0.2, 0.5, 0.4, 0.3]
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1] == {"phase": "ranking", "epoch": 1}


def test_where_no_epoch_is_better_the_start_is_the_ranker(recipe, dataset, tmp_path, monkeypatch):
    """A linear order of what is known of each candidate, and no worse on validation than retrieval's."""
    curve = iter([0.6, 0.5, 0.4, 0.9])
    monkeypatch.setattr(ranking, "valid_ndcg", lambda *_: next(curve))
    run = train(changed(recipe, epochs=4, patience=2, start="linear"), dataset, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1] == {"phase": "ranking", "epoch": 0}
    examples = Examples.read(dataset, "valid", run.features)
    scores, linear = score(run.model(), examples), run.model().dense_head
    for at in range(0, len(examples), 50):
        dense = torch.from_numpy(examples.whole(np.array([at])).packed.dense[0])
        torch.testing.assert_close(torch.from_numpy(scores[at]), linear(dense).mean(-1), atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    tried = run.facts["start"]["orders"]
    assert valid_ndcg(run.model(), examples) == pytest.approx(max(tried.values()), abs=1e-6)
    assert max(tried.values()) >= tried["retrieval_rank"]
    assert tried["retrieval_rank"] == pytest.approx(retrieval_ndcg(examples), abs=1e-6)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_epoch(recipe, dataset, tmp_path, monkeypatch):
    plain, calls = listwise_softmax, iter(range(10**6))
    teaching = (Examples.read(dataset, "train", fitted(recipe, dataset, tmp_path)).labels > 0).any(1).sum()
    steps = -(-int(teaching) // recipe.training.batch_size)
    broken = lambda *a: plain(*a) * (float("nan") if next(calls) >= steps else 1.0)  # noqa: E731
    monkeypatch.setitem(losses.RANKING_LOSSES, "listwise", broken)
    with pytest.raises(TrirankBuildError, match=r"ranking: the loss is nan at epoch 2, batch 1, learning rate 0.001\d"):
        train(recipe, dataset, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "ranking.safetensors")[1] == {"phase": "ranking", "epoch": 1}


class TestPositionsOfFeedback:
    @pytest.fixture
    def examples(self, world, dataset):
        found = Examples.read(dataset, "train", world_features(world))
        found.positions[:] = np.arange(found.rows.shape[1]) + 1
        return found

    def batch(self, recipe, dataset, examples, **how):
        """A batch, and the positions in it."""
        settings = changed(recipe, candidates=8, item_dropout=0.0, position_bias=1.0, **how).training
        phase = ranking.Ranking(nn.Linear(1, 1), settings, dataset, examples, examples)
        drawn, _ = phase.draw(np.arange(20), np.random.default_rng(5))
        return phase, phase.batch(np.arange(20), np.random.default_rng(5)), drawn

    def test_the_loss_is_told_of_them_as_offsets(self, recipe, dataset, examples):
        _, tensors, drawn = self.batch(recipe, dataset, examples)
        assert drawn.positions.max() > 8
        assert torch.equal(tensors["offsets"], torch.from_numpy(log_propensities(drawn.positions, 1.0)))
        assert "label_weights" not in tensors

    def test_or_as_weights(self, recipe, dataset, examples):
        _, tensors, drawn = self.batch(recipe, dataset, examples, position_correction="weights")
        assert torch.equal(tensors["label_weights"], torch.from_numpy(propensity_weights(drawn.positions, 1.0)))
        assert "offsets" not in tensors

    def test_beside_the_correction_of_drawn_negatives(self, recipe, dataset, examples):
        phase, tensors, drawn = self.batch(
            recipe, dataset, examples, log_q=True, random_negatives=4, negatives="popularity", without_scores=1.0
        )
        own = tensors["offsets"].numpy()
        sampler = phase._sampler
        listed, others = drawn.positions[:, : drawn.listed], drawn.rows[:, drawn.listed :]
        assert others.shape[1] == 4
        assert own[:, : drawn.listed] == pytest.approx(log_propensities(listed, 1.0))
        # Drawn items stood nowhere: they are seen as the request's choices were, on average.
        chosen = np.ma.masked_array(log_propensities(listed, 1.0), drawn.labels[:, : drawn.listed] == 0).mean(1).data
        even = -(sampler.log_q(others, 1) + np.log(sampler.items))
        assert own[:, drawn.listed :] == pytest.approx(even + chosen[:, None], rel=1e-4, abs=1e-4)

    def test_they_change_the_loss(self, recipe, dataset, examples):
        phase, tensors, _ = self.batch(recipe, dataset, examples)
        scores = torch.zeros(*tensors["labels"].shape, len(phase.step.thresholds))
        plain = phase.step.judge(scores, tensors["labels"], tensors["valid"])
        assert phase.step.judge(scores, tensors["labels"], tensors["valid"], tensors["offsets"]) > plain

    def test_fine_tuning_after_compression_is_told_as_well(self, recipe, dataset, examples, trained):
        class Requests:
            def get(self):
                return examples, examples

        biased, model, features = changed(recipe, position_bias=1.0), trained.model(), trained.features
        phase = Finetuning(model, features, model, features, Requests(), biased, dataset, FineTuning())
        tensors = phase.batch(np.arange(20), np.random.default_rng(5))
        assert (tensors["offsets"] < 0).any()
        loss = phase.step(**tensors)
        del tensors["offsets"]
        assert loss != phase.step(**tensors)


def fitted(recipe, dataset, folder):
    (folder / "features").mkdir()
    return fit_features(dataset, recipe.features, folder / "features")


def test_an_unfinished_run_is_told(tmp_path):
    from trirank_build.training.run import TrainedRun

    with pytest.raises(BadCheckpoint, match="no finished training run"):
        TrainedRun.load(tmp_path)


def test_histories_end_before_their_request(dataset, trained):
    index = HistoryIndex(dataset.events, trained.features)
    requests = dataset.split("test").filter(dataset.split("test")["user_id"] >= 0)
    rows, behaviours, times = index.before(requests["user_id"].to_numpy(), requests["timestamp"].to_numpy(), 8)
    there = rows >= 0
    assert there.any()
    assert (times[there] < np.broadcast_to(requests["timestamp"].to_numpy()[:, None], there.shape)[there]).all()
    assert (behaviours[there] > 0).all()
    assert (np.diff(there.astype(int), axis=1) >= 0).all()  # padding in front


def test_the_history_is_the_users_newest_events(dataset, trained):
    moment = int(dataset.events["timestamp"].max()) + 1
    index = HistoryIndex(dataset.events, trained.features)
    user = int(dataset.events["user_id"].mode()[0])
    rows, _, times = index.before(np.array([user]), np.array([moment]), 5)
    own = dataset.events.filter(dataset.events["user_id"] == user).sort("timestamp", maintain_order=True).tail(5)
    assert times[0].tolist() == own["timestamp"].to_list()
    assert trained.features.catalogue.item_ids(rows[0]).tolist() == own["item_id"].to_list()


def test_unknown_users_have_none(dataset, trained):
    index = HistoryIndex(dataset.events, trained.features)
    rows, _, _ = index.before(np.array([-1, 10**9]), np.array([10**10, 10**10]), 4)
    assert (rows == -1).all()


def test_sampling_keeps_what_was_chosen(dataset, trained, rng):
    examples = Examples.read(dataset, "train", trained.features)
    which = np.arange(min(64, len(examples)))
    batch = examples.sample(which, rng, 12, None, with_scores=True)
    assert batch.labels.shape[1] == 12
    whole = examples.whole(which)
    few = (whole.labels > 0).sum(1) <= 12
    assert ((batch.labels > 0).sum(1) == (whole.labels > 0).sum(1))[few].all()


def test_random_negatives_come_without_scores_and_never_repeat_a_choice(dataset, trained, rng):
    from trirank_backend.features import DENSE

    examples = Examples.read(dataset, "train", trained.features)
    sampler = NegativeSampler("uniform", np.ones(len(trained.features.catalogue), int), 20)
    batch = examples.sample(np.arange(32), rng, 12, sampler, with_scores=False)
    assert batch.listed == 12
    assert batch.labels.shape[1] == 32
    assert not batch.packed.dense[..., DENSE.index("has_retrieval_score")].any()
    assert not batch.labels[:, 12:].any()
