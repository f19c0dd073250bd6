"""Logs in many files, in an object store, on a real cluster of two workers: the same rows as polars in one process."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
import zipfile

import fsspec
import numpy as np
import polars as pl
import psutil
import pytest
from trirank_build.errors import BadData
from trirank_build.preparation import engines
from trirank_build.preparation.engines import DaskEngine
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.prepare import prepare
from trirank_build.preparation.sources import tables

DAY = 86_400
prepare_module = importlib.import_module("trirank_build.preparation.prepare")
START = 1_600_000_000 - 1_600_000_000 % DAY


def raw(rows=6_000, seed=0):
    """A log with something for every rule: duplicates, a bot, rare users and items, words and ids of no use."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(1, 120, rows),
            "item_id": rng.zipf(1.3, rows) % 400 + 1,
            "behavior": rng.choice(["pv", "cart", "buy"], rows),
            "timestamp": START + np.sort(rng.integers(0, 20 * DAY, rows)),
            "query": rng.choice(["", "chair", "blue table"], rows),
        }
    )
    bot = pl.DataFrame({"user_id": [999] * 80, "item_id": range(80), "behavior": ["pv"] * 80,
                        "timestamp": [START + 5 * DAY] * 80, "query": [""] * 80})  # fmt: skip
    frame = pl.concat([frame, frame.sample(300, seed=seed), bot], how="vertical_relaxed").sort("timestamp")
    strange = pl.int_range(pl.len()) % 97 == 0
    return frame.with_columns(behavior=pl.when(strange).then(pl.lit("wave")).otherwise("behavior"))


def in_parts(frame, folder, parts=5, form="parquet"):
    folder.mkdir()
    for number, at in enumerate(range(0, frame.height, -(-frame.height // parts))):
        part = frame.slice(at, -(-frame.height // parts))
        getattr(part, f"write_{form}")(folder / f"part-{number:03d}.{form}")
    (folder / "_SUCCESS").write_text("")
    return folder


def same(one, two):
    return (
        one.events.equals(two.events)
        and one.items.equals(two.items)
        and one.requests.collect().equals(two.requests.collect())
        and one.description.cleaning == two.description.cleaning
    )


OPTIONS = {"min_count": 3, "behaviours": {"wave": None}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "log.parquet"
    raw().write_parquet(path)
    found = prepare(str(path), PrepareOptions(**OPTIONS))
    rules = {rule: before - after for rule, before, after in found.description.cleaning}
    assert all(rules[rule] for rule in ("behaviours to be left out", "exact duplicate",
                                        "bot (over 60 events a minute)", "3-core"))  # fmt: skip
    return found


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_folder_of_files_is_one_log(whole, tmp_path, form):
    folder = in_parts(raw(), tmp_path / "log", form=form)
    assert same(prepare(str(folder), PrepareOptions(**OPTIONS)), whole)
    assert same(prepare(f"{folder}/part-*.{form}", PrepareOptions(**OPTIONS)), whole)


def test_an_object_store(whole, tmp_path):
    folder, store = in_parts(raw(), tmp_path / "log"), fsspec.filesystem("memory")
    for file in folder.iterdir():
        store.pipe(f"/shop/log/{file.name}", file.read_bytes())
    store.pipe("/shop/log/_temporary/0/part-000.parquet", b"half")
    assert same(prepare("memory://shop/log", PrepareOptions(**OPTIONS)), whole)
    assert same(prepare("memory://shop/log/part-*", PrepareOptions(**OPTIONS)), whole)
    assert same(prepare("memory://shop/lo*", PrepareOptions(**OPTIONS)), whole)  # of folders
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as packed:
        raw().write_csv(tmp_path / "log.csv")
        packed.write(tmp_path / "log.csv", "log.csv")
    assert same(prepare(f"zip://log.csv::{tmp_path}/log.zip", PrepareOptions(**OPTIONS)), whole)


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_large_file_is_read_by_pieces(whole, tmp_path, monkeypatch, form):
    monkeypatch.setattr(tables, "LARGE", 1_000)
    monkeypatch.setattr(tables, "ROWS", 700)
    monkeypatch.setattr("trirank_build.preparation.prepare.LARGE", 1_000)
    path = tmp_path / f"log.{form}"
    getattr(raw(), f"write_{form}")(path)
    assert same(prepare(str(path), PrepareOptions(**OPTIONS)), whole)


def test_tables_that_go_through_files(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_HELD", 10_000)
    assert same(prepare(str(in_parts(raw(), tmp_path / "log")), PrepareOptions(**OPTIONS)), whole)


def test_what_parts_lose_counts_together(tmp_path):
    """A file with many unknown words is no reason to stop where the whole log has few."""
    frame = raw().with_columns(
        behavior=pl.when(pl.int_range(pl.len()) < 66).then(pl.lit("wave")).otherwise(pl.lit("pv"))
    )
    folder = in_parts(frame, tmp_path / "log", parts=40)
    with pytest.raises(BadData, match=r"unknown behaviours: 66 of 6,380, 'wave' .* That is more than 1%"):
        prepare(str(folder), PrepareOptions(max_loss=0.01))
    found = prepare(str(folder), PrepareOptions(max_loss=0.02))
    (line,) = [line for line in found.description.notes["read"] if line.startswith("unknown behaviours")]
    assert "of 6,380" in line


def test_strange_ids_in_a_later_part_are_no_silence(tmp_path):
    folder = in_parts(raw().with_columns(pl.col("item_id").cast(pl.String)), tmp_path / "log")
    part = pl.read_parquet(folder / "part-003.parquet")
    part.with_columns(pl.lit("sku-").add(pl.col("item_id")).alias("item_id")).head(90).write_parquet(
        folder / "part-003.parquet"
    )
    with pytest.raises(BadData, match=r"90 of .* item ids are no plain numbers, such as 'sku-.*--item-ids strings"):
        prepare(str(folder), PrepareOptions(**OPTIONS))
    kept = prepare(str(folder), PrepareOptions(item_ids="numbers", **OPTIONS))
    assert kept.description.ids["item"] == "numbers"


def test_parts_to_which_nothing_fell(whole, tmp_path):
    folder = in_parts(raw(), tmp_path / "log")
    for number in (0, 3):
        raw().head(0).write_parquet(folder / f"part-{number:03d}-empty.parquet")
    raw().head(0).write_parquet(folder / "a-first-one.parquet")
    assert same(prepare(str(folder), PrepareOptions(**OPTIONS)), whole)
    for file in folder.glob("part-0*[0-9].parquet"):
        file.unlink()
    with pytest.raises(BadData, match="has a header but no row"):
        prepare(str(folder), PrepareOptions(**OPTIONS))


def test_large_files_of_other_kinds(tmp_path, monkeypatch):
    for module in (tables, prepare_module):
        monkeypatch.setattr(module, "LARGE", 100)
    (tmp_path / "sequences.txt").write_text("\n".join("1 2 3 4 5 6 7 8" for _ in range(40)))
    assert prepare(str(tmp_path / "sequences.txt"), PrepareOptions()).events.height == 280
    raw().with_columns(query=pl.lit("Stühle")).write_csv(tmp_path / "log.csv")
    text = "\n\n" + (tmp_path / "log.csv").read_text()
    (tmp_path / "blank.csv").write_text(text)
    assert prepare(str(tmp_path / "blank.csv"), PrepareOptions(**OPTIONS)).events.height > 1_000
    (tmp_path / "latin.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadData, match="Say --encoding latin-1"):
        prepare(str(tmp_path / "latin.csv"), PrepareOptions(**OPTIONS))
    assert prepare(str(tmp_path / "latin.csv"), PrepareOptions(encoding="latin-1", **OPTIONS)).events.height > 1_000
    with pytest.raises(BadData, match="--engine is for logs with a header or in Parquet"):
        prepare(str(tmp_path / "sequences.txt"), PrepareOptions(engine="dask://127.0.0.1:1"))


def test_what_is_no_log(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, told in (
        (tmp_path / "empty", "is a folder without a file of a log"),
        (tmp_path / "nothing", "is no file; give a CSV"),
        ("nosuch://shop/log", "cannot be read .*nosuch"),
        ("memory://no/such", "is no file; give a CSV"),
    ):
        with pytest.raises(BadData, match=told):
            prepare(str(source), PrepareOptions())
    folder = in_parts(raw(), tmp_path / "log")
    pl.read_parquet(folder / "part-002.parquet").drop("timestamp").write_parquet(folder / "part-002.parquet")
    with pytest.raises(BadData, match="part-002.parquet has no column timestamp, unlike the first file"):
        prepare(str(folder), PrepareOptions())
    with pytest.raises(BadData, match="--engine spark is none; say polars, or dask://HOST:PORT"):
        prepare(str(folder), PrepareOptions(engine="spark"))


class Cluster:
    """A scheduler and two workers, each a process of its own."""

    def __init__(self, folder):
        told, place = folder / "scheduler.json", ["--scheduler-file", str(folder / "scheduler.json")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
        quiet["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
        dask = [sys.executable, "-m", "dask"]
        self.scheduler = subprocess.Popen(
            [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", *place], **quiet
        )
        self.workers = [
            subprocess.Popen(
                [*dask, "worker", "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard", "--no-nanny", *place],
                **quiet,
            )
            for _ in range(2)
        ]
        deadline = time.monotonic() + 60
        from distributed import Client

        while not told.is_file() or not told.read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with Client(scheduler_file=str(told), set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            self.address = client.scheduler.address.replace("tcp://", "dask://")

    def close(self):
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    yield found
    found.close()


def test_a_cluster_leaves_the_same_rows(whole, cluster, tmp_path):
    workers = [psutil.Process(process.pid).cpu_times() for process in cluster.workers]
    # From sixteen parts on a join on items leaves rows by item: what then looks at users has to have them together.
    folder = in_parts(raw(), tmp_path / "log", parts=40)
    found = prepare(str(folder), PrepareOptions(engine=cluster.address, **OPTIONS))
    assert same(found, whole)
    now = [psutil.Process(process.pid).cpu_times() for process in cluster.workers]
    assert all(after.user > before.user for before, after in zip(workers, now, strict=True))


def test_a_cluster_reads_names_as_ids_and_csv(cluster, tmp_path):
    named = raw().with_columns(pl.format("sku-{}", "item_id").alias("item_id"))
    folder = in_parts(named, tmp_path / "log", form="csv")
    one, two = (prepare(str(folder), PrepareOptions(engine=engine, **OPTIONS)) for engine in (None, cluster.address))
    assert same(one, two)
    assert one.items["key"].str.starts_with("sku-").all()


def test_a_cluster_tells_what_files_are_damaged(cluster, tmp_path):
    folder = in_parts(raw(), tmp_path / "log")
    (folder / "part-003.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadData, match=r"part-003.parquet cannot be read as a table"):
        prepare(str(folder), PrepareOptions(engine=cluster.address, **OPTIONS))


def test_a_cluster_keeps_no_order_of_rows(cluster, tmp_path):
    folder = in_parts(raw().drop("timestamp"), tmp_path / "log")
    with pytest.raises(BadData, match="has no timestamps, so its order is that of its rows"):
        prepare(str(folder), PrepareOptions(engine=cluster.address))


@pytest.mark.parametrize("lost", ["scheduler", "workers"])
def test_a_cluster_that_goes_away_in_the_middle(tmp_path, monkeypatch, lost):
    (tmp_path / "cluster").mkdir()
    going = Cluster(tmp_path / "cluster")
    plain, count = DaskEngine.keep, iter(range(100))

    def keep(self, frame):
        if next(count) == 1:
            for process in going.workers if lost == "workers" else [going.scheduler]:
                threading.Timer(0.05, process.kill).start()
            time.sleep(0.5)
        return plain(self, frame)

    monkeypatch.setattr(DaskEngine, "keep", keep)
    monkeypatch.setattr(engines, "LOST_S", 3.0)
    folder = in_parts(raw(), tmp_path / "log")
    try:
        with pytest.raises(BadData, match=r"the cluster dask://.* went away in the middle .*; nothing was written"):
            prepare(str(folder), PrepareOptions(engine=going.address, **OPTIONS))
    finally:
        going.close()


def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "CONNECT_S", 1.0)
    folder = in_parts(raw(), tmp_path / "log")
    with pytest.raises(BadData, match=r"the cluster dask://127.0.0.1:9 cannot be reached .*`dask scheduler`"):
        prepare(str(folder), PrepareOptions(engine="dask://127.0.0.1:9"))
