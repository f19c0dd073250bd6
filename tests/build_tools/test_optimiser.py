"""Steps that touch the rows of a batch: the same as AdamW's where there is a gradient, and none elsewhere."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadRecipe
from trirank_build.models.checkpoint import load_checkpoint
from trirank_build.models.embeddings import make_embedding
from trirank_build.training import ranking
from trirank_build.training.optimiser import Optimiser
from trirank_build.training.trainer import train

IDS = torch.tensor([[3, 5, 5], [7, 3, 0]])


class Model(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 4, padding_idx=0, sparse=sparse)
        self.head = nn.Linear(4, 1)

    def forward(self):
        return (self.head(self.table(IDS)) ** 2).sum() + 3 * self.table(IDS[:1]).square().sum()


def steps(sparse, count, most=1.0, decay=0.0):
    model = Model(sparse)
    optimiser = Optimiser(model, 0.01, decay)
    for _ in range(count):
        model().backward()
        optimiser.step(0.01, most)
    return model, optimiser


@pytest.mark.parametrize("most", [0.3, 1.0, 100.0])
def test_rows_move_as_they_would_with_all_others(most):
    """Every step has the same rows, so that moments of the others stay zero and AdamW moves them by nothing."""
    (rows, _), (whole, _) = steps(True, 5, most), steps(False, 5, most)
    torch.testing.assert_close(rows.table.weight, whole.table.weight, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(rows.head.weight, whole.head.weight, atol=2e-6, rtol=1e-4)
    moved = (rows.table.weight != Model(True).table.weight).any(1)
    assert moved.nonzero().ravel().tolist() == [3, 5, 7]


def test_decay_does_not_touch_other_rows():
    assert ((steps(True, 3, decay=0.5)[0].table.weight != Model(True).table.weight).any(1)).sum() == 3
    assert ((steps(False, 3, decay=0.5)[0].table.weight != Model(False).table.weight).any(1)).sum() == 49


@pytest.mark.parametrize("sparse", [True, False])
def test_it_goes_on_from_its_state(sparse):
    model, optimiser = steps(sparse, 4)
    again = copy.deepcopy(model)
    other = Optimiser(again, 0.5, 0.0)
    other.load({name: value.clone() for name, value in optimiser.state().items()})
    for each, its in ((model, optimiser), (again, other)):
        each().backward()
        its.step(0.01, 1.0)
    assert torch.equal(model.table.weight, again.table.weight)
    assert torch.equal(model.head.weight, again.head.weight)


@pytest.mark.parametrize("kind", ["plain", "low_rank"])
def test_a_step_takes_as_long_with_many_rows(recipe, kind, trained):
    """A hundred times the rows: what a step costs does not follow (the other optimiser's would, a hundredfold)."""
    model = recipe.model.model_copy(update={"embedding_updates": "rows", "embedding": kind})
    seconds = {}
    for items in (20_000, 2_000_000):
        tables = dict(trained.features.spec.tables)
        grown = items - tables["item"][1]
        tables = {n: (f, items) if n == "item" else (f + grown, s) for n, (f, s) in tables.items()}
        spec = trained.features.changed(tables=tables).spec
        table = make_embedding(spec, model)
        optimiser = Optimiser(table, 0.01, 0.01)
        best = float("inf")
        for _ in range(12):
            ids = torch.randint(1, items, (64, 32))
            begun = time.perf_counter()
            table(ids).square().sum().backward()
            optimiser.step(0.01, 1.0)
            best = min(best, time.perf_counter() - begun)
        seconds[items] = best
    assert seconds[2_000_000] < 10 * seconds[20_000], seconds


def test_a_killed_run_goes_on_with_the_moments_of_its_rows(recipe, world, tmp_path, monkeypatch):
    """With retrieval's candidates alone, from a run that nothing broke off."""
    dataset = Dataset.load(world.data)
    rows = recipe.changed({"model.embedding_updates": "rows", "training.epochs": 2})
    whole = train(rows, dataset, tmp_path / "whole")
    assert whole.facts["valid_ndcg10"] > whole.facts["valid_retrieval_ndcg10"]
    plain, calls = ranking.Ranking.batch, iter(range(10**6))

    def cut(self, which, rng):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, which, rng)

    often = rows.changed({"training.checkpoint_minutes": 1e-9})
    monkeypatch.setattr(ranking.Ranking, "batch", cut)
    with pytest.raises(KeyboardInterrupt):
        train(often, dataset, tmp_path / "cut")
    monkeypatch.setattr(ranking.Ranking, "batch", plain)
    train(often, dataset, tmp_path / "cut")
    one, two = (load_checkpoint(tmp_path / name / "best.safetensors")[0] for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_all_items_as_negatives_move_all_rows(recipe):
    with pytest.raises(BadRecipe, match='goes with sampled negatives, such as pretraining.negatives = "uniform"'):
        recipe.changed({"model.embedding_updates": "rows", "pretraining.objective": "next_item"})
