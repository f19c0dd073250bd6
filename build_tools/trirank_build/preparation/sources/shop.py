"""A synthetic shop: a seeded world whose choices come from a known model, so that the best ranking is known.

The choice model. Known customers belong to one of KINDS kinds, which nobody is told and which their history betrays.
A customer of kind k looks at item i at time t with query q. The utility is

    U = brand_affinity[k, brand(i)]                                        normal(0, BRAND)
      + category_affinity[k, category(i)]                                  normal(0, CATEGORY)
      + INTEREST · [category(i) is what this customer is after in this week]
      − PRICE · sensitivity[k] · |log price(i) − log budget[k]|            sensitivity: uniform(0.5, 1.5)
      + quality[product(i)]                                                normal(0, QUALITY)
      + MATCH · [the words of q beyond the category fit i]                 searches only

and choices are drawn independently: click ~ sigmoid(SLOPE · (U − CLICK_AT)); a cart, given a click, ~
sigmoid(SLOPE · (U − CART_AT)); a purchase, given a cart, with probability BUY. Of an anonymous visitor nothing is
known, and nothing sways the choice that could not be: kind 0 stands for the average customer, without affinities
and interest. The expected gain grows with U, so ordering by U is the best possible ranking; requests keep it in the
column ``utility``, and the NDCG of that order is the highest that any ranker can be expected to reach. Display order
is drawn at random, so clicks carry no position bias. Popularity and retrieval know nothing of U but a noisy part
of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from trirank.contract import ANONYMOUS_USER, Behaviour

from trirank_build.data.dataset import GAINS, OPTIMUM, TASKS, Dataset, Description
from trirank_build.preparation.splitting import times_of, with_split
from trirank_build.progress import progress

KINDS = 8
BRAND, CATEGORY, QUALITY = 1.3, 0.8, 0.5
INTEREST, PRICE, MATCH = 0.4, 0.8, 2.0
SLOPE, CLICK_AT, CART_AT, BUY = 1.6, 3.0, 3.4, 0.6

START = 1_767_225_600  # 2026-01-01
DAYS = 60
DAY_S = 86_400
_CHUNK = 500
"""Sessions that are drawn at a time."""
ANONYMOUS_SHARE, SEARCH_SHARE, NEW_ITEM_SHARE = 0.2, 0.45, 0.15

NOUNS = (
    "running shoes", "rain jacket", "backpack", "water bottle", "yoga mat", "headphones", "desk lamp", "office chair",
    "coffee grinder", "frying pan", "chef knife", "bed linen", "bath towel", "garden hose", "cordless drill",
    "tool box", "phone case", "keyboard", "monitor stand", "board game", "puzzle", "baby blanket", "dog leash",
    "bicycle helmet",
)  # fmt: skip
BRANDS = (
    "Alder", "Brightwell", "Cobalt", "Dunmore", "Everly", "Fjord", "Granite", "Harbor", "Ivory", "Juniper",
    "Kestrel", "Lumen", "Maple", "Northway", "Orchard", "Pinecrest", "Quarry", "Ridgeline", "Solstice", "Thistle",
    "Umber", "Vantage", "Willow", "Yarrow", "Zephyr", "Aster", "Beacon", "Cinder", "Drift", "Ember",
)  # fmt: skip
STYLES = (
    "classic", "compact", "premium", "everyday", "outdoor", "slim", "heavy duty", "lightweight", "foldable", "modern",
    "vintage", "kids",
)  # fmt: skip
SELLERS = ("Harbour Trade", "Nordlicht", "Quick & Co", "Casa Verde", "Old Mill", "Blue Door")
COLOURS = ("black", "white", "red", "blue", "green", "grey", "yellow", "brown")


@dataclass(frozen=True)
class ShopSize:
    """How much of it."""

    products: int = 1_600
    users: int = 2_500
    requests: int = 48_000
    candidates: int = 50


@dataclass(frozen=True)
class _World:
    """What is true, and what only the generator knows. Arrays over items [M] or users [U]."""

    brand: NDArray[np.int64]
    category: NDArray[np.int64]
    style: NDArray[np.int64]
    colour: NDArray[np.int64]
    product: NDArray[np.int64]
    log_price: NDArray[np.float64]
    quality: NDArray[np.float64]
    created: NDArray[np.int64]
    demand: NDArray[np.float64]
    kind: NDArray[np.int64]  # [U] 1 … KINDS
    brand_affinity: NDArray[np.float64]  # [1 + KINDS, brands]
    category_affinity: NDArray[np.float64]  # [1 + KINDS, categories]
    interest: NDArray[np.int64]  # [U, weeks] category
    budget: NDArray[np.float64]  # [1 + KINDS] log
    sensitivity: NDArray[np.float64]  # [1 + KINDS]


@dataclass(frozen=True)
class _Sessions:
    """Who looks when for what; arrays over requests [B]. ``extra`` says which of ``word`` [B, 3] the query has."""

    when: NDArray[np.int64]
    user: NDArray[np.int64]
    anonymous: NDArray[np.bool_]
    search: NDArray[np.bool_]
    category: NDArray[np.int64]
    extra: NDArray[np.int64]
    word: NDArray[np.int64]

    def part(self, rows: slice) -> _Sessions:
        """Some of them."""
        return _Sessions(*(getattr(self, field.name)[rows] for field in fields(self)))


def make_shop(size: ShopSize, seed: int) -> Dataset:
    """The shop as a dataset; the same seed gives the same bytes."""
    return Shop(size, seed).dataset()


@dataclass(frozen=True)
class Visits:
    """Customers who come and look at what retrieval finds, B of them with N candidates, the earliest first.

    Attributes:
        when: [B] seconds since 1970; user: [B], ANONYMOUS_USER among them.
        items, scores: [B, N] ids and retrieval scores, best first.
        click, cart: [B, N] chances of a click if the item is looked at, and of a cart given a click.
    """

    when: NDArray[np.int64]
    user: NDArray[np.int64]
    query: list[str]
    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    click: NDArray[np.float64]
    cart: NDArray[np.float64]

    def reordered(self, order: NDArray[np.int64]) -> Visits:
        """The same candidates in another order [B, N]."""
        rows = np.arange(len(order))[:, None]
        items, scores, click, cart = (
            self.items[rows, order], self.scores[rows, order], self.click[rows, order], self.cart[rows, order]
        )  # fmt: skip
        return replace(self, items=items, scores=scores, click=click, cart=cart)


class Shop:
    """The world behind a dataset, for whoever wants to go on living in it."""

    def __init__(self, size: ShopSize, seed: int) -> None:
        self._size, self._seed = size, seed
        self._rng = np.random.default_rng(seed)
        self._world = _make_world(size, self._rng)

    def dataset(self) -> Dataset:
        """What happened in the first DAYS days."""
        return _dataset(self._world, self._size, self._seed, self._rng)

    def visits(self, count: int, seed: int, first_day: int, days: int) -> Visits:
        """Customers of later days, the same for the same seed."""
        rng = np.random.default_rng([self._seed, seed])
        sessions = _draw_sessions(self._world, self._size, rng, count, first_day, days)
        parts = []
        for start in range(0, count, _CHUNK):
            some = sessions.part(slice(start, min(start + _CHUNK, count)))
            items, scores = _retrieve(self._world, self._size, rng, some)
            parts.append((items, scores, _utility(self._world, items, some)))
        items, scores, utility = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Visits(
            when=sessions.when,
            user=np.where(sessions.anonymous, ANONYMOUS_USER, sessions.user + 1),
            query=_queries(sessions),
            items=items + 1,
            scores=scores.astype(np.float32),
            click=_sigmoid(SLOPE * (utility - CLICK_AT)),
            cart=_sigmoid(SLOPE * (utility - CART_AT)),
        )


def _dataset(world: _World, size: ShopSize, seed: int, rng: np.random.Generator) -> Dataset:
    requests = _draw_requests(world, size, rng)
    events = _events_of(requests)
    valid_from, test_from = times_of(requests)
    items = _item_table(world)
    return Dataset(
        items=items,
        events=with_split(events, valid_from, test_from),
        requests=with_split(requests, valid_from, test_from)
        .with_columns(missed=pl.lit([], dtype=pl.List(pl.Float32)))
        .lazy(),
        description=Description(
            source=f"synthetic shop, seed {seed}",
            timed=True,
            tasks=TASKS,
            counts={"items": items.height, "events": events.height, "requests": requests.height},
            cleaning=[],
            notes={"seed": seed, "valid_from": valid_from, "test_from": test_from},
        ),
    )


def _make_world(size: ShopSize, rng: np.random.Generator) -> _World:
    variants = rng.integers(1, 4, size=size.products)
    product = np.repeat(np.arange(size.products), variants)
    items = len(product)
    place = np.arange(items) - np.repeat(np.cumsum(variants) - variants, variants)
    category_p = rng.integers(len(NOUNS), size=size.products)
    base_price = np.log(rng.uniform(15, 150, size=len(NOUNS)))[category_p] + rng.normal(0, 0.5, size.products)
    quality = rng.normal(0, QUALITY, size.products)
    created_p = np.where(
        rng.random(size.products) < NEW_ITEM_SHARE,
        START + rng.integers(DAYS * DAY_S, size=size.products),
        START - rng.integers(1, 600 * DAY_S, size=size.products),
    )
    weeks = DAYS // 7 + 1
    return _World(
        brand=rng.integers(len(BRANDS), size=size.products)[product],
        category=category_p[product],
        style=rng.integers(len(STYLES), size=size.products)[product],
        colour=(rng.integers(len(COLOURS), size=size.products)[product] + place) % len(COLOURS),
        product=product,
        log_price=np.round(base_price, 2)[product],
        quality=quality[product],
        created=created_p[product],
        demand=1.0 * quality[product] + rng.normal(0, 0.7, items),
        kind=rng.integers(1, 1 + KINDS, size=size.users),
        brand_affinity=_of_kinds(rng.normal(0, BRAND, (KINDS, len(BRANDS))), 0),
        category_affinity=_of_kinds(rng.normal(0, CATEGORY, (KINDS, len(NOUNS))), 0),
        interest=rng.integers(len(NOUNS), size=(size.users, weeks)),
        budget=_of_kinds(rng.normal(np.log(60), 0.5, KINDS), np.log(60)),
        sensitivity=_of_kinds(rng.uniform(0.5, 1.5, KINDS), 1.0),
    )


def _of_kinds(drawn: NDArray[np.float64], average: float) -> NDArray[np.float64]:
    """[KINDS, …] → [1 + KINDS, …], the average customer's first."""
    return np.concatenate([np.full((1, *drawn.shape[1:]), average), drawn])


def _draw_requests(world: _World, size: ShopSize, rng: np.random.Generator) -> pl.DataFrame:
    n = size.requests
    sessions = _draw_sessions(world, size, rng, n, 0, DAYS)
    columns: dict[str, list[Any]] = {name: [] for name in ("item_ids", "retrieval_scores", "labels", OPTIMUM)}
    with progress() as bar:
        task = bar.add_task("drawing sessions", total=n)
        for start in range(0, n, _CHUNK):
            part = slice(start, min(start + _CHUNK, n))
            some = sessions.part(part)
            items, scores = _retrieve(world, size, rng, some)
            utility = _utility(world, items, some)
            chance = _sigmoid(SLOPE * (utility - CLICK_AT))
            click = rng.random(items.shape) < chance
            cart = click & (rng.random(items.shape) < _sigmoid(SLOPE * (utility - CART_AT)))
            purchase = cart & (rng.random(items.shape) < BUY)
            labels = np.select([purchase, cart, click], [GAINS["PURCHASE"], GAINS["CART"], GAINS["CLICK"]], 0.0).astype(
                np.float32
            )
            for name, values in (
                ("item_ids", items + 1),
                ("retrieval_scores", scores.astype(np.float32)),
                ("labels", labels),
                (OPTIMUM, utility.astype(np.float32)),
            ):
                columns[name].append(pl.Series(name, values).arr.to_list())
            bar.advance(task, items.shape[0])
    return pl.DataFrame(
        {
            "user_id": np.where(sessions.anonymous, ANONYMOUS_USER, sessions.user + 1),
            "timestamp": sessions.when,
            "query": pl.Series(_queries(sessions)),
            "scenario": np.where(sessions.search, "search", "home"),
            **{name: pl.concat(parts) for name, parts in columns.items()},
        }
    )


def _draw_sessions(
    world: _World, size: ShopSize, rng: np.random.Generator, n: int, first_day: int, days: int
) -> _Sessions:
    activity = rng.zipf(1.8, size.users).clip(max=30).astype(float)
    user = rng.choice(size.users, n, p=activity / activity.sum())
    anonymous = rng.random(n) < ANONYMOUS_SHARE
    day = rng.integers(days, size=n)
    second = np.clip(rng.normal(17 * 3600, 4 * 3600, n), 0, DAY_S - 1).astype(np.int64)
    order = np.argsort(when := START + (first_day + day) * DAY_S + second, kind="stable")
    when, user, anonymous = when[order], user[order], anonymous[order]
    search = rng.random(n) < SEARCH_SHARE
    # People search for what they are after, most of the time.
    after = world.interest[user, _week(world, when)]
    category = np.where(rng.random(n) < 0.6, after, rng.integers(len(NOUNS), size=n))
    extra = rng.integers(4, size=n)  # nothing, a colour, a style, a brand
    word = np.stack([rng.integers(len(w), size=n) for w in (COLOURS, STYLES, BRANDS)], 1)

    return _Sessions(when, user, anonymous, search, category, extra, word)


def _week(world: _World, when: NDArray[np.int64]) -> NDArray[np.int64]:
    """Column of ``interest``; after the last week they come round again."""
    weeks: NDArray[np.int64] = (when - START) // (7 * DAY_S) % world.interest.shape[1]
    return weeks


def _queries(sessions: _Sessions) -> list[str]:
    """What each customer typed; empty: nothing."""
    n = len(sessions.when)
    word, extra = sessions.word, sessions.extra
    words = np.stack([np.full(n, ""), *(np.array(w)[word[:, at]] for at, w in enumerate((COLOURS, STYLES, BRANDS)))], 1)
    prefix = words[np.arange(n), extra].astype(object)
    query = np.where(sessions.search, (prefix + " " + np.array(NOUNS, object)[sessions.category]), "")
    return [str(text).strip().lower() for text in query]


def _retrieve(
    world: _World, size: ShopSize, rng: np.random.Generator, sessions: _Sessions
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[B, N] item numbers and scores, best first: what a plain candidate generator finds."""
    shape = (len(sessions.when), len(world.product))
    score = world.demand[None, :] + rng.normal(0, 0.8, shape)
    in_category = world.category[None, :] == sessions.category[:, None]
    score += np.where(
        sessions.search[:, None],
        6.0 * in_category,
        0.5 * world.category_affinity[_kinds(world, sessions)][:, world.category],
    )
    score += np.where(sessions.search[:, None], 0.8 * _matches(world, sessions), 0)
    score[world.created[None, :] > sessions.when[:, None]] = -np.inf
    top = np.argpartition(-score, size.candidates, axis=1)[:, : size.candidates]
    values = np.take_along_axis(score, top, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(top, order, 1), np.take_along_axis(values, order, 1)


def _kinds(world: _World, sessions: _Sessions) -> NDArray[np.int64]:
    """[B] kind of customer; 0: anonymous."""
    return np.where(sessions.anonymous, 0, world.kind[sessions.user])


def _matches(world: _World, sessions: _Sessions) -> NDArray[np.bool_]:
    """[B, M]: whether an item fits the query's words beyond the category."""
    kinds = (world.colour, world.style, world.brand)
    fits = np.zeros((len(sessions.extra), len(world.product)), bool)
    for at, values in enumerate(kinds):
        fits |= (sessions.extra == at + 1)[:, None] & (values[None, :] == sessions.word[:, at, None])
    return fits


def _utility(world: _World, items: NDArray[np.int64], sessions: _Sessions) -> NDArray[np.float64]:
    """[B, N]; see the top of this file."""
    who = _kinds(world, sessions)[:, None]
    after = world.interest[sessions.user, _week(world, sessions.when)]
    fits = np.take_along_axis(_matches(world, sessions), items, 1)
    distance = np.abs(world.log_price[items] - world.budget[who])
    utility: NDArray[np.float64] = (
        world.brand_affinity[who, world.brand[items]]
        + world.category_affinity[who, world.category[items]]
        + INTEREST * (world.category[items] == after[:, None]) * (who > 0)
        - PRICE * world.sensitivity[who] * distance
        + world.quality[items]
        + MATCH * (fits & sessions.search[:, None])
    )
    return utility


def _events_of(requests: pl.DataFrame) -> pl.DataFrame:
    """The interactions of known users: one row a click, cart or purchase, some seconds after the request."""
    behaviours = {Behaviour.CLICK: 1, Behaviour.CART: 2, Behaviour.PURCHASE: 3}
    chosen = (
        requests.filter(pl.col("user_id") != ANONYMOUS_USER)
        .select("user_id", "timestamp", "item_ids", "labels")
        .explode("item_ids", "labels")
        .filter(pl.col("labels") > 0)
    )
    return pl.concat(
        [
            chosen.filter(pl.col("labels") >= gain).select(
                "user_id",
                pl.col("item_ids").alias("item_id"),
                pl.lit(behaviour.value, pl.Int8).alias("behaviour"),
                pl.col("timestamp") + 20 * gain,
            )
            for behaviour, gain in behaviours.items()
        ]
    ).sort("timestamp", "user_id", "item_id", "behaviour")


def _item_table(world: _World) -> pl.DataFrame:
    items = len(world.product)
    beside = np.random.default_rng(items)  # what no choice depends on
    names = [
        np.array(words)[index]
        for words, index in (
            (BRANDS, world.brand),
            (STYLES, world.style),
            (NOUNS, world.category),
            (COLOURS, world.colour),
        )
    ]
    return pl.DataFrame(
        {
            "item_id": np.arange(1, items + 1),
            "key": [str(i) for i in range(1, items + 1)],
            "title": [" ".join(parts) for parts in zip(*names, strict=True)],
            "brand": names[0],
            "category": names[2],
            "price": np.round(np.exp(world.log_price), 2),
            "product_id": world.product,
            "created_at": world.created,
            "attributes": pl.Series([[]] * items, dtype=pl.List(pl.String)),
            "available": np.ones(items, bool),
            "seller": np.array(SELLERS)[beside.integers(len(SELLERS), size=items)],
            "margin": np.round(beside.uniform(0.05, 0.5, items), 3),
            "regions": pl.Series([[]] * items, dtype=pl.List(pl.String)),
        }
    )


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))
