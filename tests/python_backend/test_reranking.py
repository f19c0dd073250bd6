"""The rules of the last step, against plain loops."""

from __future__ import annotations

import json

import numpy as np
import pytest
from trirank import contract
from trirank.contract import Reason, Signal, Status
from trirank_backend.attributes import Attributes
from trirank_backend.catalogue import Catalogue
from trirank_backend.errors import BrokenScores, InvalidInput
from trirank_backend.handover import HEADER, Handover
from trirank_backend.policies import Items, Policy, Release
from trirank_backend.rerank import Rerank
from trirank_backend.stores.overlay import STATE, Overlay, write_overlay

TASKS = ("click", "purchase")
BY_CLICK = {"rule": "mix", "tasks": {"click": 1.0}}
POLICIES = {
    name: Policy.model_validate({"rules": rules})
    for name, rules in {
        "plain": [BY_CLICK],
        "unique": [{"rule": "mix", "tasks": {"click": 1.0, "purchase": 2.0}}, {"rule": "deduplicate"}],
        "fresh": [
            BY_CLICK,
            {"rule": "filter", "bought": True},
            {"rule": "boost", "signals": ["NEW_ITEM"], "by": 3.0},
        ],
    }.items()
}


def reranker(products, unavailable=(), **stores):
    """Of items 100, 101, … whose row is their place."""
    count = len(products)
    signals = np.zeros(count + 1, np.int32)
    signals[list(unavailable)] = Signal.UNAVAILABLE
    catalogue = Catalogue(
        ids=np.arange(100, 100 + count), fields=np.zeros((count + 1, 4), np.int32),
        dense=np.zeros((count + 1, 4), np.float32), products=np.array([*products, -1], np.int32),
        created_at=np.zeros(count + 1, np.int64), signals=signals,
        titles=np.zeros((count + 1, 0), np.int32), trigrams=np.zeros((count + 1, 0), np.uint8),
    )  # fmt: skip
    attributes = Attributes.unknown(count)
    return Rerank(Release(Items.of(catalogue, attributes), attributes, TASKS), POLICIES, **stores)


def handover(rows, signals, policy, top_k, unknown=None, **said):
    lines = len(rows)
    header = np.zeros(lines, HEADER)
    header["top_k"] = top_k
    header["policy"] = [list(POLICIES).index(name) for name in policy]
    header["min_price"], header["max_price"] = -np.inf, np.inf
    header["kept"] = 0 if unknown is None else len(unknown[0])
    for name, value in said.items():
        header[name] = value
    return Handover(
        header=header,
        rows=np.array(rows, np.int32),
        signals=np.array(signals, np.int32),
        scores=np.zeros((lines, 0), np.float32),
        unknown=np.zeros((lines, 0), np.int64) if unknown is None else np.array(unknown, np.int64),
    )


class Ranked:
    """An answer of one line; ``order`` are places among the candidates."""

    def __init__(self, answer):
        ids = answer["RANKED_IDS"][0]
        self.order = np.where(ids < 0, -1, ids - 100).tolist()
        self.scores, self.reasons = answer["SCORES"][0].tolist(), answer["REASONS"][0].tolist()
        self.filtered, self.status = int(answer["STATUS"][0, 3]), Status(int(answer["STATUS"][0, 0]))


def run(scores, signals=None, valid=None, products=None, policy="plain", top_k=None, unavailable=()):
    scores = np.asarray(scores, np.float32)
    if scores.ndim == 1:
        scores = np.stack([scores, np.zeros_like(scores)], 1)
    n = len(scores)
    rows = np.where(np.ones(n, bool) if valid is None else valid, np.arange(n), -1)
    given = handover([rows], [[0] * n if signals is None else signals], [policy], top_k or n)
    return Ranked(reranker(range(n) if products is None else products, unavailable)(scores[None], given))


def test_best_first():
    assert run([0.1, 0.9, 0.5]).order == [1, 2, 0]


def test_equal_scores_keep_the_order_they_came_in():
    assert run([1.0, 1.0, 1.0]).order == [0, 1, 2]


def test_cut_to_top_k():
    assert run([0.1, 0.9, 0.5], top_k=2).order == [1, 2]


def test_tasks_are_weighed():
    assert run([[1.0, 0.0], [0.0, 1.0]], policy="unique").order == [1, 0]
    assert run([[1.0, 0.0], [0.0, 1.0]], policy="plain").order == [0, 1]


def test_only_the_best_variant_stays():
    ranked = run([0.1, 0.9, 0.5, 0.7], products=[4, 4, 5, 4], policy="unique")
    assert ranked.order == [1, 2, -1, -1]
    assert ranked.filtered == 0


def test_invalid_ones_never_come_back():
    assert run([9.0, 0.9, 8.0], valid=[False, True, False]).order == [1, -1, -1]


def test_unavailable_items_are_dropped_everywhere():
    ranked = run([0.9, 0.5], unavailable=[0])
    assert ranked.order == [1, -1]
    assert ranked.filtered == 1


def test_purchased_items_are_dropped_where_the_policy_says_so():
    assert run([0.9, 0.5], signals=[Signal.PURCHASED, 0], policy="fresh").order == [1, -1]
    assert run([0.9, 0.5], signals=[Signal.PURCHASED, 0], policy="plain").order == [0, 1]


def test_a_boost_lifts_and_is_told():
    ranked = run([0.9, 0.5], signals=[0, Signal.NEW_ITEM], policy="fresh")
    assert ranked.order == [1, 0]
    assert ranked.scores == pytest.approx([3.5, 0.9])
    assert ranked.reasons == [Reason.NEW | Reason.BOOSTED, 0]


@pytest.mark.parametrize(
    ("signal", "reason"),
    [
        (Signal.MATCHES_QUERY, Reason.MATCHES_QUERY),
        (Signal.SEEN_ITEM, Reason.SEEN_BEFORE),
        (Signal.SEEN_PRODUCT, Reason.SEEN_BEFORE),
        (Signal.SEEN_BRAND, Reason.BRAND_YOU_CHOSE),
        (Signal.SEEN_CATEGORY, Reason.CATEGORY_YOU_BROWSE),
        (Signal.NEW_ITEM, Reason.NEW),
        (Signal.POPULAR, Reason.POPULAR),
    ],
)
def test_signals_become_reasons(signal, reason):
    assert run([1.0], signals=[signal]).reasons == [reason]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused_and_named(bad):
    with pytest.raises(BrokenScores, match=r"item 101 the scores \[.*\], which are no finite numbers"):
        run([0.5, bad, 0.1])
    assert run([0.5, bad, 0.1], valid=[True, False, True]).order == [0, 2, -1]  # of nobody who could be shown


WIDTH = HEADER.itemsize // 4
PLACE = {name: HEADER.fields[name][1] // 4 for name in ("top_k", "policy", "kept", "scored", "trace", "region")}


def put(at, value):
    return lambda tensor: tensor.__setitem__((0, PLACE.get(at, at)), value)


HOSTILE = {
    "a row beyond the catalogue": (put(WIDTH, 3), "holds row 3; it goes from -1 to 2"),
    "a row below": (put(WIDTH, -2), "holds row -2"),
    "signals that there are not": (put(WIDTH + 3, 2048), "holds signals 2048; it goes from 0 to 2047"),
    "negative signals": (put(WIDTH + 3, -1), "holds signals -1"),
    "top_k 0": (put("top_k", 0), "holds a top_k of 0; it goes from 1 to 1024"),
    "top_k huge": (put("top_k", 2**31 - 1), "holds a top_k of 2147483647"),
    "a count beyond": (put("kept", 2), r"handover says \[1, 1, 2\]"),
    "a negative count": (put("kept", -1), "holds a kept of -1"),
    "scores that are not there": (put("scored", 1), r"handover says \[1, 2, 2\]"),
    "a region that there is not": (put("region", 65), "holds a region of 65; it goes from 0 to 64"),
    "a trace of two": (put("trace", 2), "holds a trace of 2; it goes from 0 to 1"),
    "a policy that there is not": (put("policy", 3), "holds a policy of 3; it goes from 0 to 2"),
}


@pytest.mark.parametrize(("harm", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_handover_from_anybody_is_checked(harm, words):
    tensor = handover([[0, 1, 2]], [[0, 0, 0]], ["plain"], 2).tensor()
    scores = np.zeros((1, 3, 2), np.float32)
    good = reranker(range(3)).tensors({"scores": scores, contract.HANDOVER.name: tensor})
    assert good["RANKED_IDS"].tolist() == [[100, 101]]
    harm(tensor)
    with pytest.raises(InvalidInput, match=words):
        reranker(range(3)).tensors({"scores": scores, contract.HANDOVER.name: tensor})


@pytest.mark.parametrize("length", [0, 4, WIDTH - 1, WIDTH, WIDTH + 1, WIDTH + 3, WIDTH + 2 * 1025])
def test_a_handover_of_another_length(length):
    with pytest.raises(InvalidInput, match=f"has {length} numbers; it has {WIDTH}, 2 a candidate"):
        Handover.read(np.ones((1, length), np.int32) * (np.arange(length) == PLACE["top_k"]).astype(np.int32), 3, 1)


@pytest.mark.parametrize(("top_k", "shown"), [(1, [101]), (3, [101, 100, 900]), (5, [101, 100, 900, 2**62, -1])])
def test_unknown_candidates_that_are_kept_come_last(top_k, shown):
    """Over the boundary of two processes, too."""
    told = handover([[0, 1, -1]], [[0, 0, 0]], ["plain"], top_k, [[900, 2**62]])
    scores = np.array([[[0.1, 0.1], [0.9, 0.9], [0, 0]]], np.float32)
    rerank = reranker(range(3))
    for answer in (rerank(scores, told), rerank.tensors({"scores": scores, contract.HANDOVER.name: told.tensor()})):
        assert answer["RANKED_IDS"].tolist() == [shown]
        assert answer["REASONS"][0, 2:4].tolist() == [Reason.NOT_IN_CATALOGUE] * min(2, max(0, top_k - 2))
        assert (np.diff(answer["SCORES"][0, : min(top_k, 4)]) <= 0).all()
        assert (Status.FEWER_THAN_TOP_K in Status(int(answer["STATUS"][0, 0]))) == (top_k == 5)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 3, 1), (2, 3, 2), (1, 3)])
def test_scores_of_another_shape(shape):
    tensor = handover([[0, 1, 2]], [[0, 0, 0]], ["plain"], 2).tensor()
    with pytest.raises(InvalidInput, match="handover says"):
        reranker(range(3)).tensors({"scores": np.zeros(shape, np.float32), contract.HANDOVER.name: tensor})


def test_a_trace_tells_what_each_rule_did():
    scores = np.zeros((1, 4, 2), np.float32)
    scores[0, :, 0] = [0.1, 0.9, 0.5, 0.2]
    told = handover([[0, 1, 2, 3]], [[Signal.NEW_ITEM, 0, 0, Signal.PURCHASED]], ["fresh"], 2, trace=1)
    rerank = reranker([0, 1, 2, 3], unavailable=[2])
    for answer in (rerank(scores, told), rerank.tensors({"scores": scores, contract.HANDOVER.name: told.tensor()})):
        trace = json.loads(answer["TRACE_JSON"][0, 0])
        assert trace["policy"] == "fresh"
        assert trace["rules"] == ["available", "mix", "filter", "boost"]
        items = {item["item"]: item for item in trace["items"]}
        assert [item["item"] for item in trace["items"]][:2] == [100, 101]
        assert items[100]["position"] == 1
        assert items[100]["moves"] == [
            {"rule": "mix", "from": 1, "to": 3, "score": 0.1},
            {"rule": "filter", "from": 3, "to": 2, "score": 0.1},
            {"rule": "boost", "from": 2, "to": 1, "score": 3.1},
        ]
        assert items[100]["tasks"] == {"click": 0.1, "purchase": 0.0}
        assert items[102]["dropped_by"] == "available"
        assert items[103]["dropped_by"] == "filter"
        assert items[103]["position"] is None
        plain = rerank(scores, handover(told.rows, told.signals, ["fresh"], 2))
        assert "TRACE_JSON" not in plain
        for name, tensor in plain.items():
            assert tensor.tobytes() == answer[name].tobytes()


EVERY_RULE = [
    BY_CLICK, {"rule": "deduplicate"}, {"rule": "mmr"}, {"rule": "cap", "field": "brand"},
    {"rule": "quota", "different": 2}, {"rule": "sponsored", "items": [103, 104], "slots": [2, 4]},
    {"rule": "pin", "item": 101, "position": 3},
]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_a_trace_changes_nothing(seed, monkeypatch):
    monkeypatch.setitem(POLICIES, "every", Policy.model_validate({"rules": EVERY_RULE}))
    monkeypatch.setitem(POLICIES, "spread", Policy.model_validate({"rules": [BY_CLICK, {"rule": "dpp"}]}))
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (1, 30, 2)).astype(np.float32)
    rows, signals = [rng.permutation(30)], [rng.integers(0, 256, 30)]
    for policy in POLICIES:
        rerank = reranker(rng.integers(-1, 12, 30))
        plain, traced = (rerank(scores, handover(rows, signals, [policy], 12, trace=each)) for each in (0, 1))
        for name, tensor in plain.items():
            assert tensor.tobytes() == traced[name].tobytes()
        shown = [item["item"] for item in json.loads(traced["TRACE_JSON"][0, 0])["items"] if item["position"]]
        assert shown == [item for item in plain["RANKED_IDS"][0].tolist() if item >= 0]


@pytest.mark.parametrize(("everything", "kept"), [(False, [101, 7]), (True, [101, 5, 6, 7])])
def test_what_the_catalogue_does_not_know_may_be_sold_out_as_well(tmp_path, everything, kept, monkeypatch):
    """A release of tomorrow knows them; what is said of them today counts."""
    write_overlay(tmp_path / "c.npy", np.array([(5, np.nan, 0, 0, 0), (6, np.nan, -1, 1, 0)], STATE))
    monkeypatch.setitem(POLICIES, "all", Policy(keep_unknown=True, keep_unavailable=everything))
    rerank = reranker(range(4), state=Overlay(tmp_path / "c.npy", STATE))
    told = handover([[1]], [[0]], ["all"], 4, unknown=[[5, 6, 7]])
    answer = rerank(np.zeros((1, 1, 2), np.float32), told)
    assert [item for item in answer["RANKED_IDS"][0].tolist() if item >= 0] == kept


def test_prices_stock_and_blocks_of_now(tmp_path):
    file = tmp_path / "catalogue.npy"
    rerank = reranker(range(4), unavailable=[0], state=Overlay(file, STATE))
    scores = np.array([[[0.9, 0], [0.8, 0], [0.7, 0], [0.6, 0]]], np.float32)
    told = handover([[0, 1, 2, 3]], [[0] * 4], ["plain"], 4)

    def ranked(given=told):
        rerank._state._next = 0  # look again
        return [item for item in rerank(scores, given)["RANKED_IDS"][0].tolist() if item >= 0]

    assert ranked() == [101, 102, 103]
    write_overlay(file, np.array([(100, np.nan, 3, 0, 0), (101, np.nan, -1, 1, 0), (102, 5.0, 0, 0, 0)], STATE))
    assert ranked() == [100, 103]
    write_overlay(file, np.array([(101, 7.5, -1, 0, 0), (103, 20.0, -1, 0, 0)], STATE))
    assert ranked(handover([[0, 1, 2, 3]], [[0] * 4], ["plain"], 4, max_price=10.0)) == [101]
    file.write_bytes(b"nonsense")
    assert ranked() == [101, 102, 103]  # what was known before is gone by
    file.unlink()
    assert ranked() == [101, 102, 103]
