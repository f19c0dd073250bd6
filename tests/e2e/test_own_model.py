"""A team's own module, from its class to a ranked answer: the documented example, command by command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file
from trirank import RankClient, RankRequest
from trirank_build.repository.release import load_manifest
from trirank_build.serving.server import TritonServer

EXAMPLES = Path(__file__).parent.parent.parent / "build_tools" / "examples"


def trirank(*arguments):
    command = [sys.executable, "-m", "trirank_build.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exported_gated_and_served(world, trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from own_ranker import TwoTowers

    spec = trained.features.spec
    module = TwoTowers(spec.vocabulary_size, spec.shape.dense, spec.shape.tasks, dim=16)
    save_file(module.state_dict(), tmp_path / "own.safetensors")
    onnx = tmp_path / "own.onnx"
    trirank(
        "export", "--run", world.run, "--out", onnx, "--model", "own_ranker:TwoTowers",
        "--checkpoint", tmp_path / "own.safetensors", "--arguments",
        '{"vocabulary": "$vocabulary_size", "dense": "$dense", "tasks": "$tasks", "dim": 16}',
    )  # fmt: skip
    release = Path(
        trirank("assemble", "--run", world.run, "--data", world.data, "--onnx", onnx, "--out", tmp_path / "releases")
        .strip()
    )  # fmt: skip
    assert load_manifest(release)["parity"]["module"] == "TwoTowers"
    with TritonServer(release) as server:
        server.wait_ready()
        with RankClient(server.grpc, deadline_s=10) as client:
            assert len(client.rank(RankRequest(item_ids=[1, 30, 60]))) > 0
