"""Features mean what their names say, whatever the batch and the padding around them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ReferencePacker
from trirank.contract import Behaviour, Signal
from trirank_backend.catalogue import Catalogue
from trirank_backend.errors import InvalidRelease
from trirank_backend.features import CONTEXT, DENSE, INPUTS, FeatureSpec, Lines, Packed, Packer, Transitions
from trirank_backend.features.kernels import fill
from trirank_backend.features.table import CONTEXT_TABLE, DENSE_TABLE, left_out
from trirank_backend.histories import UNKNOWN_TIME
from trirank_backend.text import query_trigrams, title_trigrams
from trirank_backend.words.lexicon import QueryWords

NOW = 1_770_000_000
D = {name: at for at, name in enumerate(DENSE)}
C = {name: at for at, name in enumerate(CONTEXT)}
# A joint vocabulary small enough to read: 1-4 items, 5-6 brands, 7-8 categories, 12-14 attributes, 20-29 tokens, …
SPEC = FeatureSpec(
    history_length=4,
    query_length=3,
    item_fields=("item", "brand", "category", "price", "attribute_0", "attribute_1"),
    tables={"item": (0, 5), "brand": (4, 3), "category": (6, 3), "price": (8, 3), "attribute": (11, 4),
            "token": (19, 11), "behaviour": (30, 6), "time_gap": (37, 17)},
    tasks=("click",),
)  # fmt: skip
TITLES = ["red shoe", "blue shoe", "green lamp", "odd thing"]
CATALOGUE = Catalogue(
    ids=np.array([10, 20, 30, 40]),
    fields=np.array([[1, 5, 7, 9, 12, 13], [2, 5, 7, 9, 12, 0], [3, 6, 8, 10, 14, 13], [0] * 6, [0] * 6], np.int32),
    dense=np.array([[1, 2, 0.5, 3], [0, 1, 0, 0], [-1, 0, -1, 1], [0] * 4, [0] * 4], np.float32),
    products=np.array([0, 0, 1, 2, -1], np.int32),
    created_at=np.array([NOW - 86_400, NOW - 100 * 86_400, 0, 0, 0]),
    signals=np.array([Signal.POPULAR, 0, Signal.UNAVAILABLE, 0, 0], np.int32),
    titles=np.array([[20, 21], [22, 21], [23, 24], [25, 26], [0, 0]], np.int32),
    trigrams=np.concatenate([title_trigrams(TITLES), np.zeros((1, 64), np.uint8)]),
)
TRANSITIONS = Transitions(
    starts=np.array([0, 2, 3, 3, 4, 4]),
    rows=np.array([1, 2, 0, 3], np.int32),
    weights=np.array([1, 2, 4, 8], np.float32),
)
"""Item 1 and item 2 came after item 0, item 0 after item 1, item 3 after itself."""
PACKER = Packer(SPEC, CATALOGUE, np.ones(SPEC.vocabulary_size, np.float32), TRANSITIONS)


def request(
    rows=(0, 1, 2, -1),
    scores=None,
    query=(),
    words="",
    history=(),
    behaviours=None,
    ages=None,
    anonymous=False,
):
    """One request; history is rows, oldest first."""
    length = SPEC.history_length
    past = np.full((1, length), -1, np.int32)
    kinds, times = np.zeros((1, length), np.int32), np.zeros((1, length), np.int64)
    if history:
        past[0, -len(history) :] = history
        kinds[0, -len(history) :] = behaviours or Behaviour.CLICK
        times[0, -len(history) :] = NOW - np.array(ages or [3600] * len(history))
    tokens = np.zeros((1, SPEC.query_length), np.int32)
    tokens[0, : len(query)] = query
    return Lines(
        starts=np.array([0, len(rows)]),
        rows=np.array(rows, np.int32),
        scores=np.array([np.nan] * len(rows) if scores is None else scores, np.float32),
        query=tokens,
        words=query_trigrams([words]),
        timestamps=np.array([NOW]),
        anonymous=np.array([anonymous]),
        history_rows=past,
        history_behaviours=kinds,
        history_timestamps=times,
        understood=QueryWords.none(1),
    )


def dense(name, **kinds):
    return PACKER.pack(request(**kinds)).dense[:, D[name]].tolist()


def signals(**kinds):
    return [Signal(int(bits)) for bits in PACKER.pack(request(**kinds)).signals]


def test_items_bring_their_fields_and_padding_brings_zeros():
    packed = PACKER.pack(request())
    assert packed.candidates.tolist() == [[1, 5, 7, 9, 12, 13], [2, 5, 7, 9, 12, 0], [3, 6, 8, 10, 14, 13], [0] * 6]
    assert not packed.dense[3].any()
    assert packed.signals[3] == 0


def test_static_numbers():
    assert dense("price") == [1, 0, -1, 0]
    assert dense("popularity") == [2, 1, 0, 0]


def test_without_retrieval_scores_their_features_are_zero():
    for name in ("has_retrieval_score", "retrieval_score", "retrieval_score_log", "retrieval_rank"):
        assert dense(name) == [0, 0, 0, 0]


def test_retrieval_scores_are_standardised_over_real_candidates():
    assert dense("retrieval_score", scores=[3, 2, 1, 0]) == pytest.approx([1.2247, 0, -1.2247, 0], abs=1e-3)
    assert dense("has_retrieval_score", scores=[3, 2, 1, 0]) == [1, 1, 1, 0]


def test_the_best_retrieval_score_has_rank_one():
    assert dense("retrieval_rank", scores=[1, 9, 5, 0]) == pytest.approx([1 / np.log2(4), 1, 1 / np.log2(3), 0])


def test_equal_retrieval_scores_are_finite():
    assert dense("retrieval_score", scores=[2, 2, 2, 0]) == [0, 0, 0, 0]


def test_huge_retrieval_scores_are_finite():
    packed = PACKER.pack(request(scores=[3e38, -3e38, 0, 0]))
    assert np.isfinite(packed.dense).all()


def test_what_the_history_says_of_each_candidate():
    assert dense("seen_item", history=[0, 0, 2]) == pytest.approx(np.log1p([2, 0, 1, 0]))
    assert dense("seen_product", history=[0, 0, 2]) == pytest.approx(np.log1p([2, 2, 1, 0]))
    assert dense("seen_brand", history=[0]) == pytest.approx(np.log1p([1, 1, 0, 0]))
    assert dense("seen_category", history=[2]) == pytest.approx(np.log1p([0, 0, 1, 0]))


def test_what_followed_the_history_counts_newer_events_more():
    assert dense("transition", history=[0]) == [0, 1, 2, 0]
    # of two events the newer one has 1 / 1.6 of the weight, the older one 0.6 / 1.6
    assert dense("transition", history=[1, 0]) == pytest.approx([4 * 0.375, 0.625, 2 * 0.625, 0])
    assert dense("transition", rows=(2, 1, 2, -1), history=[0]) == [2, 1, 2, 0]
    assert dense("transition") == [0, 0, 0, 0]


def test_attributes_are_compared_by_the_cosine():
    half = 1 / np.sqrt(2)
    assert dense("attribute_match", history=[0]) == pytest.approx([1, half, 0.5, 0])
    assert dense("attribute_match", history=[3]) == [0, 0, 0, 0]
    # 0.8 / 1.8 of the weight are the older event's
    assert dense("attribute_match", history=[1, 0]) == pytest.approx(
        [(0.8 * half + 1) / 1.8, (0.8 + half) / 1.8, 0.5 / 1.8, 0]
    )


@pytest.mark.parametrize(
    "broken",
    [{"starts": np.array([0, 2, 3, 3, 4])}, {"rows": np.array([1, 2, 0, 4], np.int32)},
     {"rows": np.array([1, 2, 0, -1], np.int32)}, {"starts": np.array([0, 3, 2, 3, 4, 4])},
     {"weights": np.ones(3, np.float32)}, {"weights": np.ones(4)}],
)  # fmt: skip
def test_a_table_of_followers_that_does_not_fit_is_refused(tmp_path, broken):
    TRANSITIONS.save(tmp_path)
    for found, kept in zip(Transitions.load(tmp_path, 4), TRANSITIONS, strict=True):
        np.testing.assert_array_equal(found, kept)
    TRANSITIONS._replace(**broken).save(tmp_path)
    with pytest.raises(InvalidRelease, match="transitions"):
        Transitions.load(tmp_path, 4)


def test_missing_brands_do_not_match_each_other():
    found = signals(rows=(3, 0), history=[3])
    assert Signal.SEEN_BRAND not in found[0]
    assert Signal.SEEN_ITEM in found[0]


def test_signals_of_the_history():
    found = signals(history=[0], behaviours=[Behaviour.PURCHASE])
    assert Signal.PURCHASED in found[0]
    assert Signal.PURCHASED not in found[1]
    assert Signal.SEEN_PRODUCT in found[1]
    assert Signal.SEEN_ITEM not in found[1]


def test_signals_of_the_item():
    found = signals()
    assert Signal.POPULAR in found[0]
    assert Signal.NEW_ITEM in found[0]
    assert Signal.NEW_ITEM not in found[1]
    assert Signal.UNAVAILABLE in found[2]


def test_how_well_the_query_matches():
    assert dense("query_coverage", query=[20, 21]) == [1, 0.5, 0, 0]
    assert dense("title_coverage", query=[21]) == [0.5, 0.5, 0, 0]
    assert dense("query_bigrams", query=[20, 21]) == [1, 0, 0, 0]
    assert dense("query_last_token", query=[20, 21]) == [1, 1, 0, 0]
    assert dense("first_match", query=[21]) == [0.5, 0.5, 0, 0]
    assert dense("title_length", query=[21]) == [1, 1, 1, 0]


def test_a_match_is_a_signal():
    found = signals(query=[20, 21])
    assert [Signal.MATCHES_QUERY in bits for bits in found] == [True, True, False, False]


def test_letters_forgive_spelling():
    coverage = dense("fuzzy_coverage", query=[28], words="shoes redd")
    assert coverage[0] > coverage[1] > coverage[2]
    assert dense("fuzzy_last", query=[28], words="red shoe")[0] == 1
    assert dense("fuzzy_worst", query=[28], words="red shoe")[0] == 1


def test_events_fill_the_end_of_the_history():
    history = PACKER.pack(request(history=[0, 2])).history[0]
    assert not history[:2].any()
    assert history[2:, 0].tolist() == [1, 3]
    assert history[2:, -2].tolist() == [30 + Behaviour.CLICK] * 2


def test_longer_gaps_have_higher_buckets():
    gaps = PACKER.pack(request(history=[0, 0, 0], ages=[90 * 86_400, 86_400, 60])).history[0, 1:, -1]
    assert gaps[0] > gaps[1] > gaps[2] >= 37


def test_context():
    context = PACKER.pack(request(anonymous=True, query=[20])).context[0]
    assert context[C["anonymous"]] == 1
    assert context[C["has_query"]] == 1
    assert context[C["query_length"]] == pytest.approx(1 / 3)
    assert context[C["history_length"]] == 0
    assert PACKER.pack(request(history=[0] * 4)).context[0][C["history_length"]] == pytest.approx(1)


def test_untimed_data_has_no_time_features():
    packer = Packer(replace(SPEC, timed=False), CATALOGUE, np.ones(SPEC.vocabulary_size, np.float32))
    packed = packer.pack(request(history=[0]))
    assert not packed.history[..., -1].any()
    assert not packed.context[0, C["hour_sin"] :].any()
    assert not packed.dense[..., D["age"]].any()


def test_without_text_embeddings_the_query_is_hidden_but_still_matched():
    packer = Packer(replace(SPEC, embed_text=False), CATALOGUE, np.ones(SPEC.vocabulary_size, np.float32))
    packed = packer.pack(request(query=[20, 21]))
    assert not packed.query.any()
    assert packed.dense[0, D["query_coverage"]] == 1


def test_an_event_of_unknown_time_has_a_missing_gap_and_not_the_oldest():
    lines = request(history=[0, 2])
    lines.history_timestamps[0, -2] = UNKNOWN_TIME
    gaps = PACKER.pack(lines).history[0, -2:, -1]
    assert gaps[0] == 0
    assert gaps[1] >= 37


def joined(batches):
    plain = [name for name in Lines._fields if name not in ("starts", "understood")]
    columns = {name: np.concatenate([getattr(b, name) for b in batches]) for name in plain}
    starts = np.cumsum([0, *(len(b.rows) for b in batches)])
    return Lines(starts=starts, understood=QueryWords.none(len(batches)), **columns)


def drawn(rng, width, count=None):
    """One line with anything in it."""
    events = int(rng.integers(0, 5))
    scores = None
    if rng.random() < 0.7:
        scores = rng.normal(size=width) * 10.0 ** rng.integers(-3, 6)
        if rng.random() < 0.5:
            scores = np.sort(scores)[::-1]
        scores = np.where(rng.random(width) < 0.1, np.nan, np.round(scores, 1))  # some alike, some missing
    return request(
        rows=tuple(rng.integers(-1, 4, width)),
        scores=scores,
        query=tuple(rng.integers(20, 30, int(rng.integers(0, 4)))),
        words=str(rng.choice(["", "red shoe", "a", "lamp lamp odd", "shoes redd greenish things of all kinds x y z"])),
        history=list(rng.integers(-1, 4, events)),
        behaviours=list(rng.integers(1, 6, events)),
        ages=list(rng.integers(0, 10**8, events)),
        anonymous=bool(rng.random() < 0.3),
    )


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32 - 1), lines=st.integers(1, 5), width=st.integers(1, 40), timed=st.booleans())
def test_kernels_give_what_the_reference_gives(seed, lines, width, timed):
    rng = np.random.default_rng(seed)
    spec, rarity = replace(SPEC, timed=timed), rng.random(SPEC.vocabulary_size).astype(np.float32)
    batch = joined([drawn(rng, width) for _ in range(lines)])
    found = Packer(spec, CATALOGUE, rarity, TRANSITIONS).pack(batch).by_line()
    for name, expected in ReferencePacker(spec, CATALOGUE, rarity, TRANSITIONS).pack(batch).items():
        np.testing.assert_allclose(getattr(found, name), expected, atol=2e-6, rtol=2e-6, err_msg=name)


def test_every_feature_is_filled_by_the_kernel_that_the_table_names():
    rng = np.random.default_rng(0)
    found = PACKER.pack(joined([drawn(rng, 64) for _ in range(20)]))
    called = inspect.getsource(fill.py_func)
    for table, columns in ((DENSE_TABLE, found.dense), (CONTEXT_TABLE, found.context)):
        for at, feature in enumerate(table):
            assert columns[:, at].any(), feature.name
            assert f" {feature.kernel}(" in called
            assert feature.name in inspect.getsource(fill.py_func.__globals__[feature.kernel].py_func)
            assert set(feature.groups) <= set(INPUTS)


@pytest.mark.parametrize("group", ["retrieval", "transitions", "attributes", "dense", "text", "price", "context"])
def test_what_a_recipe_leaves_out_is_zero_and_policies_see_it_all_the_same(group):
    everything = request(scores=[3, 2, 1, 0], query=[20, 21], words="red shoe", history=[0, 2])
    plain = PACKER.pack(everything)
    packed = Packer(replace(SPEC, without=(group,)), CATALOGUE, PACKER.token_idf, TRANSITIONS).pack(everything)
    for table, name in ((DENSE_TABLE, "dense"), (CONTEXT_TABLE, "context")):
        hidden = left_out(table, (group,))
        assert not getattr(packed, name)[:, hidden].any()
        kept = np.setdiff1d(np.arange(len(table)), hidden)
        np.testing.assert_array_equal(getattr(packed, name)[:, kept], getattr(plain, name)[:, kept])
    np.testing.assert_array_equal(packed.signals, plain.signals)


@pytest.mark.parametrize("field", ["item", "brand", "category", "price"])
def test_a_field_that_is_left_out_is_missing_in_candidates_and_history(field):
    packed = Packer(replace(SPEC, without=(field,)), CATALOGUE, PACKER.token_idf).pack(request(history=[0, 2]))
    at = SPEC.item_fields.index(field)
    assert not packed.candidates[:, at].any()
    assert not packed.history[:, :, at].any()
    assert packed.candidates.any()


def test_a_folded_ranker_is_given_rows_alone():
    packed = Packer(replace(SPEC, folded=5), CATALOGUE, PACKER.token_idf).pack(request(history=[0, 2]))
    assert packed.candidates.tolist() == [[1], [2], [3], [0]]
    assert packed.history[0, :, 0].tolist() == [0, 0, 1, 3]


def test_nothing_is_compiled_once_the_kernels_have_been_rehearsed(tmp_path):
    """Whatever the number of lines and the kind of array: a compiler at work would cost a request a second."""
    code = """
import numpy as np, sys
sys.path += sys.argv[1:]
import pathlib
from trirank_backend import rehearsal
rehearsal.rehearse()
def count():
    modules = [m for name, m in sys.modules.items() if name.startswith("trirank_backend")]
    found = [(m, k, f) for m in modules for k, f in vars(m).items() if hasattr(f, "signatures")]
    return {(m.__name__, k): len(f.signatures) for m, k, f in found}
before = count()
assert len(before) > 20
import test_features as t, test_reranking as r, rules
from trirank_backend.stores.overlay import STATE, Overlay, write_overlay
write_overlay(pathlib.Path(sys.argv[2]), np.zeros(3, STATE)[:1])
for stores in ({}, {"state": Overlay(pathlib.Path(sys.argv[2]), STATE)}):
    for lines in (1, 2, 5):
        for policy in r.POLICIES:
            told = r.handover([[0, 1, 2]] * lines, [[0] * 3] * lines, [policy] * lines, 2)
            for trace in (0, 1):
                told.header["trace"] = trace
                scores = np.zeros((lines, 3, 2), np.float32)
                rerank = r.reranker(range(3), **stores)
                rerank(scores, told), rerank.tensors({"scores": scores, "handover": told.tensor()})
rng = np.random.default_rng(0)
for lines in (1, 2, 3, 32):
    t.PACKER.pack(t.joined([t.drawn(rng, 64) for _ in range(lines)]))
    t.CATALOGUE.rows(np.arange(5)), t.CATALOGUE.rows(np.zeros((2, 3), np.int32))
print(sorted(k for k, v in count().items() if v != before[k]))
"""
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "state")], capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]", run.stderr


def one_more(number):
    return number + 1


def two_more(number):
    return number + 2


def test_processes_that_compile_at_a_time_keep_each_other_s_code(tmp_path, monkeypatch):
    """As ranks of a training do, whose first batches may differ in kind. Threads stand in for them: the lock is a
    file's."""
    from numba.core import config, types
    from trirank_backend import compiled

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    kernel = compiled.kernel(one_more)
    kernel(1)  # compiled here: what was read from the disk cannot be written again
    code = next(iter(kernel.overloads.values()))
    kinds = [(getattr(types, f"{sign}int{bits}"),) for sign in ("", "u") for bits in (8, 16, 32, 64)]
    caches = [compiled.shared_cache()(two_more) for _ in kinds]
    with ThreadPoolExecutor(len(kinds)) as threads:
        list(threads.map(lambda cache, kind: cache.save_overload(kind, code), caches, kinds))
    kept = caches[0]._cache_file._load_index()
    assert len(set(kept.values())) == len(kept) == len(kinds)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_line_does_not_depend_on_its_company(seed):
    rng = np.random.default_rng(seed)
    batches = [drawn(rng, int(rng.integers(1, 70))) for _ in range(4)]
    together, start = PACKER.pack(joined(batches)), 0
    for at, batch in enumerate(batches):
        alone, end = PACKER.pack(batch), start + len(batch.rows)
        for name in Packed._fields:
            part = slice(start, end) if name in ("candidates", "dense", "signals") else slice(at, at + 1)
            np.testing.assert_array_equal(getattr(together, name)[part], getattr(alone, name), err_msg=name)
        start = end


@given(st.permutations(range(6)))
def test_a_candidate_does_not_depend_on_its_place(order):
    rows = np.array([0, 1, 2, 3, -1, 0])
    scores = np.array([5.0, 4, 3, 2, 1, 0])
    plain = PACKER.pack(request(rows=tuple(rows), scores=scores, query=[21], history=[1]))
    moved = PACKER.pack(request(rows=tuple(rows[list(order)]), scores=scores[list(order)], query=[21], history=[1]))
    np.testing.assert_allclose(moved.dense, plain.dense[list(order)], atol=1e-6)
    np.testing.assert_array_equal(moved.signals, plain.signals[list(order)])


def test_a_spec_survives_the_disk_and_refuses_other_features(tmp_path):
    SPEC.save(tmp_path / "f.json")
    assert FeatureSpec.load(tmp_path / "f.json") == SPEC
    replace(SPEC, dense=("price",)).save(tmp_path / "g.json")
    with pytest.raises(InvalidRelease, match="train again"):
        FeatureSpec.load(tmp_path / "g.json")
    (tmp_path / "h.json").write_text("{}")
    with pytest.raises(InvalidRelease, match="cannot be read"):
        FeatureSpec.load(tmp_path / "h.json")
