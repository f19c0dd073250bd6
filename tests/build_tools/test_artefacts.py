"""Whole or not there at all."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import polars as pl
import pytest
import tomli_w
from trirank_build.artefacts import atomic_directory, atomic_file, combined_digest, tree_digests


def fail(path):
    path.write_text("half")
    raise RuntimeError("power cut")


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as scratch:
        fail(scratch)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "d"
    with atomic_directory(target) as scratch:
        (scratch / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(target) as scratch:
        fail(scratch / "a")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_is_replaced_whole(tmp_path):
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "d") as scratch:
            (scratch / text).write_text(text)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["two"]


def test_digests_name_content_and_place(tmp_path):
    (tmp_path / "a").write_text("1")
    one = combined_digest(tree_digests(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    assert combined_digest(tree_digests(tmp_path)) != one


@pytest.mark.parametrize(("what", "arguments"), [
    ("a dataset", ["data", "prepare", "{log}", "--out", "{out}"]),
    ("a run", ["train", "{recipe}", "--data", "{data}", "--out", "{out}"]),
    ("a graph", ["export", "--run", "{run}", "--out", "{out}/ranker.onnx"]),
])  # fmt: skip
def test_a_full_disk_is_told_and_leaves_nothing(what, arguments, world, recipe, tmp_path):
    """Files of a few kilobytes at most, by the system's own limit: a table too large for the disk is no other case."""
    frame = pl.read_parquet(world.data / "events.parquet")
    words = pl.col("behaviour").replace_strict([1, 2, 3, 4], ["click", "fav", "cart", "buy"], default="click")
    frame.select("user_id", "item_id", "timestamp", behavior=words).write_csv(tmp_path / "log.csv")
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe.model_dump(exclude_none=True)))
    places = {"log": tmp_path / "log.csv", "recipe": tmp_path / "recipe.toml", "data": world.data, "run": world.run,
              "out": tmp_path / "new" / "out"}  # fmt: skip
    command = [sys.executable, "-m", "trirank_build.cli", *(part.format(**places) for part in arguments)]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120, check=False,
                          env={**os.environ, "TRIRANK_CACHE": os.environ.get("TRIRANK_CACHE", "")})  # fmt: skip
    assert done.returncode == 1, done.stderr
    told = " ".join(done.stderr.split())
    assert "does not fit" in told, told
    assert "make room, or choose another --out" in told
    assert "Traceback" not in told
    left = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert left == []


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), atomic_file(tmp_path / "x"):
        raise PermissionError(13, "Permission denied")
