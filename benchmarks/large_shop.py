"""A log of a large shop, drawn: as many items, users and events as are asked for, in files as a data lake has them.

    python benchmarks/large_shop.py FOLDER --items 10000000 --users 2000000 --events 100000000

Items have a category, and within it a popularity; users like a few categories, and after an item often take the next
one. So there is something to learn from ids, from content and from sequences. ``FOLDER/log/part-NNN.parquet`` is in
time order, ``FOLDER/items.parquet`` has titles, brands, categories and prices.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

START, DAYS = 1_760_000_000, 90
PART = 2_000_000
"""Events of a file."""
_ITEMS_AT_A_TIME = 500_000
LIKED, FAITHFUL, FOLLOWS = 3, 0.8, 0.35
"""Categories that a user likes; shares of events among those, and of events beside the one before."""


def make(folder: Path, items: int, users: int, events: int, seed: int = 0) -> None:
    """Write the shop, unless it is there."""
    if (folder / "done").is_file():
        return
    (folder / "log").mkdir(parents=True, exist_ok=True)
    (folder / "items").mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    categories = max(10, int(np.sqrt(items) * 1.5))
    _write_items(folder, items, categories, rng)
    user, item, when = _draw(items, users, events, categories, rng)
    order = np.argsort(when, kind="stable")
    kinds = np.array(["click", "cart", "purchase"])
    for number, at in enumerate(range(0, events, PART)):
        here = order[at : at + PART]
        kind = rng.choice(3, len(here), p=[0.85, 0.1, 0.05])
        pl.DataFrame(
            {
                "user_id": user[here].astype(np.int64), "item_id": item[here].astype(np.int64),
                "behavior": pl.Series(kinds[kind]), "timestamp": START + when[here].astype(np.int64),
            }
        ).write_parquet(folder / "log" / f"part-{number:03d}.parquet")  # fmt: skip
    (folder / "done").touch()


def _draw(
    items: int, users: int, events: int, categories: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, item and second of each event, a user's one after the other in time."""
    weight = rng.lognormal(0, 1.0, users)
    count = np.maximum(rng.poisson(weight / weight.sum() * events * 0.97), 1)
    user = np.repeat(np.arange(users, dtype=np.int32), count)[:events]
    user = np.append(user, rng.integers(0, users, events - len(user), dtype=np.int32))
    user.sort()
    size = items // categories
    liked = (categories * rng.random((users, LIKED)) ** 2).astype(np.int32)
    category = np.where(
        rng.random(events, np.float32) < FAITHFUL,
        liked[user, rng.integers(0, LIKED, events, dtype=np.int8)],
        rng.integers(0, categories, events, dtype=np.int32),
    )
    within = (size * rng.random(events, np.float32) ** 3).astype(np.int32)
    item = category * size + np.minimum(within, size - 1)
    follows = rng.random(events, np.float32) < FOLLOWS
    follows[0] = False
    follows[1:] &= user[1:] == user[:-1]
    # The item beside the one before; of a run of these each is counted from where the run began.
    begun = np.maximum.accumulate(np.where(follows, 0, np.arange(events, dtype=np.int32)))
    item = np.minimum(item[begun] + np.arange(events, dtype=np.int32) - begun, items - 1)
    when = rng.integers(0, DAYS * 86_400, events, dtype=np.int32)
    order = np.lexsort((when, user))
    return user, item.astype(np.int32), when[order]


def _write_items(folder: Path, items: int, categories: int, rng: np.random.Generator) -> None:
    words = np.array([f"{a}{b}{c}" for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("ra", "lo", "ti", "men", "sk")])
    size = items // categories
    parts = []
    for at in range(0, items, _ITEMS_AT_A_TIME):
        ids = np.arange(at, min(at + _ITEMS_AT_A_TIME, items))
        category = np.minimum(ids // size, categories - 1)
        chosen = np.stack([category % len(words), category // len(words) % len(words),
                           *rng.integers(0, len(words), (3, len(ids)))])  # fmt: skip
        title = pl.DataFrame({str(n): words[line] for n, line in enumerate(chosen)})
        parts.append(folder / "items" / f"{at:09d}.parquet")
        pl.DataFrame(
            {
                "item_id": ids,
                "title": title.select(pl.concat_str(pl.all(), separator=" ")).to_series(),
                "brand": pl.Series(rng.integers(0, max(items // 200, 5), len(ids))).cast(pl.String),
                "category": pl.Series(category).cast(pl.String),
                "price": np.round(rng.lognormal(3, 1, len(ids)), 2),
            }
        ).write_parquet(parts[-1])
    pl.scan_parquet(parts).sink_parquet(folder / "items.parquet")
    for part in parts:
        part.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for what, usual in (("items", 100_000), ("users", 20_000), ("events", 1_000_000)):
        parser.add_argument(f"--{what}", type=int, default=usual)
    given = parser.parse_args()
    make(given.folder, given.items, given.users, given.events)
