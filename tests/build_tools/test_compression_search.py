"""`trirank compress --search`: trains only what can meet the target, ends with a front and a recipe that runs."""

from __future__ import annotations

import csv

import pytest
from trirank_build.compression import search as searching
from trirank_build.compression.chain import compress
from trirank_build.compression.recipe import load_compression_recipe, parse_recipe
from trirank_build.compression.search import Target, search
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadRecipe

START = {"name": "start", "training": {"epochs": 0}, "steps": [{"kind": "prune", "ffn": 0.5}, {"kind": "fold"}]}


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


@pytest.fixture
def timed(monkeypatch):
    """A clock that goes by the graph's size, so that what is fast does not depend on the machine; and a graph that is
    as large as its weights, without the exporter's seconds. The command's test has the real ones."""
    measured = []

    def write(model, spec, path):
        path.write_bytes(bytes(4 * sum(parameter.numel() for parameter in model.parameters())))

    def fastest(path, spec, engines):
        measured.append(path)
        return engines[0], {engines[0]: path.stat().st_size / 1e5}

    monkeypatch.setattr(searching, "fastest_engine", fastest)
    monkeypatch.setattr(searching, "write_graph", write)
    return measured


def test_a_search_ends_with_a_front_and_a_recipe(trained, dataset, tmp_path, timed):
    found = search(parse_recipe(START), trained, dataset, tmp_path / "out", Target(min_ndcg_ratio=0.5), trials=4)
    assert len(timed) == len(found.tried) == 4
    assert found.tried[0].number == 0
    for one in found.front:
        faster = [other for other in found.tried if other.latency_ms < one.latency_ms]
        assert all(other.ndcg10 < one.ndcg10 for other in faster)
    assert found.chosen.ndcg_ratio >= 0.5
    best = load_compression_recipe(str(found.recipe))
    assert compress(best, trained, dataset, tmp_path / "again").report[-1]["valid_ndcg10"] == found.chosen.ndcg10
    rows = list(csv.DictReader((tmp_path / "out" / "front.csv").open()))
    assert [int(row["number"]) for row in rows if row["front"] == "True"] == [one.number for one in found.front]
    assert found.plot.read_text().startswith("<?xml")


def test_what_cannot_meet_the_target_is_not_trained(trained, dataset, tmp_path, timed, monkeypatch):
    compressed = []
    original = searching.compress
    monkeypatch.setattr(
        searching, "compress", lambda recipe, *a: (compressed.append(recipe.name), original(recipe, *a))[1]
    )
    with pytest.raises(BadRecipe, match=r"none of the 3 chains meets the target \(latency at most 0.001 ms\)"):
        search(parse_recipe(START), trained, dataset, tmp_path / "out", Target(latency_ms=0.001), trials=3)
    assert compressed == ["start"]
    assert len(timed) == 3


def test_a_stopped_search_goes_on(trained, dataset, tmp_path, timed):
    target, start = Target(size_mb=100.0), parse_recipe(START)
    search(start, trained, dataset, tmp_path / "out", target, trials=2)
    found = search(start, trained, dataset, tmp_path / "out", target, trials=3)
    assert len(timed) == 3
    assert [one.number for one in found.tried] == [0, 1, 2]
    other = parse_recipe(START | {"seed": 3})
    with pytest.raises(BadRecipe, match="the search of another recipe"):
        search(other, trained, dataset, tmp_path / "out", target, trials=3)


def test_a_search_needs_a_target(trained, dataset, tmp_path):
    with pytest.raises(BadRecipe, match="needs a target"):
        search(parse_recipe(START), trained, dataset, tmp_path / "out", Target())
    assert not (tmp_path / "out").exists()
