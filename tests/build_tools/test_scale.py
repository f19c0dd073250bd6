"""More requests than memory holds, more processes than one, runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
import tomli_w
import torch
from trirank_build.data.dataset import Dataset
from trirank_build.features.examples import Examples
from trirank_build.models.checkpoint import load_checkpoint, save_checkpoint
from trirank_build.training.loop import Loop
from trirank_build.training.trainer import train

TRAIN = ["-m", "trirank_build.cli", "train"]


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


@pytest.fixture
def recipe_file(recipe, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe.model_dump(exclude_none=True)))
    return path


def command(*arguments, **environment):
    return {
        "args": [sys.executable, *map(str, arguments)],
        "env": {**os.environ, **environment},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def weights(run):
    return load_checkpoint(run / "best.safetensors")[0]


def test_requests_on_disk_are_those_in_memory(dataset, trained, tmp_path, rng, monkeypatch):
    """Read in small chunks, so that a chunk's edge falls everywhere."""
    held = Examples.read(dataset, "train", trained.features)
    monkeypatch.setattr("trirank_build.features.examples._CHUNK", 70)
    mapped = Examples.read(dataset, "train", trained.features, directory=tmp_path / "unpacked")
    assert isinstance(mapped.rows, np.memmap)
    assert len(mapped) == len(held) > 200
    which = np.sort(rng.choice(len(held), 64, replace=False))
    one, two = held.whole(which), mapped.whole(which)
    for name, array in one.packed.tensors().items():
        np.testing.assert_array_equal(array, two.packed.tensors()[name], err_msg=name)
    np.testing.assert_array_equal(one.labels, two.labels)


def test_the_dataset_does_not_hold_its_requests(dataset):
    assert isinstance(dataset.requests, pl.LazyFrame)


def test_memory_does_not_grow_with_the_requests(world, tmp_path):
    """Anonymous memory of a process that unpacks and samples 6 times as many requests; mapped files do not count.

    Even the fewer are more than one chunk: below that, memory does grow with them.
    """
    code = """
import re, sys
from pathlib import Path
import numpy as np, polars as pl
from trirank_build.data.dataset import Dataset
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features
data, run, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dataset = Dataset.load(data)
folder = Path(sys.argv[4])
if not folder.is_dir():
    many = pl.concat([dataset.requests.collect()] * times).lazy()
    dataset = Dataset(dataset.items, dataset.events, many, dataset.description)
    dataset.save(folder)
    sys.exit()
features = Features.load(run / "features")
examples = Examples.read(Dataset.load(folder), "train", features, directory=folder / "unpacked")
rng = np.random.default_rng(0)
for _ in range(20):
    examples.sample(np.sort(rng.choice(len(examples), 128)), rng, 12, None, True)
anonymous = int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(len(examples), anonymous, sum(f.stat().st_size for f in (folder / "unpacked").iterdir()) / 2**20)
"""
    found = {}
    for times in (10, 60):
        arguments = ("-c", code, world.data, world.run, times, tmp_path / str(times))
        for _ in ("write", "read"):  # apart, since writing does hold them
            done = subprocess.run(**command(*arguments, POLARS_MAX_THREADS="1"), timeout=200, check=False)
            assert done.returncode == 0, done.stdout
        found[times] = [float(value) for value in done.stdout.split()]
    few, many = found.values()
    assert many[0] == 6 * few[0]
    assert few[0] > 20_000
    more_in_memory, more_on_disk = many[1] - few[1], many[2] - few[2]
    assert more_on_disk > 100
    assert more_in_memory < more_on_disk / 2, (more_in_memory, more_on_disk)


def test_torchrun_trains_one_ranker_with_two_processes(recipe_file, world, tmp_path):
    done = subprocess.run(
        **command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *TRAIN, recipe_file,
                  "--data", world.data, "--out", tmp_path / "run", OMP_NUM_THREADS="1"),
        timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["processes"] == 2
    alone = json.loads((world.run / "run.json").read_text())
    best, best_alone = (max(point["valid_ndcg10"] for point in f["curve"]) for f in (facts, alone))
    assert best == pytest.approx(best_alone, abs=0.05)
    # The first loss is the same but for the candidates that each process draws.
    assert facts["curve"][1]["loss"] == pytest.approx(alone["curve"][1]["loss"], rel=0.05)


def test_a_slow_process_still_finds_the_best_weights(tmp_path):
    """What comes after the loop moves their file; another rank may be reading it as yet."""
    together = threading.Barrier(2, timeout=10)

    class Rank:
        world, device = 2, torch.device("cpu")

        def __init__(self, rank):
            self.rank, self.leads = rank, rank == 0

        def wait(self):
            together.wait()
            time.sleep(0.2 * self.rank)

    def read(rank):
        loop = Loop(torch.nn.Linear(2, 1), {"ranking": None}, seed=0, directory=tmp_path, identity="", ranks=Rank(rank))
        if rank == 0:
            save_checkpoint(loop.best("ranking"), loop.model.state_dict(), {})
        loop._load_best("ranking")
        if rank == 0:
            loop.best("ranking").unlink()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, (0, 1)))


def test_a_process_that_is_killed_loses_nothing(recipe, world, tmp_path):
    """SIGKILL in the middle of training; the next call ends with the weights of an unbroken run."""
    often = recipe.changed({"training.checkpoint_minutes": 1e-6})
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(often.model_dump(exclude_none=True)))
    arguments = (*TRAIN, path, "--data", world.data, "--out", tmp_path / "run")
    process = subprocess.Popen(**command(*arguments))
    last = tmp_path / "run" / "last.safetensors"
    deadline = time.monotonic() + 120
    while not last.is_file():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "run.json").is_file()
    done = subprocess.run(**command(*arguments), timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "resuming ranking at epoch" in done.stdout
    one, two = weights(tmp_path / "run"), weights(world.run)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_half_precision_where_it_helps(recipe, world, tmp_path, dataset):
    run = train(recipe.changed({"training.precision": "bfloat16", "training.epochs": 2}), dataset, tmp_path / "run")
    single = json.loads((world.run / "run.json").read_text())["curve"]
    assert run.facts["curve"][1]["valid_ndcg10"] == pytest.approx(single[1]["valid_ndcg10"], abs=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in weights(run.directory).values())
