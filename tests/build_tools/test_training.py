"""Training learns, is deterministic, and goes on where it was stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint, TrirankBuildError
from trirank_build.evaluation.evaluate import evaluate
from trirank_build.features.examples import Examples, HistoryIndex
from trirank_build.models.checkpoint import load_checkpoint
from trirank_build.training import trainer
from trirank_build.training.losses import listwise_softmax
from trirank_build.training.trainer import train


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


def weights(folder):
    return load_checkpoint(folder / "best.safetensors")[0]


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_ranker_beats_what_it_must_beat(world, trained, dataset):
    found = evaluate(trained.model(), Examples.read(dataset, "test", trained.features), dataset)
    for other in ("retrieval", "random"):
        assert found.differences[other].low > 0, other
    ndcg = {name: row["NDCG@10"].value for name, row in found.table.items()}
    assert max(ndcg, key=ndcg.get) == "optimum"
    assert 0 <= found.accuracy.value <= 1


def test_the_same_seed_gives_the_same_weights(recipe, dataset, world, tmp_path):
    train(recipe, dataset, tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(world.run))


def test_the_run_keeps_its_recipe_with_every_default(recipe, trained):
    assert trained.recipe == recipe


def test_another_seed_gives_others(recipe, dataset, world, tmp_path):
    train(recipe.model_copy(update={"seed": 99}), dataset, tmp_path / "other")
    assert not same(weights(tmp_path / "other"), weights(world.run))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(recipe, dataset, world, tmp_path, monkeypatch):
    plain = trainer._Training._epoch

    def cut(self, epoch, done):
        if epoch == 1:
            raise KeyboardInterrupt
        return plain(self, epoch, done)

    monkeypatch.setattr(trainer._Training, "_epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, dataset, tmp_path / "run")
    assert (tmp_path / "run" / "last.safetensors").is_file()
    assert not (tmp_path / "run" / "run.json").is_file()
    monkeypatch.setattr(trainer._Training, "_epoch", plain)
    run = train(recipe, dataset, tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(world.run))
    assert len(run.facts["curve"]) == recipe.training.epochs


def test_a_finished_run_is_used_again(recipe, dataset, world, monkeypatch):
    monkeypatch.setattr(trainer._Training, "run", lambda self: pytest.fail("trained again"))
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
    curve = iter([0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(trainer, "valid_ndcg", lambda *_: next(curve))
    patient = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 4, "patience": 2})})
    run = train(patient, dataset, tmp_path / "run")
    assert [point["valid_ndcg10"] for point in run.facts["curve"]] == [0.5, 0.4, 0.3]
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1] == {"epoch": 1}


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_epoch(recipe, dataset, tmp_path, monkeypatch):
    plain = listwise_softmax
    calls = iter(range(10**6))
    steps = -(-dataset.split("train").height // recipe.training.batch_size)
    monkeypatch.setattr(
        trainer, "listwise_softmax", lambda *a: plain(*a) * (float("nan") if next(calls) >= steps else 1.0)
    )
    with pytest.raises(TrirankBuildError, match="the loss is nan at epoch 2, batch 1, learning rate"):
        train(recipe, dataset, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1] == {"epoch": 1}


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
    batch = examples.sample(which, rng, 12, 0, with_scores=True)
    assert batch.labels.shape[1] == 12
    whole = examples.whole(which)
    few = (whole.labels > 0).sum(1) <= 12
    assert ((batch.labels > 0).sum(1) == (whole.labels > 0).sum(1))[few].all()


def test_random_negatives_come_without_scores_and_never_repeat_a_choice(dataset, trained, rng):
    from trirank_backend.features import DENSE

    examples = Examples.read(dataset, "train", trained.features)
    batch = examples.sample(np.arange(32), rng, 12, 20, with_scores=False)
    assert batch.labels.shape[1] == 32
    assert not batch.packed.dense[..., DENSE.index("has_retrieval_score")].any()
    assert not batch.labels[:, 12:].any()


def test_the_loss_prefers_the_right_order():
    labels, valid = torch.tensor([[3.0, 0, 0]]), torch.ones(1, 3, dtype=torch.bool)
    right = listwise_softmax(torch.tensor([[[2.0], [0], [0]]]), labels, valid, (3.0,))
    wrong = listwise_softmax(torch.tensor([[[0.0], [2], [0]]]), labels, valid, (3.0,))
    assert right < wrong


def test_padding_takes_no_part_in_the_loss():
    scores, labels = torch.tensor([[[1.0], [0.5], [9.0]]]), torch.tensor([[1.0, 0, 0]])
    padded = listwise_softmax(scores, labels, torch.tensor([[True, True, False]]), (1.0,))
    alone = listwise_softmax(scores[:, :2], labels[:, :2], torch.ones(1, 2, dtype=torch.bool), (1.0,))
    assert torch.allclose(padded, alone)


def test_requests_without_success_teach_nothing():
    loss = listwise_softmax(torch.randn(2, 3, 1), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), (1.0,))
    assert loss == 0
