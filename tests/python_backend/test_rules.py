"""Every rule against a plain version of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import (
    DAY_S,
    NOW,
    apply,
    best_first,
    bound_to,
    page_of,
    plain_cap,
    plain_deduplicate,
    plain_dpp,
    plain_mmr,
    plain_quota,
    plain_settle,
    selects,
)
from trirank.contract import Reason, Signal
from trirank_backend.errors import BrokenScores
from trirank_backend.policies import Asked, Live
from trirank_backend.policies.dpp import SHARE
from trirank_backend.policies.page import sort

RELEASE = bound_to()
seeds = st.integers(0, 10_000)
counts = st.integers(1, 30)
MIX = {"rule": "mix", "tasks": {"click": 1.0}}
selections = st.fixed_dictionaries(
    {},
    optional={
        "signals": st.lists(st.sampled_from(["NEW_ITEM", "POPULAR", "PURCHASED"]), min_size=1, max_size=2),
        "brands": st.lists(st.sampled_from(["alder", "cedar"]), min_size=1, unique=True),
        "categories": st.just(["lamp"]),
        "sellers": st.just(["acme"]),
        "items": st.lists(st.integers(95, 145), min_size=1, max_size=5),
        "younger_days": st.floats(1, 60),
    },
).filter(bool)


def sorted_page(seed, count, **said):
    page = page_of(RELEASE, seed, count, **said)
    return page, best_first_of_click(page)


def best_first_of_click(page):
    places = [place for place in range(len(page.rows)) if page.rows[place] >= 0]
    return sorted(places, key=lambda place: -page.tasks[place, 0])


@settings(deadline=None)
@given(
    seeds, counts, st.sampled_from(["logit", "probability"]), st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2),
    st.floats(0.5, 30),
)  # fmt: skip
def test_mix(seed, count, scale, margin, freshness, retrieval, half_life):
    page, items = page_of(RELEASE, seed, count), RELEASE.items
    rule = {
        "rule": "mix", "tasks": {"click": 0.5, "purchase": 2.0}, "scale": scale, "margin": margin,
        "freshness": freshness, "retrieval": retrieval, "half_life_days": half_life,
    }  # fmt: skip
    order = apply(RELEASE, page, rule)
    given_scores = [float(page.retrieval[p]) for p in order if not math.isnan(page.retrieval[p])]
    mean, deviation = (np.mean(given_scores), np.std(given_scores)) if given_scores else (0, 0)
    for place in order:
        row = page.rows[place]
        shown = [float(s) if scale == "logit" else 1 / (1 + math.exp(-s)) for s in page.tasks[place]]
        wanted = 0.5 * shown[0] + 2.0 * shown[1]
        wanted += 0 if math.isnan(items.margins[row]) else margin * float(items.margins[row])
        if items.created_at[row]:
            wanted += freshness * 2 ** (-(NOW - int(items.created_at[row])) / DAY_S / half_life)
        if not math.isnan(page.retrieval[place]) and deviation > 1e-6:
            wanted += retrieval * (float(page.retrieval[place]) - mean) / deviation
            assert page.score[place] == pytest.approx(wanted, abs=1e-3)
        elif math.isnan(page.retrieval[place]) or not retrieval:
            assert page.score[place] == pytest.approx(wanted, abs=1e-3)
    assert order == best_first(page, sorted(order))


def test_without_a_mix_all_tasks_count_alike():
    page = page_of(RELEASE, 1)
    order = apply(RELEASE, page)
    assert page.score[order] == pytest.approx(page.tasks[order].mean(1), abs=1e-6)


@settings(deadline=None)
@given(seeds, counts, selections)
def test_filter_by_selection(seed, count, selection):
    page, order = sorted_page(seed, count)
    left = apply(RELEASE, page, MIX, {"rule": "filter", **selection})
    assert left == [place for place in order if not selects(RELEASE, page, place, **selection)]
    assert page.filtered == len(order) - len(left)


@settings(deadline=None)
@given(
    seeds, counts,
    st.fixed_dictionaries({}, optional={
        "min_price": st.floats(1, 50), "max_price": st.floats(50, 100), "min_age_days": st.floats(0, 20),
        "max_age_days": st.floats(20, 60), "min_stock": st.integers(1, 20), "bought": st.just(True),
    }).filter(bool),
)  # fmt: skip
def test_filter_by_limits(seed, count, limits):
    rng = np.random.default_rng(seed)
    live = Live(
        np.where(rng.random(count) < 0.5, np.nan, rng.uniform(1, 100, count)).astype(np.float32),
        rng.integers(-1, 30, count).astype(np.int32), np.zeros(count, np.int32),
    )  # fmt: skip
    page, order = sorted_page(seed, count, live=live)

    def stays(place):
        row = page.rows[place]
        price = RELEASE.items.prices[row] if math.isnan(live.prices[place]) else live.prices[place]
        sold_out = RELEASE.items.signals[row] & Signal.UNAVAILABLE
        stock = live.stock[place] if live.stock[place] >= 0 else 0 if sold_out else -1
        born = int(RELEASE.items.created_at[row])
        if "bought" in limits and page.signals[place] & Signal.PURCHASED:
            return False
        priced, aged = limits.keys() & {"min_price", "max_price"}, limits.keys() & {"min_age_days", "max_age_days"}
        if priced and not limits.get("min_price", 0) <= price <= limits.get("max_price", math.inf):
            return False
        least, most = limits.get("min_age_days", 0), limits.get("max_age_days", math.inf)
        if aged and not (born and least <= (NOW - born) / DAY_S <= most):
            return False
        return not 0 <= stock < limits.get("min_stock", 0)

    assert apply(RELEASE, page, MIX, {"rule": "filter", **limits}) == [place for place in order if stays(place)]


@settings(deadline=None)
@given(seeds, counts, selections, st.floats(0.1, 5), st.sampled_from(["boost", "bury"]))
def test_boost_and_bury(seed, count, selection, by, rule):
    page, order = sorted_page(seed, count)
    found = apply(RELEASE, page, MIX, {"rule": rule, "by": by, **selection})
    sign, bit = (1, Reason.BOOSTED) if rule == "boost" else (-1, Reason.BURIED)
    for place in order:
        lifted = selects(RELEASE, page, place, **selection)
        assert page.score[place] == pytest.approx(page.tasks[place, 0] + lifted * sign * by, abs=1e-5)
        assert bool(page.reasons[place] & bit) == lifted
    assert found == best_first(page, sorted(order))


@settings(deadline=None)
@given(seeds, counts, st.booleans(), st.sampled_from([None, 0.5, 0.8, 1.0]), st.booleans())
def test_deduplicate(seed, count, variants, titles, pinned):
    if not variants and titles is None:
        return
    page, order = sorted_page(seed, count)
    rules = [MIX, {"rule": "deduplicate", "variants": variants} | ({"titles": titles} if titles else {})]
    held = []
    if pinned and order:  # at the last position, so that the order tells what was kept
        held = [order[-1]]
        rules.append({"rule": "pin", "item": int(RELEASE.items.ids[page.rows[order[-1]]]), "position": 1000})
    kept = apply(RELEASE, page, *rules)
    wanted = plain_deduplicate(RELEASE, page, order, variants, titles, held)
    assert sorted(kept) == sorted(wanted)
    assert [p for p in kept if p not in held] == [p for p in wanted if p not in held]
    if len(kept) < len(order):
        assert any(page.reasons[place] & Reason.BEST_VARIANT for place in kept)


def test_near_titles_are_near():
    kept = apply(RELEASE, page := page_of(RELEASE, 3, 30), MIX, {"rule": "deduplicate", "titles": 0.8})
    assert len(kept) < page.rows.size / 2  # there are six titles, two of them nearly alike


@settings(deadline=None, max_examples=50)
@given(seeds, counts, st.floats(0.05, 0.95), st.integers(1, 30))
def test_mmr(seed, count, diversity, within):
    page, order = sorted_page(seed, count, rounded=False)
    found = apply(RELEASE, page, MIX, {"rule": "mmr", "diversity": diversity, "within": within})
    if order:
        assert found == plain_mmr(RELEASE, page, order, diversity, within)
        for position, place in enumerate(found):
            assert bool(page.reasons[place] & Reason.DIVERSITY) == (position < order.index(place) and position < within)


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 14), st.floats(0.1, 0.95), st.integers(1, 10))
def test_dpp(seed, count, diversity, within):
    page, order = sorted_page(seed, count, rounded=False)
    found = apply(RELEASE, page, MIX, {"rule": "dpp", "diversity": diversity, "within": within})
    if order:
        assert found == plain_dpp(RELEASE, page, order, diversity, within, float(SHARE))


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), max_size=60))
def test_the_best_come_first_and_equals_in_their_order(scores):
    order = np.arange(len(scores), dtype=np.int32)[::-1].copy()
    before = order.tolist()
    sort(order, len(scores), np.array(scores, np.float32))
    assert order.tolist() == sorted(before, key=lambda place: -scores[place])


def test_a_set_may_be_larger_than_vectors_have_dimensions():
    page, order = sorted_page(1, 40, top_k=40)
    assert sorted(apply(RELEASE, page, MIX, {"rule": "dpp"})) == sorted(order)


@settings(deadline=None)
@given(seeds, counts, st.sampled_from(["brand", "category", "seller"]), st.integers(1, 3), st.integers(4, 12), seeds)
def test_cap(seed, count, field, at_most, window, within):
    within = within % 30 + 1
    page, order = sorted_page(seed, count)
    rule = {"rule": "cap", "field": field, "at_most": at_most, "window": window, "within": within}
    found = apply(RELEASE, page, MIX, rule)
    codes = {"brand": RELEASE.items.brands, "category": RELEASE.items.categories, "seller": RELEASE.items.sellers}
    assert found == plain_cap(codes[field], page, order, at_most, window, within)
    for place in order:
        passed = any(found.index(other) < found.index(place) < within for other in order[order.index(place) + 1 :])
        if passed:
            assert page.reasons[place] & Reason.HELD_BACK
        if found.index(place) <= order.index(place) and found.index(place) < within:
            stood_back = any(found.index(o) < found.index(place) for o in order[order.index(place) + 1 :])
            assert bool(page.reasons[place] & Reason.HELD_BACK) == stood_back


@settings(deadline=None)
@given(
    seeds, counts, st.sampled_from(["brand", "category"]), st.integers(1, 12), seeds, st.sampled_from([None, 1, 2, 4])
)
def test_quota(seed, count, field, within, different, at_most):
    different = different % within + 1
    if different == 1 and at_most is None:
        return
    page, order = sorted_page(seed, count)
    rule = {"rule": "quota", "field": field, "within": within, "different": different}
    found = apply(RELEASE, page, MIX, rule | ({"at_most": at_most} if at_most else {}))
    codes = RELEASE.items.brands if field == "brand" else RELEASE.items.categories
    assert found == plain_quota(codes, page, order, within, different, at_most or within)


@settings(deadline=None)
@given(seeds, counts, st.lists(st.tuples(st.integers(0, 29), st.integers(1, 40)), max_size=4))
def test_pins(seed, count, pins):
    page, order = sorted_page(seed, count)
    wanted, rules = {}, []
    for at, position in pins:
        if at < len(order) and position not in wanted and order[at] not in wanted.values():
            wanted[position] = order[at]
            rules.append({"rule": "pin", "item": int(RELEASE.items.ids[page.rows[order[at]]]), "position": position})
    found = apply(RELEASE, page, MIX, *rules)
    assert found == plain_settle(order, wanted)
    assert {place for place in order if page.reasons[place] & Reason.PINNED} == set(wanted.values())


@settings(deadline=None)
@given(seeds, counts, selections, st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
def test_sponsored(seed, count, selection, slots):
    page, order = sorted_page(seed, count)
    found = apply(RELEASE, page, MIX, {"rule": "sponsored", "slots": slots, **selection})
    seen = sorted(slot for slot in slots if slot <= page.top_k)
    paid = [place for place in order if selects(RELEASE, page, place, **selection)][: len(seen)]
    assert found == plain_settle(order, dict(zip(seen, paid, strict=False)))
    assert {place for place in order if page.reasons[place] & Reason.SPONSORED} == set(paid)


@pytest.mark.parametrize("sponsored_first", [True, False])
def test_an_item_that_two_rules_place_stands_once(sponsored_first):
    page, order = sorted_page(5, 20)
    item = int(RELEASE.items.ids[page.rows[order[-1]]])
    rules = [{"rule": "pin", "item": item, "position": 1}, {"rule": "sponsored", "items": [item], "slots": [2]}]
    found = apply(RELEASE, page, MIX, *(rules[::-1] if sponsored_first else rules))
    assert sorted(found) == sorted(order)
    assert found[0] == order[-1]


def test_a_slot_that_nobody_sees_hides_nothing():
    page, order = sorted_page(5, 20, top_k=5)
    items = [int(RELEASE.items.ids[page.rows[place]]) for place in order[:2]]
    found = apply(RELEASE, page, MIX, {"rule": "sponsored", "items": items, "slots": [1, 15]})
    assert found[:2] == order[:2]


@pytest.mark.parametrize("rule", ["mmr", "dpp"])
@pytest.mark.parametrize("scale", [1e38, 3e38])
def test_scores_as_large_as_numbers_go_lose_no_item(rule, scale):
    """Compiled loops check no bounds: an item taken twice would be written behind the end."""
    page, _ = sorted_page(3, 30, top_k=30)
    page.tasks[:, 0] *= np.float32(scale) / np.abs(page.tasks[:, 0]).max()
    order = best_first_of_click(page)
    assert sorted(apply(RELEASE, page, MIX, {"rule": rule, "within": 30})) == sorted(order)


def test_limits_are_as_exact_as_prices_are():
    """49.9 is 49.90000153 in 32 bits, on both sides."""
    for price in (49.9, 19.99, 0.1):
        prices = np.full(20, price, np.float32)
        live = Live(prices, np.full(20, -1, np.int32), np.zeros(20, np.int32))
        for limits in ({"max_price": price}, {"min_price": price}):
            page, order = sorted_page(1, 20, live=live)
            assert apply(RELEASE, page, MIX, {"rule": "filter", **limits}) == order


def test_a_pin_and_a_slot_keep_out_of_each_others_way():
    page, order = sorted_page(5, 20)
    item = int(RELEASE.items.ids[page.rows[order[-1]]])
    rules = [{"rule": "pin", "item": item, "position": 2}, {"rule": "sponsored", "items": [item], "slots": [1]}]
    assert apply(RELEASE, page, MIX, *rules).index(order[-1]) == 1


class TestExplore:
    @staticmethod
    def scores(page, **said):
        apply(RELEASE, page, MIX, {"rule": "explore", "younger_days": 60, **said})
        return page.score.copy()

    @staticmethod
    def counted(shown=0, clicked=0, **said):
        page = page_of(RELEASE, 1, 30, **said)
        page.impressions, page.clicks = np.full(30, shown, np.int32), np.full(30, clicked, np.int32)
        return page

    def test_a_repeat_is_answered_alike_and_another_request_is_not(self):
        once, again = self.scores(self.counted()), self.scores(self.counted())
        assert (once == again).all()
        assert (once != self.scores(page_of(RELEASE, 1, 30, seed=8))).any()

    def test_only_what_is_new_is_touched(self):
        page = self.counted()
        scores = self.scores(page)
        for place in range(30):
            born = RELEASE.items.created_at[page.rows[place]] if page.rows[place] >= 0 else 0
            new = born > 0 and NOW - born < 60 * DAY_S
            assert bool(page.reasons[place] & Reason.EXPLORED) == new
            if page.rows[place] >= 0 and not new:
                assert scores[place] == page.tasks[place, 0]

    def test_what_was_shown_often_enough_is_left_alone(self):
        page = self.counted(shown=500)
        self.scores(page, until=500)
        assert not page.reasons.any()

    def test_ucb_is_mean_and_deviation(self):
        page = self.counted(shown=30, clicked=6)
        scores = self.scores(page, method="ucb", z=2.0, weight=3.0)
        good, bad = 1 + 6, 20 - 1 + 24
        mean = good / (good + bad)
        rate = mean + 2 * math.sqrt(mean * (1 - mean) / (good + bad + 1))
        lift = 3 * (math.log(rate / (1 - rate)) - math.log(1 / 19))
        touched = page.reasons != 0
        assert touched.any()
        assert scores[touched] - page.tasks[touched, 0] == pytest.approx(lift, abs=1e-4)

    def test_draws_are_of_the_beta_distribution(self):
        rates = []
        for seed in range(300):
            page = self.counted(shown=200, clicked=40, seed=seed)
            touched = self.scores(page, prior_clicks=1, prior_showings=20, weight=1.0) - page.tasks[:, 0]
            lifts = touched[page.reasons != 0] + math.log(1 / 19)
            rates += (1 / (1 + np.exp(-lifts))).tolist()
        a, b = 41, 179
        assert np.mean(rates) == pytest.approx(a / (a + b), abs=0.003)
        assert np.std(rates) == pytest.approx(math.sqrt(a * b / (a + b) ** 2 / (a + b + 1)), rel=0.1)

    def test_what_disappoints_sinks(self):
        good = self.scores(self.counted(shown=400, clicked=100))
        bad = self.scores(self.counted(shown=400, clicked=0))
        assert good.mean() > bad.mean() + 1


class TestAdmission:
    def test_what_is_sold_out_or_blocked_is_left_out_unless_the_policy_keeps_it(self):
        count = 30
        live = Live(np.full(count, np.nan, np.float32), np.full(count, -1, np.int32), np.zeros(count, np.int32))
        live.stock[:4], live.blocked[4:8] = 0, 1
        page = page_of(RELEASE, 2, count, live=live, everything=False)
        there = set(page.order[: page.count].tolist())
        assert not there & set(range(8))
        sold_out = [p for p in range(8, count) if RELEASE.items.signals[page.rows[p]] & Signal.UNAVAILABLE]
        assert sold_out
        assert not there & set(sold_out)
        everything = page_of(RELEASE, 2, count, live=live, everything=True)
        assert everything.count == (everything.rows >= 0).sum()

    def test_new_stock_brings_an_item_back(self):
        count = 30
        live = Live(np.full(count, np.nan, np.float32), np.full(count, 5, np.int32), np.zeros(count, np.int32))
        page = page_of(RELEASE, 2, count, live=live, everything=False)
        assert page.count == (page.rows >= 0).sum()

    @pytest.mark.parametrize("region", [1, 2])
    def test_what_cannot_be_had_in_a_region(self, region):
        page = page_of(RELEASE, 4, 30, asked=Asked(region, 0, -np.inf, np.inf))
        wanted = [
            p for p in range(30) if page.rows[p] >= 0 and int(RELEASE.items.regions[page.rows[p]]) >> region - 1 & 1
        ]
        assert page.order[: page.count].tolist() == wanted
        assert len(wanted) < (page.rows >= 0).sum()

    def test_prices_that_were_asked_for(self):
        page = page_of(RELEASE, 4, 30, asked=Asked(0, 0, 20.0, 60.0))
        wanted = [p for p in range(30) if page.rows[p] >= 0 and 20 <= RELEASE.items.prices[page.rows[p]] <= 60]
        assert page.order[: page.count].tolist() == wanted
        assert page.filtered == (page.rows >= 0).sum() - len(wanted)

    def test_stock_that_was_asked_for(self):
        count = 30
        live = Live(
            np.full(count, np.nan, np.float32), np.arange(-1, count - 1, dtype=np.int32), np.zeros(count, np.int32)
        )
        page = page_of(RELEASE, 2, count, live=live, asked=Asked(0, 10, -np.inf, np.inf), everything=True)
        assert set(page.order[: page.count].tolist()) >= {p for p in range(11, 30) if page.rows[p] >= 0}
        assert not set(page.order[: page.count].tolist()) & set(range(1, 11))


def test_rules_for_a_search_leave_others_alone():
    from trirank_backend.policies import query_key

    rule = {"rule": "boost", "items": list(range(100, 140)), "by": 5.0, "queries": ["Red  Shoes"]}
    page = page_of(RELEASE, 1, query=query_key(" red shoes "))
    apply(RELEASE, page, MIX, rule)
    assert (page.reasons[page.rows >= 0] == Reason.BOOSTED).all()
    other = page_of(RELEASE, 1, query=query_key("blue shoes"))
    apply(RELEASE, other, MIX, rule)
    assert not other.reasons.any()


@pytest.mark.parametrize("scale", ["logit", "probability"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_told(value, scale):
    page = page_of(RELEASE, 1)
    page.tasks[int(page.order[2]), 0] = value
    with pytest.raises(BrokenScores, match=rf"the ranker gave item 1\d\d the scores \[{value}"):
        apply(RELEASE, page, MIX | {"scale": scale})


@pytest.mark.parametrize("order", ["mmr", "dpp"])
def test_nothing_is_left(order):
    page = page_of(RELEASE, 1)
    rules = [{"rule": order}, {"rule": "cap", "field": "brand"}]
    rules += [{"rule": "quota", "different": 3}, {"rule": "pin", "item": 101, "position": 1}]
    assert apply(RELEASE, page, MIX, {"rule": "filter", "min_age_days": 1000}, *rules) == []
