"""Ten million items, two million users, a hundred million events, on this machine: what each step takes.

    python benchmarks/scale.py [PART …] [--items N --users N --events N]

Parts: ``path`` (prepare, train, candidates, export, assemble, serve, rank; of a shop of the given size and one a
hundredth of it), ``steps`` (what of that was done), ``step`` (a training step at both sizes), ``libraries`` (searching
among the vectors of ``path``), ``cluster`` (the same rows from Dask), ``limit`` (a log of three times the memory it
is prepared and trained in), ``increment`` (a week's events against training anew), ``rates`` (of reading and cleaning).
All by default. A step is a process of its own, measured by its wall clock and its largest resident set; what is done is
not done again (work/benchmarks/scale).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import psutil
from large_shop import make
from results import ROOT, WORK, Figure, write
from serving import Rounds

FOLDER = WORK / "scale"
SMALL = 100
"""How much smaller the other shop is."""
RECIPE = """
name = "large"
[features]
history_length = 32
title_length = 8
[model]
encoder_blocks = 1
cross_blocks = 0
embedding = "low_rank"
embedding_rank = 16
embedding_updates = "rows"
[training]
epochs = 1
batch_size = 256
validation_requests = 2000
"""
STEPS = {
    "prepare": "cleaned, split, candidates for a sample of requests",
    "train": "one epoch on the sample, with the catalogue's features",
    "export": "",
    "assemble": "with an index of all items",
}


def run(arguments: list[str], log: Path) -> tuple[float, float]:
    """Seconds and GB of the largest resident set of a command of trirank's, the sum over its processes.

    Raises:
        RuntimeError: it failed.
    """
    begun, most = time.perf_counter(), 0
    with log.open("w") as out:
        process = psutil.Popen(
            [sys.executable, "-m", "trirank_build.cli", *arguments], stdout=out, stderr=out, cwd=ROOT
        )
        while process.poll() is None:
            with suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
                most = max(most, sum(one.memory_info().rss for one in family))
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed; see {log}")
    return time.perf_counter() - begun, most / 1e9


class Way:
    """The way from a log to a ranked answer, of one size."""

    def __init__(self, items: int, users: int, events: int) -> None:
        self.size = (items, users, events)
        self.folder = FOLDER / f"{items}_{users}_{events}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done = self.folder / "steps.json"
        self.steps: dict[str, dict] = json.loads(self.done.read_text()) if self.done.is_file() else {}

    def step(self, name: str, arguments: list[str]) -> None:
        """Do a step unless it was done."""
        if name in self.steps:
            return
        seconds, gigabytes = run(arguments, self.folder / f"{name}.log")
        self.note(name, {"seconds": seconds, "gb": gigabytes})

    def note(self, name: str, found: dict) -> None:
        self.steps[name] = found
        self.done.write_text(json.dumps(self.steps, indent=1))
        print(self.size[0], name, {key: round(value, 3) for key, value in found.items()}, flush=True)

    @property
    def release(self) -> Path:
        (found,) = [path for path in (self.folder / "releases").iterdir() if path.is_dir() and not path.is_symlink()]
        return found

    def make(self) -> None:
        """All steps up to a release."""
        shop, at = self.folder / "shop", str(self.folder)
        if not (shop / "done").is_file():  # in a process of its own, whose memory is not that of what follows
            subprocess.run([sys.executable, str(Path(__file__).with_name("large_shop.py")), str(shop),
                            *(f"--{what}={count}" for what, count in zip(("items", "users", "events"), self.size,
                                                                         strict=True))], check=True)  # fmt: skip
        (self.folder / "large.toml").write_text(RECIPE)
        self.step("prepare", ["data", "prepare", f"{shop}/log", "--items", f"{shop}/items.parquet", "--out",
                              f"{at}/data", "--max-train", "50000", "--max-eval", "5000"])  # fmt: skip
        self.step("train", ["train", f"{at}/large.toml", "--data", f"{at}/data", "--out", f"{at}/run"])
        self.step("export", ["export", "--run", f"{at}/run", "--out", f"{at}/ranker.onnx"])
        self.step("assemble", ["assemble", "--run", f"{at}/run", "--data", f"{at}/data", "--onnx", f"{at}/ranker.onnx",
                               "--out", f"{at}/releases", "--pipeline", "single", "--index",
                               "--allow-failing-gate"])  # fmt: skip

    def candidates(self) -> None:
        """Search the release's index as a service would."""
        if "candidates" in self.steps:
            return
        done = subprocess.run([sys.executable, __file__, "--search", str(self.release), str(self.folder / "data")],
                              capture_output=True, text=True, check=True)  # fmt: skip
        self.note("candidates", json.loads(done.stdout.splitlines()[-1]))


def search(release: Path, data: Path) -> None:
    """Print the times of a lone search, and what of the exact search it finds, both for users of the test split."""
    from trirank_backend.candidates import CandidateSource
    from trirank_build.data.dataset import Dataset

    begun = time.perf_counter()
    source = CandidateSource(release)
    opened = time.perf_counter() - begun
    events = Dataset.load(data).events
    users = events.filter(events["split"] == "test")["user_id"].unique(maintain_order=True).head(450)
    known = events.filter(events["user_id"].is_in(users.implode())).sort("user_id", "timestamp")
    histories = [part["item_id"].tail(32).to_numpy() for part in known.partition_by("user_id")]
    for one in histories[:50]:  # other users than those that are timed
        source.find([one], 100)
    times, found = [], []
    for one in histories[50:]:
        begun = time.perf_counter()
        found.append(source.find([one], 100).item_ids[0])
        times.append(time.perf_counter() - begun)
    memory = int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1]
    )
    facts = source.facts
    if facts["cells"]:  # all of them: what the cells hold, a byte a number
        source._search.nprobe = facts["cells"]
    exact = [source.find([one], 100).item_ids[0] for one in histories[50:110]]  # a second each
    recall = float(np.mean([len(np.intersect1d(one, two)) / 100 for one, two in zip(found, exact, strict=False)]))
    print(json.dumps({
        "ms": float(np.median(times) * 1e3), "ms_low": float(np.quantile(times, 0.05) * 1e3),
        "ms_high": float(np.quantile(times, 0.95) * 1e3), "recall": facts["recall_at_100"], "of_all_cells": recall,
        "probes": facts["probes"], "cells": facts["cells"], "opened_s": opened, "gb": memory / 1e6,
    }))  # fmt: skip


def path(sizes: tuple[int, int, int]) -> list[Figure]:
    """From a log to a ranked answer, at both sizes; the servers side by side, asked in turns."""
    from trirank import RankClient
    from trirank_build.serving.server import TritonServer

    large, small = Way(*sizes), Way(*(size // SMALL for size in sizes))
    for each in (small, large):
        each.make()
        each.candidates()
    found = Rounds()
    begun = time.perf_counter()
    with ExitStack() as running:
        one = running.enter_context(TritonServer(large.release))
        one.wait_ready()
        ready = time.perf_counter() - begun
        two = running.enter_context(TritonServer(small.release))
        two.wait_ready()
        family = [psutil.Process(one.pid), *psutil.Process(one.pid).children(recursive=True)]
        with RankClient(one.grpc, deadline_s=10) as first, RankClient(two.grpc, deadline_s=10) as second:
            for number in range(13):
                for name, client, each in (("large", first, large), ("small", second, small)):
                    took, requests = [], requests_of(each, number)  # other items in every round
                    for request in requests:
                        begun = time.perf_counter()
                        client.rank(request)
                        took.append(time.perf_counter() - begun)
                    if number:  # the first one warms up
                        found.note(f"serve_{name}_p50_ms", float(np.median(took)) * 1e3)
                if not number:
                    continue
                found.note("serve_ratio_10m_over_100k",
                           found.last("serve_large_p50_ms") / found.last("serve_small_p50_ms"))  # fmt: skip
        memory = sum(process.memory_full_info().pss for process in family) / 1e9
    large.note("serve", {"seconds": ready, "gb": memory})
    note = "200 candidates drawn anywhere, new ones in every round; one caller, both servers up, in turns"
    return [*found.figures(note), *steps(sizes)]


def steps(sizes: tuple[int, int, int]) -> list[Figure]:
    """What the steps took that were done."""
    large, small = Way(*sizes), Way(*(size // SMALL for size in sizes))
    items, users, events = sizes
    note = f"{items:,} items, {users:,} users, {events:,} events; a log in {events / 2e6:.0f} files"
    figures = []
    for each, name in ((large, "large"), (small, "small")):
        for step in ("prepare", "train", "export", "assemble", "serve"):
            if step in each.steps:
                seconds, gigabytes = (each.steps[step][what] for what in ("seconds", "gb"))
                figures += [Figure(f"{name}_{step}_seconds", seconds, seconds, seconds, "s", note),
                            Figure(f"{name}_{step}_gb", gigabytes, gigabytes, gigabytes, "GB", note)]  # fmt: skip
    peak = max(took["gb"] for took in large.steps.values())
    took = large.steps["candidates"]
    where = (f"{took['probes']:.0f} of {took['cells']:.0f} cells; 400 users of the test split, one at a time; of what "
             f"all cells would find for 60 of them, these find {took['of_all_cells']:.3f}")  # fmt: skip
    return [
        *figures, Figure("peak_gb", peak, peak, peak, "GB", note),
        Figure("retrieve_ms_10m", took["ms"], took["ms_low"], took["ms_high"], "ms", where),
        Figure("recall_at_100", took["recall"], took["recall"], took["recall"], "",
               "of the exact search, by states of the validation split that chose nothing"),
    ]  # fmt: skip


def requests_of(each: Way, seed: int, count: int = 40, candidates: int = 200) -> list:
    """Requests of users with a history, among items drawn anywhere in the catalogue."""
    from trirank import History, RankRequest

    items, rng = each.size[0], np.random.default_rng(seed)
    made = []
    for _ in range(count):
        past = rng.integers(0, items, 32)
        history = History(item_ids=past, behaviours=np.full(32, 2, np.int32), timestamps=np.arange(32) + 1_767_000_000)
        made.append(RankRequest(item_ids=rng.choice(items, candidates, replace=False), history=history, top_k=10,
                                timestamp=1_768_000_000))  # fmt: skip
    return made


def step(sizes: tuple[int, int, int]) -> list[Figure]:
    """A training step with tables of both sizes, in turns; and what the optimiser for all rows takes."""
    import torch
    from trirank_backend.features import FeatureSpec
    from trirank_build.models.family import make_ranker
    from trirank_build.recipe import load_recipe
    from trirank_build.training.optimiser import Optimiser
    from trirank_build.training.pretraining import PretrainingStep

    base = FeatureSpec.load(Way(*(size // SMALL for size in sizes)).folder / "run" / "features" / "features.json")
    found, made = Rounds(), {}
    recipe = load_recipe("shop").model.model_copy(update={"dim": 64, "embedding_updates": "rows", "cross_blocks": 0})
    for name, items in (("10m", sizes[0]), ("100k", sizes[0] // SMALL)):
        moved = items - base.tables["item"][1]
        tables = {n: (f, items) if n == "item" else (f + moved, s) for n, (f, s) in base.tables.items()}
        from dataclasses import replace

        spec = replace(base, tables=tables)
        model = make_ranker(spec, recipe)
        module = PretrainingStep(model, True, False)
        made[name] = (module, Optimiser(module, 1e-3, 0.0), items, spec)
    rng = np.random.default_rng(0)

    def once(name: str) -> float:
        module, optimiser, items, spec = made[name]
        fields, length, batch = len(spec.item_fields), 32, 128
        first = spec.vocabulary_size - items

        def drawn(*shape: int):
            found = torch.from_numpy(rng.integers(items, items + first - 1, (*shape, fields)))
            found[..., 0] = torch.from_numpy(rng.integers(1, items, shape))
            return found

        history = torch.cat([drawn(batch, length), torch.full((batch, length, 2), spec.tables["behaviour"][0] + 1)], -1)
        at = torch.arange(batch * length)
        chosen, others = drawn(batch * length), drawn(1_024)
        begun = time.perf_counter()
        loss = module(history, at, chosen, chosen[:, 0], others, others[:, 0], torch.zeros(len(at)), torch.zeros(1_024))
        loss.backward()
        optimiser.step(1e-3, 1.0)
        return time.perf_counter() - begun

    for name in made:
        for _ in range(3):
            once(name)
    for _ in range(12):
        for name in made:
            found.note(f"step_{name}_ms", once(name) * 1e3)
        found.note("step_ratio_10m_over_100k", found.last("step_10m_ms") / found.last("step_100k_ms"))
    table = made["10m"][0].model.embedding
    del made["10m"]
    rows = torch.optim.AdamW([torch.nn.Parameter(table.weight.detach()[: sizes[0] // 4])], fused=True)
    rows.param_groups[0]["params"][0].grad = torch.zeros_like(rows.param_groups[0]["params"][0])
    rows.step()
    for _ in range(3):
        begun = time.perf_counter()
        rows.step()
        found.note("all_rows_optimiser_ms", (time.perf_counter() - begun) * 4e3)
    return found.figures("next-item pre-training, 128 sequences of 32 events, 1,024 negatives, a plain table of 64 "
                         "numbers an item; all_rows_optimiser: AdamW, four times what a quarter took")  # fmt: skip


def cluster(sizes: tuple[int, int, int]) -> list[Figure]:
    """The small shop's log by polars and by a scheduler with two workers: rows that differ."""
    import polars as pl
    from dask.distributed import LocalCluster

    small = Way(*(size // SMALL for size in sizes))
    shop, log, took, files = small.folder / "shop", small.folder / "log_in_files", {}, 40
    make(shop, *small.size)
    if not log.is_dir():
        whole = pl.read_parquet(sorted((shop / "log").glob("*.parquet")))
        log.mkdir()
        for number in range(files):
            at = number * whole.height // files
            part = whole.slice(at, (number + 1) * whole.height // files - at)
            part.write_parquet(log / f"part-{number:03d}.parquet")
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as here:
        for name, engine in (("polars", "polars"), ("dask", here.scheduler_address.replace("tcp", "dask"))):
            out = small.folder / f"data_{name}"
            shutil.rmtree(out, ignore_errors=True)
            took[name] = run(["data", "prepare", str(log), "--items", f"{shop}/items.parquet", "--out", str(out),
                              "--min-count", "3", "--max-train", "20000", "--max-eval", "2000", "--engine", engine],
                             small.folder / f"{name}.log")  # fmt: skip
    differ = 0
    for table in ("events", "items", "requests"):
        one, two = (pl.read_parquet(small.folder / f"data_{name}" / f"{table}.parquet") for name in ("polars", "dask"))
        rows = [sorted(map(repr, frame.iter_rows())) for frame in (one, two)]
        differ += len(one) + len(two) if len(one) != len(two) else sum(a != b for a, b in zip(*rows, strict=True))
    note = f"{small.size[2]:,} events in {files} files; events, items and requests of both datasets, row by row"
    return [
        Figure("dask_rows_differ", differ, differ, differ, "rows", note),
        *(Figure(f"prepare_{n}_seconds", s, s, s, "s", "with --min-count 3; two workers on the same two cores")
          for n, (s, _) in took.items()),
    ]  # fmt: skip


def limit() -> list[Figure]:
    """A log of three times a memory limit, prepared and trained below it, by a control group of the kernel."""
    folder, bound = FOLDER / "limit", 2_500_000_000
    log = folder / "log"
    if not (folder / "done").is_file():
        import polars as pl

        make(folder / "shop", 50_000, 60_000, 12_000_000)
        log.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for file in sorted((folder / "shop" / "log").glob("*.parquet")):
            # What a web log says besides, and nobody reads here: page, agent, referrer, cookies.
            frame = pl.read_parquet(file)
            words = pl.Series(rng.integers(0, 2**62, frame.height)).cast(pl.String)
            frame.with_columns(
                url=pl.lit("https://shop.example/category/item?session=") + words + "&source=" + words.reverse(),
                agent=pl.lit("Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0 build ") + words,
                session=words + "-" + words.reverse() + "-" + words,
                referrer=pl.lit("https://search.example/results?q=" + "garden+chair+" * 12 + "&click=") + words,
                cookies=pl.lit("consent=all; currency=eur; " + "experiment=control; " * 8 + "visitor=") + words,
            ).write_csv(log / f"{file.stem}.csv")
        (folder / "done").touch()
    size = sum(file.stat().st_size for file in log.iterdir())
    (folder / "large.toml").write_text(RECIPE)
    group = Path("/sys/fs/cgroup/memory/trirank-scale")
    if not group.parent.is_dir():
        print("limit: no control groups to write to, so it is not measured")
        return []
    group.mkdir(exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(str(bound))
    figures, took, most = [], {}, []
    os.environ["POLARS_MAX_THREADS"] = "2"
    for name, arguments in {
        "prepare": [
            "data",
            "prepare",
            str(log),
            "--out",
            f"{folder}/data",
            "--max-train",
            "20000",
            "--max-eval",
            "2000",
        ],
        "train": ["train", f"{folder}/large.toml", "--data", f"{folder}/data", "--out", f"{folder}/run", "--fresh"],
    }.items():
        for file in log.iterdir():  # pages that another process read would not count
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        (group / "memory.max_usage_in_bytes").write_text("0")
        command = " ".join([sys.executable, "-m", "trirank_build.cli", *arguments])
        shell = f"echo $$ > {group}/cgroup.procs && exec {command} > {folder}/{name}.log 2>&1"
        begun = time.perf_counter()
        done = subprocess.run(["sh", "-c", shell], check=False, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"limit: {name} ended with {done.returncode}; see {folder}/{name}.log")
        took[name] = time.perf_counter() - begun
        most.append(int((group / "memory.max_usage_in_bytes").read_text()) / bound)
    group.rmdir()
    note = (
        f"{size / 1e9:.2f} GB of CSV, a web log: of its 12,000,000 events page, agent, referrer and cookies, "
        f"which nobody reads here, are most; {bound / 1e9:g} GB for process and page cache, of which {max(most):.2f} "
        "were used"
    )
    figures.append(Figure("limit_log_over_memory", size / bound, size / bound, size / bound, "", note))
    for name, seconds in took.items():
        figures.append(Figure(f"limit_{name}_seconds", seconds, seconds, seconds, "s", note))
    return figures


def main() -> None:
    """Measure and write ``results/scale.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--search", nargs=2, type=Path, help=argparse.SUPPRESS)
    for what, usual in (("items", 10_000_000), ("users", 2_000_000), ("events", 100_000_000)):
        parser.add_argument(f"--{what}", type=int, default=usual)
    given = parser.parse_args()
    if given.search:
        search(*given.search)
        return
    sizes = (given.items, given.users, given.events)
    from scale_parts import increment, libraries, rates

    parts = {
        "path": lambda: path(sizes), "steps": lambda: steps(sizes), "step": lambda: step(sizes),
        "cluster": lambda: cluster(sizes), "limit": limit,
        "libraries": lambda: libraries(Way(*sizes).folder), "increment": increment,
        "rates": lambda: rates(Way(*sizes).folder),
    }  # fmt: skip
    for name in given.parts or parts:
        figures = parts[name]()
        for figure in figures:
            print(f"{figure.name}: {figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}] {figure.unit}")
        write("scale", figures, keep=True)


if __name__ == "__main__":
    main()
