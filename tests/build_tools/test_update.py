"""Yesterday's ranker goes on with a day's events: what it knew it knows, and new items start from their content."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData, BadRecipe
from trirank_build.features.examples import Examples
from trirank_build.features.sequences import Sequences
from trirank_build.features.vocabulary import Vocabulary
from trirank_build.models.family import make_ranker
from trirank_build.preparation.splitting import with_split
from trirank_build.training.growing import carried, grown
from trirank_build.training.trainer import train


@pytest.fixture(scope="module")
def days(world, tmp_path_factory):
    """The small world, until one time and until a later one; what came in between has new items and brands."""
    folder, world = tmp_path_factory.mktemp("days"), Dataset.load(world.data)
    requests = world.requests.collect().drop("split")
    times = requests["timestamp"].sort()
    cuts = [int(times[int(share * len(times))]) for share in (0.5, 0.6, 0.75, 0.85)]

    def until(last, valid_from, test_from, name):
        found = [with_split(frame.filter(pl.col("timestamp") < last), valid_from, test_from)
                 for frame in (world.events.drop("split"), requests)]  # fmt: skip
        counts = {"items": world.items.height, "events": found[0].height, "requests": found[1].height}
        data = Dataset(world.items, found[0], found[1].lazy(), replace(world.description, counts=counts, source=name))
        return Dataset.load(data.save(folder / name))

    return until(cuts[2], cuts[0], cuts[1], "yesterday"), until(int(times[-1]) + 1, cuts[2], cuts[3], "today"), folder


@pytest.fixture(scope="module", params=["plain", "low_rank"])
def updated(request, days, recipe):
    """Yesterday's run and its update, the second with no training, so that it shows where it begins."""
    yesterday, today, folder = days
    own = recipe.changed({"model.embedding": request.param, "model.embedding_rank": 4, "training.epochs": 2})
    old = train(own, yesterday, folder / f"old_{request.param}")
    changed = own.changed({"training.learning_rate": 1e-12, "training.epochs": 1, "training.weight_decay": 0.0})
    return old, train(changed, today, folder / f"new_{request.param}", update=old.directory), own


def test_there_is_something_new(updated):
    old, new, _ = updated
    assert new.features.spec.tables["item"][1] > old.features.spec.tables["item"][1]
    assert new.facts["trained_until"] > old.facts["trained_until"]
    assert new.facts["update_of"] == old.facts["dataset"]["digest"]


def test_known_values_keep_their_rows(updated):
    """Every row that is carried over, in both directions, by what it stands for."""
    old, new, _ = updated
    words, newer = (Vocabulary.load(run.directory / "features") for run in (old, new))
    with torch.no_grad():
        before, after = (run.model().embedding(torch.arange(run.features.spec.vocabulary_size)) for run in (old, new))
    for name in ("item", "brand", "category", "attribute"):
        (first, _), (second, _) = old.features.spec.tables[name], new.features.spec.tables[name]
        theirs, own = getattr(words, name), getattr(newer, name)
        assert set(theirs.tolist()) <= set(own.tolist())
        for place, value in enumerate(theirs, 1):
            at = np.searchsorted(own, value) + 1
            torch.testing.assert_close(after[second + at], before[first + place], atol=1e-6, rtol=1e-5)
    for name in ("behaviour", "time_gap", "price", "token"):
        (first, size), (second, _) = old.features.spec.tables[name], new.features.spec.tables[name]
        torch.testing.assert_close(after[second + 1 : second + size], before[first + 1 : first + size],
                                   atol=1e-6, rtol=1e-5)  # fmt: skip


def test_it_ranks_as_before_what_it_knew(updated, days):
    """Of requests whose items and users' items were known, but for popularity, which is counted anew."""
    old, new, _ = updated
    _, today, _ = days
    words = Vocabulary.load(old.directory / "features")
    examples = Examples.read(today, "test", new.features)
    theirs = Examples.read(today, "test", old.features)  # the catalogue is the same one
    which = np.arange(len(examples))
    batch, before = examples.whole(which), theirs.whole(which)
    packed, past = batch.packed.tensors(), before.packed.tensors()
    for tensors in (packed, past):
        tensors["dense"][:] = 0

    def known(tensors):
        return {name: torch.from_numpy(array) for name, array in tensors.items()}

    with torch.inference_mode():
        now, then = new.model()(**known(packed)).mean(-1).numpy(), old.model()(**known(past)).mean(-1).numpy()
    ids = new.features.catalogue.ids
    met = np.isin(ids, words.item)
    history = examples.histories(which, new.features.spec.history_length)
    all_known = np.where(history >= 0, met[np.maximum(history, 0)], True).all(1)
    assert all_known.sum() > 20
    there = batch.valid & met[np.maximum(batch.rows, 0)] & all_known[:, None]
    assert there.sum() > 200
    np.testing.assert_allclose(now[there], then[there], atol=1e-4)


def test_new_items_start_nearer_to_what_they_become(days, recipe):
    """Hidden from the vocabulary, known items get rows from their content: nearer to their own than chance, or nothing,
    where a row is about what the content says."""
    yesterday, _, folder = days
    own = recipe.changed({"training.epochs": 1})
    old = train(own, yesterday, folder / "content")
    words, spec, model = Vocabulary.load(old.directory / "features"), old.features.spec, old.model()
    catalogue = old.features.catalogue
    with torch.no_grad():  # a world in which it is so
        fields = torch.from_numpy(catalogue.fields[:-1].copy())
        codes = fields[:, 0].long()
        fields[:, 0] = 0
        content = model.embedding(fields).sum(-2)
        mapping = torch.randn(content.shape[1], content.shape[1], generator=torch.Generator().manual_seed(0))
        model.embedding.weight[codes[codes > 0]] = (content @ mapping)[codes > 0]
        truth = model.embedding.weight.clone()
    hidden = words.item[::3]
    fewer = replace(words, item=np.setdiff1d(words.item, hidden))
    size = len(fewer.item) + 1
    moved = spec.tables["item"][1] - size
    tables = {n: (f, size) if n == "item" else (f - moved, s) for n, (f, s) in spec.tables.items()}
    small = old.features.changed(tables=tables)
    first = make_ranker(small.spec, own.model)
    source = carried(spec, words, small.spec, fewer)
    with torch.no_grad():
        first.embedding.weight.copy_(model.embedding.weight[torch.from_numpy(np.maximum(source, 0))])
    found = grown(first, small, fewer, make_ranker(spec, own.model), old.features, words)
    at = torch.from_numpy(np.searchsorted(words.item, hidden) + 1)
    error = (found.embedding.weight[at] - truth[at]).norm(dim=1).mean()
    assert error < 0.5 * truth[at].norm(dim=1).mean()


def test_it_learns_from_what_is_new_alone(updated, days):
    old, _, _ = updated
    _, today, _ = days
    since = old.facts["trained_until"] + 1
    every, fresh = (Examples.read(today, "train", old.features, since=each) for each in (None, since))
    assert 0 < len(fresh) < len(every)
    assert fresh.times.min() >= since
    whole, windows = (Sequences(today, old.features, each) for each in (None, since))
    assert 0 < len(windows) < len(whole)


def test_an_update_is_better_than_none(days, recipe):
    """With training, on the very days that it had not seen."""
    yesterday, today, folder = days
    old = train(recipe, yesterday, folder / "before")
    new = train(recipe, today, folder / "after", update=old.directory)
    start, *rest = [point["valid_ndcg10"] for point in new.facts["curve"]]
    assert max(rest) > start


def test_what_is_no_update(days, updated, tmp_path):
    old, _, own = updated
    yesterday, today, _ = days
    with pytest.raises(BadData, match="the dataset has no train requests since .* add a newer log"):
        train(own, yesterday, tmp_path / "none", update=old.directory)
    with pytest.raises(BadRecipe, match=r"\[model\] differs from that of"):
        train(own.changed({"model.dim": 32}), today, tmp_path / "other", update=old.directory)
    with pytest.raises(BadRecipe, match=r"\[features\] differs"):
        train(own.changed({"features.history_length": 4}), today, tmp_path / "other", update=old.directory)


def test_an_update_is_not_judged_by_what_it_knows(days, updated, recipe, tmp_path):
    old, _, own = updated
    _, today, _ = days
    moved = today.events.with_columns(split=pl.when(pl.col("timestamp") > old.facts["trained_until"] - 1000)
                                      .then(pl.lit("valid")).otherwise(pl.lit("train")))  # fmt: skip
    requests = today.requests.with_columns(split=pl.when(pl.col("timestamp") > old.facts["trained_until"] - 1000)
                                           .then(pl.lit("valid")).otherwise(pl.lit("train")))  # fmt: skip
    early = Dataset(today.items, moved, requests, today.description)
    with pytest.raises(BadData, match="it would be judged by what it knows"):
        train(own, early, tmp_path / "early", update=old.directory)
    held = own.changed({"training.requests": "held_out", "pretraining.objective": "next_item"})
    with pytest.raises(BadRecipe, match='an update goes with training.requests = "logged"'):
        train(held, today, tmp_path / "held", update=old.directory)


def test_both_phases_are_told_since_when(days, recipe, tmp_path, monkeypatch):
    yesterday, today, _ = days
    own = recipe.changed({"pretraining.objective": "next_item", "pretraining.epochs": 1, "training.epochs": 1})
    old = train(own, yesterday, tmp_path / "old")
    seen = {}
    for name, function in (("windows", Sequences.__init__), ("requests", Examples._fill)):

        def spy(self, *given, _name=name, _function=function):
            if _name == "windows":
                seen.setdefault(_name, given[2])
            else:
                seen.setdefault(_name, []).append(int(given[1]["timestamp"].min()))
            return _function(self, *given)

        monkeypatch.setattr(Sequences if name == "windows" else Examples, function.__name__, spy)
    train(own, today, tmp_path / "new", update=old.directory)
    since = old.facts["trained_until"] + 1
    assert seen["windows"] == since
    assert min(seen["requests"]) >= since


def test_rows_that_are_shared_by_place_cannot_grow(days, recipe):
    yesterday, today, folder = days
    own = recipe.changed({"model.embedding": "quotient_remainder", "model.embedding_rows": 16, "training.epochs": 1})
    old = train(own, yesterday, folder / "shared")
    with pytest.raises(BadRecipe, match="shares rows by place, and new items move the places"):
        train(own, today, folder / "shared_new", update=old.directory)


def test_no_new_item_is_no_matter(updated):
    old, _, own = updated
    words = Vocabulary.load(old.directory / "features")
    again = grown(old.model(), old.features, words, make_ranker(old.features.spec, own.model), old.features, words)
    used = torch.from_numpy(np.flatnonzero(carried(old.features.spec, words, old.features.spec, words) >= 0))
    assert len(used) > 0.95 * old.features.spec.vocabulary_size  # tables have a row to spare between them
    assert torch.equal(again.embedding(used), old.model().embedding(used))
    for name, tensor in old.model().state_dict().items():
        if not name.startswith("embedding"):
            assert torch.equal(again.state_dict()[name], tensor), name
