"""The catalogue's look-ups and its files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from trirank_backend.catalogue import Catalogue
from trirank_backend.errors import InvalidRelease


@pytest.fixture(scope="module")
def catalogue(trained):
    return trained.features.catalogue


def test_known_ids_have_rows_and_come_back(catalogue):
    rows = catalogue.rows(catalogue.ids)
    assert rows.tolist() == list(range(len(catalogue)))
    assert catalogue.item_ids(rows).tolist() == catalogue.ids.tolist()


@pytest.mark.parametrize("unknown", [-1, 0, 10**15, -(2**63), 2**63 - 1])
def test_unknown_ids_have_none(catalogue, unknown):
    assert catalogue.rows(np.array([[unknown]])).tolist() == [[-1]]
    assert catalogue.item_ids(np.array([-1])).tolist() == [-1]


def test_no_item_reads_zeros(catalogue):
    for name in ("fields", "dense", "created_at", "signals", "titles", "trigrams"):
        assert not getattr(catalogue, name)[-1].any(), name
    assert catalogue.products[-1] == -1


def test_columns_are_mapped_not_read(catalogue):
    assert isinstance(catalogue.fields.base, np.memmap)


def test_a_missing_column_is_named(catalogue, tmp_path):
    catalogue.save(tmp_path)
    (tmp_path / "products.npy").unlink()
    with pytest.raises(InvalidRelease, match=r"products\.npy cannot be read"):
        Catalogue.load(tmp_path)


def test_a_short_column_is_named(catalogue, tmp_path):
    replace(catalogue, dense=catalogue.dense[:-3]).save(tmp_path)
    with pytest.raises(InvalidRelease, match=r"dense has \d+ rows"):
        Catalogue.load(tmp_path)
