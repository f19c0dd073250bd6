"""Whole or not there at all."""

from __future__ import annotations

import pytest
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
