"""Made-up requests for a made-up catalogue: every kernel runs, and so is compiled or loaded before anybody waits for
it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from trirank.contract import PAD_ITEM_ID, Behaviour

from trirank_backend.attributes import Attributes
from trirank_backend.catalogue import Catalogue
from trirank_backend.features import FeatureSpec, Lines, Packer, even_starts
from trirank_backend.handover import HEADER, Handover
from trirank_backend.lookup_kernels import drop_repeats
from trirank_backend.policies import Items, Policy, Release
from trirank_backend.rerank import Rerank
from trirank_backend.stores.overlay import COUNTS, STATE, Overlay, write_overlay
from trirank_backend.text import query_trigrams, title_trigrams
from trirank_backend.words.lexicon import QueryWords

_TITLES = ["red shoe", "blue shoe", "green lamp"]
_TOKENS = np.array([[20, 21], [22, 21], [23, 24], [0, 0]], np.int32)
_NOW = 1_770_000_000
_WIDTH = 4
_EVERY_RULE = Policy.model_validate({"rules": [
    {"rule": "mix", "retrieval": 1.0, "freshness": 1.0, "margin": 1.0},
    {"rule": "filter", "max_price": 1e6},
    {"rule": "boost", "signals": ["NEW_ITEM"], "by": 1.0},
    {"rule": "explore"},
    {"rule": "deduplicate", "titles": 0.9},
    {"rule": "mmr"},
    {"rule": "cap", "field": "brand"},
    {"rule": "quota", "different": 2},
    {"rule": "pin", "item": 30, "position": 1},
    {"rule": "sponsored", "signals": ["NEW_ITEM"], "slots": [2]},
]})  # fmt: skip
_ANOTHER_ORDER = Policy.model_validate({"rules": [{"rule": "dpp"}]})


def rehearse() -> None:
    """Lines alone and in company: numba takes columns of one number for contiguous and compiles once for each kind."""
    catalogue = _catalogue()
    spec = FeatureSpec(
        history_length=2, query_length=2, item_fields=("item", "brand", "category", "price"),
        tables={"item": (0, 5), "behaviour": (30, 6), "time_gap": (37, 17)}, tasks=("click",),
    )  # fmt: skip
    packer = Packer(spec, catalogue, np.ones(60, np.float32))
    attributes = replace(Attributes.unknown(3), prices=np.ones(4, np.float32))
    release = Release(Items.of(catalogue, attributes), attributes, spec.tasks)
    with tempfile.TemporaryDirectory(prefix="trirank-rehearsal-") as folder:
        files = {}
        for name, kind in (("state", STATE), ("counts", COUNTS)):
            records = np.zeros(1, kind)
            records["id"] = 10
            write_overlay(Path(folder, name), records)
            files[name] = Overlay(Path(folder, name), kind)
        rerank = Rerank(release, {"every": _EVERY_RULE}, files["state"], files["counts"])
        for count in (1, 2):
            lines = _lines(catalogue, count)
            packed = packer.pack(lines)
            header = np.zeros(count, HEADER)
            header["top_k"], header["moment"], header["scored"] = 2, _NOW, 1
            header["min_price"], header["max_price"] = -np.inf, np.inf
            handover = Handover(
                header=header,
                rows=lines.rows.reshape(count, _WIDTH),
                signals=packed.signals.reshape(count, _WIDTH),
                scores=lines.scores.reshape(count, _WIDTH),
                unknown=np.zeros((count, 0), np.int64),
            )
            rerank(np.zeros((count, _WIDTH, 1), np.float32), handover)
        for policy in (Policy(), _ANOTHER_ORDER):
            Rerank(release, {"plain": policy})(np.zeros((count, _WIDTH, 1), np.float32), handover)


def _lines(catalogue: Catalogue, count: int) -> Lines:
    ids = np.array([10, 30, 30, PAD_ITEM_ID] * count, np.int64)
    starts, rows = even_starts(count, _WIDTH), catalogue.rows(ids)
    drop_repeats(ids, starts, PAD_ITEM_ID, rows, np.zeros((count, 2), np.int32))
    return Lines(
        starts=starts,
        rows=rows,
        scores=np.array([1, 3, 2, np.nan] * count, np.float32),
        query=_TOKENS[[0] * count],
        words=query_trigrams([_TITLES[0]] * count),
        timestamps=np.full(count, _NOW),
        anonymous=np.zeros(count, bool),
        history_rows=np.array([[-1, 0]] * count, np.int32),
        history_behaviours=np.full((count, 2), Behaviour.PURCHASE, np.int32),
        history_timestamps=np.full((count, 2), _NOW - 60),
        understood=QueryWords.none(count),
    )


def _catalogue() -> Catalogue:
    return Catalogue(
        ids=np.array([10, 20, 30]),
        fields=np.array([[1, 5, 7, 9], [2, 5, 7, 9], [3, 6, 8, 9], [0, 0, 0, 0]], np.int32),
        dense=np.zeros((4, 4), np.float32),
        products=np.array([0, 0, 1, -1], np.int32),
        created_at=np.array([_NOW - 60, 0, 0, 0]),
        signals=np.zeros(4, np.int32),
        titles=_TOKENS,
        trigrams=np.concatenate([title_trigrams(_TITLES), np.zeros((1, 64), np.uint8)]),
    )
