"""Tables in shards under torchrun train as one whole table does, and are written as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tomli_w
import torch
from trirank_build.models.checkpoint import load_checkpoint

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from trirank_build.training.distributed import ranks
from trirank_build.training.optimiser import Optimiser
from trirank_build.training.shards import Shards, ShardedTable

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(101, 6, padding_idx=0, sparse=True)
        self.head = nn.Linear(6, 1)
    def forward(self, history, chosen):
        # Looked up a different number of times in each process: no exchange may depend on it.
        found = torch.stack([self.embedding(history).sum(1) for _ in range(1 + len(history) % 3)]).mean(0)
        return (self.head(found) - self.embedding(chosen).sum(1, keepdim=True)).square().mean()

batches = [torch.randint(0, 101, (12, 5), generator=torch.Generator().manual_seed(n)) for n in range(6)]
def part(batch, rank, world):
    rows = batch[:7] if rank == 0 and world > 1 else batch[7:] if world > 1 else batch
    return {"history": rows, "chosen": rows[:, 0]}

with ranks() as group:
    model = Model()
    shards = Shards(model, group.rank, group.world)
    step = group.parallel(model, shards.parameters)
    optimiser = Optimiser(model, 0.05, 0.0, group)
    assert isinstance(model.embedding, ShardedTable) == (group.world == 2)
    for batch in batches:
        if group.world == 1:  # the mean over the parts, as two processes take it
            loss = sum(model(**part(batch, rank, 2)) for rank in (0, 1)) / 2
        else:
            tensors = part(batch, group.rank, 2)
            shards.fetch(tensors)
            loss = step(**tensors)
        loss.backward()
        shards.push()
        optimiser.step(0.05, 0.5)
    with shards.whole():
        if group.leads:
            torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, sys.argv[1])
    group.wait()
"""


def run(*arguments, **more):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=250, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def test_steps_are_those_of_a_whole_table(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run(tmp_path / "script.py", tmp_path / "one.pt")
    run(*TORCHRUN, tmp_path / "script.py", tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert set(one) == set(two) == {"embedding.weight", "head.weight", "head.bias"}
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)
    torch.manual_seed(3)
    assert not torch.allclose(torch.nn.Embedding(101, 6, padding_idx=0).weight[1:], two["embedding.weight"][1:])


@pytest.mark.parametrize("kind", ["low_rank"])
def test_a_run_in_shards_is_a_run(kind, recipe, world, tmp_path):
    """Both phases, gathered for validation, and written as one table; a killed one goes on."""
    own = recipe.changed(
        {
            "model.embedding": kind, "model.embedding_rank": 4, "model.embedding_updates": "rows",
            "pretraining.objective": "next_item", "pretraining.negatives": "uniform", "pretraining.epochs": 1,
            "pretraining.negative_samples": 64, "training.epochs": 2,
        }
    )  # fmt: skip
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(own.model_dump(exclude_none=True)))
    train = ("-m", "trirank_build.cli", "train", tmp_path / "recipe.toml", "--data", world.data)
    run(*TORCHRUN, *train, "--out", tmp_path / "two")
    run(*train, "--out", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    assert two["parameters"] == one["parameters"]
    assert two["curve"][0]["loss"] == pytest.approx(one["curve"][0]["loss"], rel=0.1)  # each process draws negatives
    assert two["valid_ndcg10"] == pytest.approx(one["valid_ndcg10"], abs=0.08)
    weights = [load_checkpoint(tmp_path / name / "best.safetensors")[0] for name in ("one", "two")]
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in weights]
    assert shapes[0] == shapes[1]
    assert not list((tmp_path / "two").glob("last*"))
