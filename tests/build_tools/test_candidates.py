"""An index in a release finds what the ranker's own states like best."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
import torch
from trirank.contract import PAD_ITEM_ID, Behaviour
from trirank_backend.candidates import FACTS, INDEX, CandidateSource
from trirank_backend.errors import InvalidRelease
from trirank_build.cli import app
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadModel
from trirank_build.models.family import make_ranker
from trirank_build.repository.assemble import assemble
from trirank_build.retrieval import index
from trirank_build.retrieval.index import build_index, choose_probes, exact_top, fit, recall_of
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def release(world, trained, tmp_path_factory):
    made = assemble(
        trained, Dataset.load(world.data), world.onnx, tmp_path_factory.mktemp("indexed"), index=True,
        allow_failing_gate=True,
    )  # fmt: skip
    facts = json.loads((made / "manifest.json").read_text())["index"]
    assert (facts["kind"], facts["recall_at_100"], facts["items"]) == ("Flat", 1.0, len(trained.features.catalogue))
    return made


@pytest.fixture(scope="module")
def source(release):
    return CandidateSource(release)


def affinities(trained, rows, behaviours):
    """[M] by the ranker itself, from a history as training packs it."""
    model, features = trained.model(), trained.features
    history = features.packer.history(rows[None].astype(np.int32), behaviours[None].astype(np.int32))
    items = features.packer.items(np.arange(len(features.catalogue), dtype=np.int32))
    with torch.inference_mode():
        state = model.next_state(torch.from_numpy(history))
        return model.logits(state, model.item_vectors(torch.from_numpy(items)))[0].numpy()


def test_it_finds_what_the_ranker_likes(source, trained, rng):
    length, ids = trained.features.spec.history_length, trained.features.catalogue.ids
    rows = np.sort(rng.integers(0, len(ids), length))
    kinds = rng.integers(1, 4, length)
    liked = affinities(trained, rows, kinds)
    found = source.find([ids[rows]], 25, [kinds])
    np.testing.assert_allclose(found.scores[0], -np.sort(-liked)[:25], atol=1e-3)
    assert len(set(found.item_ids[0].tolist()) & set(ids[np.argsort(-liked)[:25]].tolist())) >= 24


def test_users_are_found_for_together_and_alone(source, trained, rng):
    ids = trained.features.catalogue.ids
    users = [rng.choice(ids, size) for size in (1, 3, 40, 0)]
    together = source.find(users, 12)
    for at, one in enumerate(users):
        alone = source.find([one], 12)
        np.testing.assert_allclose(alone.scores[0], together.scores[at], atol=1e-3)


def test_what_is_not_said_is_a_click(source, trained):
    ids = trained.features.catalogue.ids[5:9]
    said, unsaid = source.find([ids], 9, [np.full(4, Behaviour.CLICK.value)]), source.find([ids], 9)
    np.testing.assert_array_equal(said.scores, unsaid.scores)
    assert (source.find([ids], 9, [np.full(4, Behaviour.VIEW.value)]).scores != unsaid.scores).any()


def test_cells_in_a_release_and_threads_that_search(world, trained, tmp_path, monkeypatch, source):
    monkeypatch.setattr(index, "EXACT", 100)
    made = assemble(trained, Dataset.load(world.data), world.onnx, tmp_path, index=True, allow_failing_gate=True)
    cells = CandidateSource(made)
    assert cells.facts["kind"] == "IVF64,SQ8"
    users = [trained.features.catalogue.ids[at : at + 6] for at in range(0, 60, 2)]
    alone = [cells.find([one], 10, exclude_seen=True) for one in users]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: cells.find([one], 10, exclude_seen=True), users))
    for one, two, user in zip(alone, together, users, strict=True):
        np.testing.assert_array_equal(one.item_ids, two.item_ids)
        assert not set(one.item_ids[0].tolist()) & set(user.tolist())
    best = [set(source.find([one], 10).item_ids[0].tolist()) for one in users]
    found = [set(cells.find([one], 10).item_ids[0].tolist()) for one in users]
    assert np.mean([len(a & b) / 10 for a, b in zip(best, found, strict=True)]) > 0.85


def test_without_what_was_seen_and_what_is_not_there(source, trained):
    ids = trained.features.catalogue.ids
    seen = source.find([ids[:3]], 5).item_ids[0]
    found = source.find([np.append(seen, 10**15)], 20, exclude_seen=True)
    assert not set(found.item_ids[0].tolist()) & set(seen.tolist())
    assert np.isfinite(found.scores).all()
    every = source.find([seen], len(ids), exclude_seen=True)
    assert (every.item_ids[0] == PAD_ITEM_ID).sum() == np.isnan(every.scores[0]).sum() == len(set(seen.tolist()))


def test_what_cannot_be_asked(source):
    with pytest.raises(ValueError, match="k = 0; it is 1 to 312, the number of items"):
        source.find([np.array([1])], 0)
    with pytest.raises(ValueError, match="2 histories and 1 lists of behaviours"):
        source.find([np.array([1])] * 2, 5, [np.array([1])])
    with pytest.raises(ValueError, match="user 0 has a behaviour 99; they are 1 to 5"):
        source.find([np.array([1])], 5, [np.array([99])])
    with pytest.raises(ValueError, match="user 0 has 1 items and 2 behaviours"):
        source.find([np.array([1])], 5, [np.array([1, 2])])


def test_releases_without_one_or_with_a_damaged_one(release, world, tmp_path):
    with pytest.raises(InvalidRelease, match="has no index of its items; assemble it again with --index"):
        CandidateSource(world.release)
    import shutil

    damaged = shutil.copytree(release, tmp_path / "damaged")
    (damaged / "retrieval" / INDEX).write_bytes(b"IxFI")
    with pytest.raises(InvalidRelease, match="the index of .* cannot be read"):
        CandidateSource(damaged)
    (damaged / "retrieval" / FACTS).write_text("{")
    with pytest.raises(InvalidRelease, match="cannot be read"):
        CandidateSource(damaged)


def test_the_command(release, trained, world):
    first = str(trained.features.catalogue.ids[0])
    run = CliRunner().invoke(app, ["release", "candidates", str(release), "--item", first, "--count", "7", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert len(found) == 7
    titles = dict(pl.read_parquet(release / "items.parquet").select("key", "title").iter_rows())
    assert all(titles[line["key"]] == line["title"] for line in found)
    for given, told in (
        (["--item", "chair"], "--item chair is no number"), (["--item", "²"], "--item ² is no number"),
        (["--item", "9" * 20], "is no number below"), (["--item", "1", "--count", "313"], "--count 313 is more"),
    ):  # fmt: skip
        wrong = CliRunner().invoke(app, ["release", "candidates", str(release), *given])
        assert told in str(wrong.exception)


class TestCells:
    @pytest.fixture(scope="class")
    def found(self):
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(60, 16))
        items = (centres[rng.integers(0, 60, 20_000)] + 0.4 * rng.normal(size=(20_000, 16))).astype(np.float32)
        states = (centres[rng.integers(0, 60, 200)] + 0.4 * rng.normal(size=(200, 16))).astype(np.float32)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(index, "EXACT", 1_000)
            fitted, kind, cells = fit(items)
        assert (kind, cells) == ("IVF512,SQ8", 512)
        return fitted, cells, items, states

    def test_as_many_are_searched_as_recall_needs(self, found):
        fitted, cells, items, states = found
        truth = exact_top(items, states, 100)
        probes, recall = choose_probes(fitted, cells, states, truth)
        assert 1 < probes < cells / 2
        assert recall > 0.93
        assert recall_of(fitted, max(1, probes // 8), states, truth) < 0.95

    def test_the_truth_is_the_truth(self, found):
        _, _, items, states = found
        exact = np.argsort(-(states @ items.T), axis=1)[:, :100]
        assert [set(line) for line in exact_top(items, states, 100)] == [set(line) for line in exact]


def test_a_ranker_without_states(trained, world, tmp_path):
    bst = make_ranker(trained.features.spec, trained.recipe.model.model_copy(update={"architecture": "bst"}))
    with pytest.raises(BadModel, match="has no states, so no items are nearest to them; assemble without --index"):
        build_index(bst, trained.features, Dataset.load(world.data), tmp_path)
