"""A small catalogue for rules, pages of it, and each rule once more in plain Python."""

from __future__ import annotations

import math

import numpy as np
from trirank.contract import Signal
from trirank_backend.attributes import EVERYWHERE, Attributes
from trirank_backend.catalogue import Catalogue
from trirank_backend.policies import Asked, Items, Live, Page, Policy, Release
from trirank_backend.policies.page import admit
from trirank_backend.text import title_sketches

NOW = 1_770_000_000
DAY_S = 86_400
TASKS = ("click", "purchase")
BRANDS, CATEGORIES, SELLERS = ["alder", "birch", "cedar"], ["lamp", "shoe"], ["acme"]
TITLES = ["red running shoe", "red running shoes", "blue desk lamp", "", "green lamp", "red running shoe 42"]
ANY = Asked(0, 0, -np.inf, np.inf)
NOTHING = Live(np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.int32))


def bound_to(count=40, seed=0):
    """A release of items 100, 101, … whose row is their place."""
    rng = np.random.default_rng(seed)
    catalogue = Catalogue(
        ids=np.arange(100, 100 + count), fields=np.zeros((count + 1, 4), np.int32),
        dense=np.zeros((count + 1, 4), np.float32),
        products=np.append(rng.integers(0, count // 2, count), -1).astype(np.int32),
        created_at=np.append(np.where(rng.random(count) < 0.2, 0, NOW - rng.integers(0, 60 * DAY_S, count)), 0),
        signals=np.append((rng.random(count) < 0.1) * Signal.UNAVAILABLE.value, 0).astype(np.int32),
        titles=np.zeros((count + 1, 0), np.int32), trigrams=np.zeros((count + 1, 0), np.uint8),
    )  # fmt: skip
    vectors = rng.normal(size=(count + 1, 32))
    vectors = np.round(127 * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.int8)
    titles = [TITLES[at] for at in rng.integers(len(TITLES), size=count)]
    codes = lambda names: np.append(rng.integers(-1, len(names), count), -1).astype(np.int32)  # noqa: E731
    attributes = Attributes(
        prices=np.append(np.where(rng.random(count) < 0.1, np.nan, rng.uniform(1, 100, count)), np.nan).astype("f4"),
        margins=np.append(np.where(rng.random(count) < 0.1, np.nan, rng.uniform(0, 0.5, count)), np.nan).astype("f4"),
        brands=codes(BRANDS), categories=codes(CATEGORIES), sellers=codes(SELLERS),
        regions=np.array([(1, 2, 3, EVERYWHERE)[at] for at in rng.integers(4, size=count)] + [EVERYWHERE], np.uint64),
        vectors=vectors, sketches=np.concatenate([title_sketches(titles), np.zeros((1, 32), np.uint8)]),
        names={"brand": BRANDS, "category": CATEGORIES, "seller": SELLERS, "region": ["at", "de"]},
    )  # fmt: skip
    return Release(Items.of(catalogue, attributes), attributes, TASKS)


def page_of(release, number=0, count=20, top_k=10, live=NOTHING, asked=ANY, everything=True, rounded=True, **said):
    """Some of the items with random scores; rounded, so that some are equal."""
    rng = np.random.default_rng(number)
    rows = np.where(rng.random(count) < 0.1, -1, rng.permutation(len(release.items.ids))[:count]).astype(np.int32)
    tasks = rng.normal(size=(count, 2)).astype(np.float32)
    signals = rng.integers(0, 2048, count).astype(np.int32) & ~Signal.UNAVAILABLE.value
    retrieval = np.where(rng.random(count) < 0.2, np.nan, rng.normal(size=count)).astype(np.float32)
    said = {"moment": NOW, "seed": 7} | said
    page = Page(rows, signals, np.round(tasks, 1) if rounded else tasks, retrieval, top_k, **said)
    page.count, page.filtered = admit(
        page.rows, live, release.items.prices, release.items.signals, release.items.regions, Signal.UNAVAILABLE.value,
        asked, everything, page.prices, page.stock, page.order,
    )  # fmt: skip
    return page


def apply(release, page, *rules):
    """Run rules on a page, and sort what is left."""
    for _, step in Policy.model_validate({"rules": list(rules)}).bind(release):
        step(page)
    page.sort()
    return page.order[: page.count].tolist()


def best_first(page, places):
    return sorted(places, key=lambda place: -page.score[place])


def selects(release, page, place, **said):
    """Whether a Selection takes a place."""
    items, row = release.items, page.rows[place]
    young = items.created_at[row] > 0 and NOW - items.created_at[row] < said.get("younger_days", 0) * DAY_S
    named = any(
        codes[row] >= 0 and names[codes[row]] in said.get(kind, ())
        for kind, codes, names in (
            ("brands", items.brands, BRANDS), ("categories", items.categories, CATEGORIES),
            ("sellers", items.sellers, SELLERS),
        )
    )  # fmt: skip
    signal = any(page.signals[place] & Signal[name] for name in said.get("signals", ()))
    return bool(signal or named or young or items.ids[row] in said.get("items", ()))


def cosine(release, page, one, other):
    vectors = release.items.vectors.astype(np.float64)
    return float(vectors[page.rows[one]] @ vectors[page.rows[other]]) / 127**2


def relevance(page, order):
    scores = [float(page.score[place]) for place in order]
    spread = max(scores) - min(scores)
    return {
        place: (score - min(scores)) / spread if spread else 0.0 for place, score in zip(order, scores, strict=True)
    }


def plain_mmr(release, page, order, diversity, within):
    worth, left, taken = relevance(page, order), list(order), []
    while left and len(taken) < within:
        best = max(
            left,
            key=lambda place: (
                (1 - diversity) * worth[place]
                - (diversity * max(cosine(release, page, place, other) for other in taken) if taken else 0)
            ),
        )
        taken.append(best)
        left.remove(best)
    return taken + left


def plain_dpp(release, page, order, diversity, within, share):
    """By determinants themselves, rather than by a factor that is kept up to date."""
    worth, left, taken = relevance(page, order), list(order), []
    weight = (1 - diversity) / (2 * diversity)

    def log_determinant(places):
        kernel = np.array(
            [
                [
                    math.exp(weight * (worth[a] + worth[b])) * (cosine(release, page, a, b) * share if a != b else 1.0)
                    for b in places
                ]
                for a in places
            ]
        )
        return np.linalg.slogdet(kernel)[1]

    while left and len(taken) < within:
        best = max(left, key=lambda place: log_determinant([*taken, place]))
        taken.append(best)
        left.remove(best)
    return taken + left


def plain_cap(codes, page, order, at_most, window, within):
    left, taken = list(order), []
    while left and len(taken) < within:
        near = [codes[page.rows[place]] for place in taken[-(window - 1) :]]
        fits = [
            place
            for place in left
            if codes[page.rows[place]] < 0 or sum(code == codes[page.rows[place]] for code in near) < at_most
        ]
        taken.append((fits or left)[0])
        left.remove(taken[-1])
    return taken + left


def plain_quota(codes, page, order, within, different, at_most):
    left, taken = list(order), []
    end = min(within, len(order))
    while left and len(taken) < end:
        values = [codes[page.rows[place]] for place in taken]
        new = [place for place in left if codes[page.rows[place]] not in values]
        room = [place for place in left if values.count(codes[page.rows[place]]) < at_most]
        due = different - len(set(values)) >= end - len(taken)
        taken.append((new if due and new else room or left)[0])
        left.remove(taken[-1])
    return taken + left


def plain_deduplicate(release, page, order, variants, titles, held=()):
    items = release.items

    def same_title(one, other):
        mine, others = items.sketches[page.rows[one]], items.sketches[page.rows[other]]
        if not mine.any() or not others.any():
            return False
        bands = (mine.reshape(-1, 4) == others.reshape(-1, 4)).all(1).any()
        return bool(bands) and int((mine == others).sum()) >= round(titles * 32)

    kept = [place for place in order if place in held]
    for place in order:
        if place in held:
            continue
        product = items.products[page.rows[place]]
        if variants and any(items.products[page.rows[other]] == product for other in kept):
            continue
        if titles is not None and any(same_title(place, other) for other in kept):
            continue
        kept.append(place)
    return [place for place in order if place in kept]


def plain_settle(order, fixed):
    """Positions from 1 → places."""
    left, answer = [place for place in order if place not in fixed.values()], []
    behind = [fixed[at] for at in sorted(fixed)]
    for position in range(1, len(order) + 1):
        waiting = [place for place in behind if place not in answer]
        if position in fixed and fixed[position] not in answer:
            answer.append(fixed[position])
        elif left and len(order) - position >= len(waiting):
            answer.append(left.pop(0))
        else:
            answer.append(waiting[0])
    return answer
