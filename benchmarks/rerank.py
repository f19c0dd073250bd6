"""What rules cost: 500 candidates to 50 at batch 16, and 500 ids looked up among ten million.

    python benchmarks/rerank.py

Times are of calls in process, one thread, in rounds that take turns; ``lookup`` shows what was tried beside what is
used. Memory is that of a second process that maps the same catalogue.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import psutil
from numpy.typing import NDArray
from results import Figure, write
from trirank_backend.attributes import Attributes
from trirank_backend.catalogue import Catalogue, read_only
from trirank_backend.handover import HEADER, Handover
from trirank_backend.lookup_kernels import find_rows
from trirank_backend.policies import Items, Policy, Release
from trirank_backend.rerank import Rerank
from trirank_backend.text import title_sketches
from trirank_build.preparation.sources.shop import BRANDS, COLOURS, NOUNS, STYLES

CANDIDATES, SHOWN, BATCH, ITEMS, ROUNDS = 500, 50, 16, 100_000, 30
MANY = 10_000_000
TITLES = (BRANDS, STYLES, NOUNS, COLOURS)
DEDUPLICATE = {"rule": "deduplicate", "titles": 0.9}
CAPS = [{"rule": "cap", "field": field, "at_most": 4, "window": 10} for field in ("brand", "category", "seller")]
POLICIES = {
    "plain": [],
    "mmr": [DEDUPLICATE, {"rule": "mmr"}, *CAPS],
    "dpp": [DEDUPLICATE, {"rule": "dpp"}, *CAPS],
    "deduplicate": [DEDUPLICATE],
    "caps": CAPS,
    "quota": [{"rule": "quota", "different": 5, "at_most": 3}],
    "explore": [{"rule": "explore", "younger_days": 30}],
    "boost": [{"rule": "boost", "brands": ["brand 3"], "by": 1.0}],
}
NOW = 1_770_000_000


def release(rng: np.random.Generator) -> Release:
    """Items as a shop has them: variants, brands of very different size, titles like those of the synthetic shop, of
    which many differ in a word."""
    base = rng.normal(size=(200, 32))
    vectors = base[rng.integers(200, size=ITEMS + 1)] + 0.5 * rng.normal(size=(ITEMS + 1, 32))
    vectors = np.round(127 * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.int8)
    chosen = [[words[at] for at in rng.integers(len(words), size=ITEMS + 1)] for words in TITLES]
    titles, of_item = np.unique([" ".join(words) for words in zip(*chosen, strict=True)], return_inverse=True)
    sketches = title_sketches(titles.tolist())[of_item]
    categories = np.array([NOUNS.index(noun) for noun in chosen[TITLES.index(NOUNS)]], np.int32)
    code = lambda count: (rng.zipf(1.5, ITEMS + 1) % count).astype(np.int32)  # noqa: E731
    catalogue = Catalogue(
        ids=np.arange(ITEMS), fields=np.zeros((ITEMS + 1, 4), np.int32), dense=np.zeros((ITEMS + 1, 4), np.float32),
        products=np.append(rng.integers(0, ITEMS // 2, ITEMS), -1).astype(np.int32),
        created_at=NOW - rng.integers(0, 90 * 86_400, ITEMS + 1), signals=np.zeros(ITEMS + 1, np.int32),
        titles=np.zeros((ITEMS + 1, 0), np.int32), trigrams=np.zeros((ITEMS + 1, 0), np.uint8),
    )  # fmt: skip
    names = {"brand": 500, "category": len(NOUNS), "seller": 100}
    attributes = Attributes(
        prices=rng.uniform(1, 100, ITEMS + 1).astype(np.float32), margins=np.zeros(ITEMS + 1, np.float32),
        brands=code(500), categories=categories, sellers=code(100), regions=np.ones(ITEMS + 1, np.uint64),
        vectors=vectors, sketches=sketches,
        names={kind: [f"{kind} {at}" for at in range(count)] for kind, count in names.items()} | {"region": ["de"]},
    )  # fmt: skip
    return Release(Items.of(catalogue, attributes), attributes, ("click",))


def requests(
    rng: np.random.Generator, policy: int, categories: NDArray[np.int32]
) -> list[tuple[NDArray[np.float32], Handover]]:
    """A batch of different requests: candidates from anywhere, as on a home page, and from one category, as of a
    search, in turns."""
    found = []
    for number in range(BATCH):
        header = np.zeros(1, HEADER)
        header["top_k"], header["policy"], header["moment"] = SHOWN, policy, NOW
        header["min_price"], header["max_price"], header["seed"] = -np.inf, np.inf, 7
        place = np.flatnonzero(categories[:ITEMS] == number) if number % 2 else np.arange(ITEMS)
        rows = rng.choice(place, (1, CANDIDATES), replace=False).astype(np.int32)
        handover = Handover(header, rows, np.zeros_like(rows), np.zeros((1, 0), np.float32), np.zeros((1, 0), np.int64))
        found.append((rng.normal(size=(1, CANDIDATES, 1)).astype(np.float32), handover))
    return found


def policies() -> list[Figure]:
    """Microseconds a request of each policy, and what it costs beyond the plain one."""
    rng = np.random.default_rng(0)
    rules = {name: Policy.model_validate({"rules": own}) for name, own in POLICIES.items()}
    shop = release(rng)
    rerank = Rerank(shop, rules)
    batches = {name: [requests(rng, at, shop.items.categories) for _ in range(4)] for at, name in enumerate(rules)}
    for batch in batches.values():
        rerank(*batch[0][0])
    took: dict[str, list[float]] = {name: [] for name in rules}
    for number in range(ROUNDS):
        for name, batch in batches.items():
            started = time.perf_counter()
            for request in batch[number % 4]:
                rerank(*request)
            took[name].append((time.perf_counter() - started) * 1e6 / BATCH)
    note = f"{CANDIDATES} candidates to {SHOWN}, a request in a batch of {BATCH}"
    beyond = {name: np.subtract(times, took["plain"]) for name, times in took.items() if name != "plain"}
    return [
        *(spread(f"{name}_us_b{BATCH}", times, "us", f"{note}; {told(name)}") for name, times in took.items()),
        *(spread(f"{name}_beyond_plain_us", times, "us", note) for name, times in beyond.items()),
    ]


def told(name: str) -> str:
    """The rules of a policy, for a note."""
    return ", ".join(str(rule["rule"]) for rule in POLICIES[name]) or "the ranker's order"


@numba.njit
def one_by_one(ids: NDArray[np.int64], wanted: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
    """One binary search after the other."""
    for at in range(len(wanted)):
        place = np.searchsorted(ids, wanted[at])
        rows[at] = place if place < len(ids) and ids[place] == wanted[at] else -1


@numba.njit
def hash_table(ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """Open addressing, half full."""
    size = 1
    while size < 2 * len(ids):
        size *= 2
    slots = np.full(size, -1, np.int32)
    for row in range(len(ids)):
        slot = np.int64((np.uint64(ids[row]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & (size - 1)
        while slots[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        slots[slot] = row
    return slots


@numba.njit
def by_hash(
    ids: NDArray[np.int64], slots: NDArray[np.int32], wanted: NDArray[np.int64], rows: NDArray[np.int32]
) -> None:
    """Rows by the table."""
    mask = len(slots) - 1
    for at in range(len(wanted)):
        slot = np.int64((np.uint64(wanted[at]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
        while slots[slot] >= 0 and ids[slots[slot]] != wanted[at]:
            slot = (slot + 1) & mask
        rows[at] = slots[slot]


def lookups() -> list[Figure]:
    """Microseconds for 500 ids among ten million, a tenth of them unknown, in three ways."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ids.npy")
        np.save(file, np.unique(rng.integers(0, 2**62, MANY + 1_000))[:MANY])
        ids = read_only(np.load(file, mmap_mode="r").view(np.ndarray))
        slots = hash_table(ids)
        wanted = [np.append(rng.choice(ids, 450), rng.integers(0, 2**62, 50)) for _ in range(900)]
        found, rows = read_only(wanted[0]), np.empty(CANDIDATES, np.int32)
        ways: dict[str, Callable[[NDArray[Any]], None]] = {
            "lookup": lambda each: find_rows(ids, read_only(each), rows),
            "one_by_one": lambda each: one_by_one(ids, read_only(each), rows),
            "hash": lambda each: by_hash(ids, slots, each, rows),
        }
        answers = []
        for way in ways.values():
            way(found)
            answers.append(rows.copy())
        assert all((answer == answers[0]).all() for answer in answers)
        took: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(0, len(wanted), len(ways)):  # each way other ids: those of the one before are in the caches
            for name, each in zip(ways, wanted[number : number + len(ways)], strict=True):
                started = time.perf_counter()
                ways[name](each)
                took[name].append((time.perf_counter() - started) * 1e6)
        memory = second_process(file)
    words = {"lookup": "used", "one_by_one": "a binary search each", "hash": f"needs {slots.nbytes >> 20} MiB besides"}
    return [
        *(
            spread(f"{name}_us_{CANDIDATES}", times, "us", f"among {MANY:,} ids in random order; {words[name]}")
            for name, times in took.items()
        ),
        Figure("second_process_mib", memory, memory, memory, "MiB", f"of its own, of {ids.nbytes >> 20} MiB mapped"),
    ]


def second_process(file: Path) -> float:
    """MiB that another process takes of its own once it has looked 50,000 ids up."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(own_memory, (str(file),))


def own_memory(file: str) -> float:
    """Private memory that looking up costs this process."""
    ids = read_only(np.load(file, mmap_mode="r").view(np.ndarray))
    rows = np.empty(CANDIDATES, np.int32)
    find_rows(ids, read_only(np.zeros(CANDIDATES, np.int64)), rows)
    before = psutil.Process().memory_full_info().uss
    rng = np.random.default_rng(1)
    for _ in range(100):
        find_rows(ids, read_only(rng.integers(0, 2**62, CANDIDATES)), rows)
    return (psutil.Process().memory_full_info().uss - before) / 2**20


def spread(name: str, values: Any, unit: str, note: str) -> Figure:
    """Median, and the middle 95 %."""
    low, high = np.percentile(values, [2.5, 97.5])
    return Figure(name, float(np.median(values)), float(low), float(high), unit, note)


if __name__ == "__main__":
    found = [*policies(), *lookups()]
    for figure in found:
        print(f"{figure.name:28} {figure.value:9.2f} [{figure.low:.2f}, {figure.high:.2f}] {figure.unit}")
    write("rerank", found)
