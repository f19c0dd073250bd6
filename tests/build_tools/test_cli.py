"""The command, as a person types it: every step of the README on a small log, and its errors in one line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import get_args

import pytest
import trirank as trirank_client
from trirank_backend.scoring import ENGINES
from trirank_build import cli
from trirank_build.commands.options import Engine
from trirank_build.data.dataset import Dataset
from trirank_build.models.checkpoint import load_checkpoint, save_checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def trirank(*arguments, code=0, process=False):
    """Run the command, in this process unless told otherwise: importing torch anew takes longer than most commands."""
    words = ["trirank", *map(str, arguments)]
    if process:
        command = [sys.executable, "-m", "trirank_build.cli", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    else:
        out, error, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
            patch.setattr(sys, "argv", words)
            patch.setattr(sys, "path", list(sys.path))
            try:
                cli.main()
            except SystemExit as end:
                status = int(end.code or 0)
        done = subprocess.CompletedProcess(words, status, out.getvalue(), error.getvalue())
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


RECIPE = """
name = "small"
[features]
history_length = 8
title_length = 4
vocabulary = 200
[model]
dim = 16
heads = 2
encoder_blocks = 1
ffn = 16
[training]
epochs = 1
candidates = 10
"""


@pytest.fixture(scope="module")
def line(tmp_path_factory, shop):
    """From a log in CSV to a release, by commands alone."""
    folder = tmp_path_factory.mktemp("line")
    words = {2: "pv", 4: "cart", 5: "buy"}
    log = shop.events.select("user_id", "item_id", "behaviour", "timestamp").rows()
    lines = ["user_id,item_id,behavior,timestamp", *(f"{u},{i},{words[b]},{t}" for u, i, b, t in log)]
    (folder / "user_behavior.csv").write_text("\n".join([*lines, lines[-1], "1,2,teleport,1770000000"]))
    shop.items.select("item_id", "title", "brand", "category", "price").write_csv(folder / "items.csv")
    (folder / "recipe.toml").write_text(RECIPE)
    steps = {
        "prepare": ("data", "prepare", folder / "user_behavior.csv", "--items", folder / "items.csv", "--out",
                    folder / "data", "--max-train", 2000, "--max-eval", 300),
        "train": ("train", folder / "recipe.toml", "--data", folder / "data", "--out", folder / "run"),
        "evaluate": ("evaluate", "--run", folder / "run", "--data", folder / "data"),
        "export": ("export", "--run", folder / "run", "--out", folder / "ranker.onnx"),
        "assemble": ("assemble", "--run", folder / "run", "--data", folder / "data", "--onnx", folder / "ranker.onnx",
                     "--out", folder / "releases", "--promote"),
    }  # fmt: skip
    return folder, {name: trirank(*arguments) for name, arguments in steps.items()}


def test_cleaning_is_a_table(line):
    text = line[1]["prepare"].stdout
    assert re.search(r"unknown behaviour\s+│\s*[\d,]+\s*│\s*[\d,]+\s*│\s*1\s", text)
    assert re.search(r"exact duplicate\s+│.*│\s*[\d,]+\s", text)
    assert re.search(r"requests: [\d,]+ train, [\d,]+ valid, [\d,]+ test", text)


def test_training_shows_its_curve(line):
    trained = line[1]["train"]
    assert re.search(r"1\s+│\s+\d\.\d+\s+│\s+0\.\d+", trained.stdout)
    said = re.search(
        r"the ranker (0\.\d+), the order in which candidates come (0\.\d+)", " ".join(trained.stdout.split())
    )
    assert float(said[1]) >= float(said[2])
    assert "worse" not in trained.stderr
    assert re.search(r"the start \((linear|\w+)\) 0\.\d+, which", trained.stdout)


def test_a_ranker_worse_than_retrieval_is_refused_unless_told(line, tmp_path):
    folder, worse = line[0], tmp_path / "worse"
    shutil.copytree(folder / "run", worse)
    weights, told = load_checkpoint(worse / "best.safetensors")
    weights["dense_head.weight"] *= -1  # what spoke for an item speaks against it
    save_checkpoint(worse / "best.safetensors", weights, told)
    words = ("assemble", "--run", worse, "--data", folder / "data", "--onnx", folder / "ranker.onnx", "--out",
             tmp_path / "releases")  # fmt: skip
    refused = " ".join(trirank(*words, code=1).stderr.split())
    assert re.search(
        r"NDCG@10 on 300 validation requests is 0\.\d+, that of the order in which candidates come 0\.\d+", refused
    )
    assert "--allow-failing-gate" in refused
    assert not list((tmp_path / "releases").glob("*"))
    trirank(*words, "--promote", "--allow-failing-gate")
    assert json.loads((tmp_path / "releases" / "current" / "manifest.json").read_text())["failing_gate_allowed"]


def test_training_can_choose_the_recipe_by_itself(line, tmp_path):
    """With the reasons, and sizes that fit a log of some thousand events."""
    said = trirank("train", "auto", "--data", line[0] / "data", "--out", tmp_path / "run").stdout
    assert "recipe shop: events have times" in said
    assert re.search(r"model\.dim = 16: [\d,]+ training events", said)
    kept = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert kept["name"] == "auto"
    assert kept["model"]["dim"] == 16
    assert "the ranker" in said


def test_evaluation_compares(line):
    text = line[1]["evaluate"].stdout
    for words in (
        "ranker",
        "retrieval",
        "popularity",
        "random",
        "item_knn",
        "content",
        "NDCG@10",
        "MRR",
        "AUC",
        "95 % interval",
        "accuracy",
        "coverage@10",
        "users with",
        "tail items",
    ):
        assert words in text


def test_export_shows_every_bucket(line):
    assert all(re.search(rf"{bucket}\s+│\s+\d\.\de[-+]\d+", line[1]["export"].stdout) for bucket in (64, 256, 1024))


def test_assemble_prints_the_release_and_promotes(line):
    folder, done = line
    release = done["assemble"].stdout.strip()
    assert (folder / "releases" / "current").resolve() == (folder / "releases" / release.rsplit("/", 1)[-1]).resolve()


def test_evaluation_as_json(line):
    folder, _ = line
    found = json.loads(trirank("evaluate", "--run", folder / "run", "--data", folder / "data", "--json").stdout)
    simple = {"popularity", "item_knn", "matrix_factorisation", "content"}
    assert set(found["table"]) == {"ranker", "retrieval", "random"} | simple
    assert found["table"]["ranker"]["NDCG@10"]["low"] <= found["table"]["ranker"]["NDCG@10"]["value"]


@pytest.mark.parametrize("protocol", ["catalogue", "sampled"])
def test_other_protocols_and_the_report(protocol, line, tmp_path):
    folder, _ = line
    report = tmp_path / "report.html"
    text = trirank("evaluate", "--run", folder / "run", "--data", folder / "data", "--protocol", protocol,
                   "--negatives", 20, "--html", report).stdout  # fmt: skip
    assert {"catalogue": "next choice among all items", "sampled": "among 20 sampled items"}[protocol] in text
    assert "states alone" in text
    assert report.read_text().count("<svg") == 2


def test_another_dataset_is_refused(line, world):
    folder, _ = line
    error = trirank("evaluate", "--run", folder / "run", "--data", world.data, code=1).stderr
    assert "give the one it was trained on" in error


def test_tuning_shows_its_trials(line, tmp_path):
    folder, _ = line
    (tmp_path / "search.toml").write_text(RECIPE + '\n[tuning.space]\n"model.dropout" = [0.0, 0.3]\n')
    text = trirank("tune", tmp_path / "search.toml", "--data", folder / "data", "--out", tmp_path / "out", "--trials", 1
                   ).stdout  # fmt: skip
    assert re.search(r"0\s+│\s+complete\s+│\s+0\.\d+\s+│\s+0\.?\d*", text)
    assert "best.toml" in text


CHAIN = """
name = "chain"
[training]
epochs = 0
[[steps]]
kind = "prune"
ffn = 0.25
[[steps]]
kind = "fold"
[gate]
min_ndcg_ratio = 0.5
min_ndcg_ratio_low = 0.3
min_kendall_tau = 0.2
min_overlap = 0.2
min_retrieval_ratio = 0
"""


def test_compress_export_gate_assemble(line, tmp_path):
    folder, _ = line
    (tmp_path / "chain.toml").write_text(CHAIN)
    of_run = ("--run", tmp_path / "out" / "compressed", "--data", folder / "data")
    onnx = tmp_path / "small.onnx"
    text = trirank("compress", tmp_path / "chain.toml", "--run", folder / "run", "--data", folder / "data", "--out",
                   tmp_path / "out").stdout  # fmt: skip
    for step in ("dense", "1-prune", "2-fold"):
        assert re.search(rf"{step}\s+│\s+[\d,]+\s+│\s+[\d.]+\s+│\s+0\.\d+\s+│\s+[\d.]+", text)
    trirank("export", *of_run[:2], "--out", onnx)
    refused = trirank("assemble", *of_run, "--onnx", onnx, "--out", tmp_path / "releases", code=1).stderr
    assert "run `trirank gate` on it" in refused
    passed = trirank("gate", *of_run, "--onnx", onnx, "--requests", 300, "--no-live").stdout
    assert "gate: passed" in passed
    assert onnx.with_suffix(".gate.html").is_file()
    trirank("assemble", *of_run, "--onnx", onnx, "--out", tmp_path / "releases")
    strict = (
        (tmp_path / "out" / "compression.toml")
        .read_text()
        .replace("min_kendall_tau = 0.2", "min_kendall_tau = 0.2\nmax_size_mb = 0.001")
    )
    (tmp_path / "out" / "compression.toml").write_text(strict)
    failed = trirank("gate", *of_run, "--onnx", onnx, "--requests", 300, "--no-live", code=1)
    assert "failed: ONNX: " in failed.stderr.replace("\n", " ")
    refused = trirank("assemble", *of_run, "--onnx", onnx, "--out", tmp_path / "releases", code=1).stderr
    assert "did not pass the gate: ONNX: " in refused
    trirank("assemble", *of_run, "--onnx", onnx, "--out", tmp_path / "releases", "--allow-failing-gate")


def test_search_by_command(line, tmp_path):
    folder, _ = line
    (tmp_path / "chain.toml").write_text(CHAIN)
    command = ("compress", tmp_path / "chain.toml", "--run", folder / "run", "--data", folder / "data", "--out",
               tmp_path / "out")  # fmt: skip
    assert "say --search too" in trirank(*command, "--latency-ms", 5, code=2).stderr
    assert "needs a target" in trirank(*command, "--search", code=1).stderr
    text = trirank(*command, "--search", "--min-ndcg-ratio", 0.1, "--trials", 2).stdout
    assert "chains tried" in text
    assert (tmp_path / "out" / "best.toml").is_file()


@pytest.mark.e2e
def test_serve_and_rank(line, tmp_path):
    import signal
    import time

    folder, _ = line
    release, addresses = folder / "releases" / "current", tmp_path / "addresses.json"
    command = [sys.executable, "-m", "trirank_build.cli", "serve", str(release), "--addresses", str(addresses)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not addresses.is_file():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        grpc = json.loads(addresses.read_text())["grpc"]
        table = trirank("rank", "--server", grpc, "--release", release).stdout
        assert "retrieval's order" in table
        one, two = Dataset.load(folder / "data").items["item_id"].head(2)
        found = json.loads(
            trirank("rank", "--server", grpc, "--item", one, "--item", two, "--item", 10**15, "--json").stdout
        )
        assert found["unknown"] == 1
        assert {item["item_id"] for item in found["items"]} <= {one, two}
        error = trirank("rank", "--server", grpc, "--item", one, "--top-k", 0, code=1).stderr
        assert "top_k is 0; it goes from 1 to 1024" in error
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


BAD = tomllib.loads((Path(__file__).parents[1] / "bad_inputs.toml").read_text())["input"]


@pytest.mark.parametrize("bad", BAD, ids=[entry["command"][:60] for entry in BAD])
def test_a_wrong_input_is_one_clear_line(bad, line, tmp_path):
    """What is wrong, with which value, and what to do; nothing is written."""
    (tmp_path / "log.csv").write_text(LOG)
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_folder" / "kept").touch()
    for name, content in bad.get("files", {}).items():
        (tmp_path / name).write_bytes(content.encode().replace(b"\x1a", b"\xff"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    words = bad["command"].format(tmp=tmp_path, line=line[0]).split()
    # Some in a process of their own: `serve` changes how it is interrupted.
    done = trirank(*words, code=bad["status"], process=words[0] in ("serve", "rank"))
    (error,) = [each for each in done.stderr.splitlines() if each.startswith("error: ")]
    assert done.stdout == ""
    for expected in bad["words"]:
        assert expected.format(tmp=tmp_path, line=line[0]) in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


LOG = "user_id,item_id,behavior,timestamp\n" + "".join(
    f"{user},{item},click,{1_767_268_800 + user * 7_000 + item * 60}\n"
    for user in range(30)
    for item in range(user % 7, 12)
)


def test_engines_are_those_of_the_backend():
    assert get_args(Engine) == tuple(ENGINES)


def test_evaluation_is_the_same_again(line):
    """Whatever order Python's sets have in a process."""
    folder, _ = line
    command = ["-m", "trirank_build.cli", "evaluate", "--run", folder / "run", "--data", folder / "data", "--json"]
    found = {
        subprocess.run(
            [sys.executable, *map(str, command)], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
            check=True, timeout=200,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_options_replace_what_was_recorded(line):
    """Seen by the error that each of them leads to, without a server."""
    folder, _ = line
    release = folder / "releases" / "current"
    for option, value, words in (("--top-k", 5000, "top_k is 5000"), ("--query", "x" * 3000, "query has 3000 bytes")):
        assert words in trirank("rank", "--server", "127.0.0.1:9", "--release", release, option, value, code=1).stderr


def test_the_version():
    assert trirank("--version").stdout.strip() == f"trirank {trirank_client.__version__}"


def test_where_an_error_comes_from(tmp_path):
    log = tmp_path / "log"
    trirank("--log-file", log, "release", "list", tmp_path / "none", code=1)
    assert "release list" in log.read_text()
    assert "Traceback" in log.read_text()


def test_a_dataset_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,behavior\n1,2,jump\n")
    trirank("data", "prepare", tmp_path / "log.csv", "--out", tmp_path / "data", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    with pytest.raises(Exception, match="cannot be read"):
        Dataset.load(tmp_path / "data")
