"""Real TensorRT plans, built here for GPUs that are elsewhere."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from trirank import contract
from trirank_backend.scoring import OnnxRanker
from trirank_build.compression import quantise
from trirank_build.compression.chain import check_chain
from trirank_build.compression.recipe import parse_recipe
from trirank_build.data.dataset import Dataset
from trirank_build.engines import builder
from trirank_build.engines.builder import BuildOptions, build_plans
from trirank_build.engines.explain import explain
from trirank_build.engines.lock import read_lock
from trirank_build.engines.machine import Machine
from trirank_build.engines.plan import load_plan_manifest, manifest_path
from trirank_build.engines.rewriting import for_tensorrt
from trirank_build.engines.verify import plans_of, verify
from trirank_build.errors import BadModel, ServeError
from trirank_build.export.onnx import beyond_tensorrt, write_graph
from trirank_build.export.parity import sample_inputs
from trirank_build.repository.assemble import assemble
from trirank_build.repository.configs import parse_config
from trirank_build.serving.server import TritonServer

pytestmark = pytest.mark.engines
pytest.importorskip("tensorrt_rtx", reason="pip install 'trirank[tensorrt]'")


@pytest.fixture(scope="module")
def plans(world, trained, tmp_path_factory):
    return build_plans(world.onnx, trained.features.spec, ["86", "sm89"], tmp_path_factory.mktemp("plans"))


def test_a_plan_a_gpu(plans):
    assert [plan.name for plan in plans] == ["sm86.plan", "sm89.plan"]
    assert plans[0].read_bytes() != plans[1].read_bytes()


def test_every_gpu_that_it_knows(world, trained, tmp_path):
    built = build_plans(world.onnx, trained.features.spec, ["80", "sm120"], tmp_path)
    assert [load_plan_manifest(plan).compute_capability for plan in built] == ["8.0", "12.0"]
    assert [verify(plan, world.onnx) for plan in built] == [[], []]


def test_what_turing_cannot_do_is_said(world, trained, tmp_path):
    """TensorRT-RTX has no FP32 products for SM 75, and dense features are multiplied in FP32 in every precision."""
    with pytest.raises(BadModel, match=r"cannot build it for sm75 .*FP32 GEMM is not supported"):
        build_plans(world.onnx, trained.features.spec, ["75"], tmp_path)
    assert not list(tmp_path.glob("*.plan"))


def test_the_manifest_says_what_it_came_from(plans, world):
    from trirank_build.artefacts import file_digest

    manifest = load_plan_manifest(plans[0])
    assert manifest.flavour == "tensorrt_rtx"
    assert manifest.version
    assert (manifest.sm, manifest.compute_capability) == ("sm86", "8.6")
    assert manifest.onnx == file_digest(world.onnx)
    assert [profile["bucket"] for profile in manifest.profiles] == list(contract.BUCKETS)
    assert all(profile["max_batch"] == contract.MAX_BATCH for profile in manifest.profiles)


@pytest.mark.parametrize("steps", [
    [{"kind": "prune", "ffn": 0.5, "history_length": 4}, {"kind": "fold"}, {"kind": "quantise"}],
    [{"kind": "quantise", "precision": "float16"}],
    [{"kind": "share", "codes": 16, "groups": 4}],
])  # fmt: skip
def test_compressed_graphs_build_too(trained, tmp_path, steps, monkeypatch):
    monkeypatch.setattr(quantise, "NARROWEST", 16)
    recipe = parse_recipe({"name": "chain", "training": {"epochs": 0}, "steps": steps})
    model, features = check_chain(recipe, trained)
    write_graph(model, features.spec, tmp_path / "ranker.onnx")
    assert not beyond_tensorrt(onnx.load(tmp_path / "ranker.onnx"))
    (plan,) = build_plans(tmp_path / "ranker.onnx", features.spec, ["86"], tmp_path)
    assert load_plan_manifest(plan).sm == "sm86"


def test_the_graph_for_tensorrt_says_the_same(trained, tmp_path, rng):
    recipe = parse_recipe(
        {"name": "chain", "training": {"epochs": 0}, "steps": [{"kind": "fold"}, {"kind": "quantise"}]}
    )
    model, features = check_chain(recipe, trained)
    write_graph(model, features.spec, tmp_path / "ranker.onnx")
    onnx.save(for_tensorrt(onnx.load(tmp_path / "ranker.onnx")), tmp_path / "rewritten.onnx")
    tensors = sample_inputs(features.spec, 2, 64, rng)
    one, two = (OnnxRanker(tmp_path / f"{name}.onnx")(tensors) for name in ("ranker", "rewritten"))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_the_same_key_is_not_built_again(plans, world, trained, monkeypatch):
    before = [plan.stat().st_mtime_ns for plan in plans]

    def refuse(*arguments):
        raise AssertionError("it was built again")

    monkeypatch.setattr("tensorrt_rtx.Builder", refuse)
    again = build_plans(world.onnx, trained.features.spec, ["86", "89"], plans[0].parent)
    assert [plan.stat().st_mtime_ns for plan in again] == before


@pytest.mark.parametrize("change", ["onnx", "flags", "profile", "plan"])
def test_whatever_differs_is_built_again(plans, world, trained, tmp_path, change, monkeypatch):
    folder = shutil.copytree(plans[0].parent, tmp_path / "plans")
    graph = shutil.copy(world.onnx, tmp_path / "ranker.onnx")
    if change == "onnx":
        model = onnx.load(graph)
        model.doc_string = "another one"
        onnx.save(model, graph)
    elif change == "flags":
        monkeypatch.setattr(builder, "FLAGS", ("SPARSE_WEIGHTS", "TF32"))
    elif change == "profile":
        monkeypatch.setattr(builder, "OPT_BATCH", 4)
    else:
        (folder / "sm86.plan").write_bytes(b"damaged")
    before = (folder / "sm86.plan").stat().st_mtime_ns
    (plan,) = build_plans(graph, trained.features.spec, ["86"], folder)
    assert plan.stat().st_mtime_ns != before
    assert verify(plan, graph) == []
    assert read_lock(folder)["sm86.plan"]["plan"] == load_plan_manifest(plan).plan


def test_verifying_names_what_differs(plans, world, tmp_path):
    folder = shutil.copytree(plans[0].parent, tmp_path / "plans")
    plan = folder / "sm86.plan"
    assert verify(plan, world.onnx) == []
    other = tmp_path / "other.onnx"
    other.write_bytes(b"another graph")
    assert [problem.split(" is ")[0] for problem in verify(plan, other)] == ["onnx"]
    manifest = json.loads(manifest_path(plan).read_text())
    for change, field in (({"version": "1.0"}, "version"), ({"flags": []}, "flags"), ({"cuda": "12"}, "cuda")):
        manifest_path(plan).write_text(json.dumps(manifest | change))
        assert {problem.split(" is ")[0] for problem in verify(plan)} == {field}
    manifest_path(plan).write_text(json.dumps(manifest))
    for suffix in (".plan", ".plan.json"):  # renamed to another architecture
        plan.with_suffix(suffix).rename(folder / f"sm120{suffix}")
    named, unknown = verify(folder / "sm120.plan")
    assert named.startswith("sm is sm86, the file is named sm120.plan")
    assert unknown.startswith("the lock does not know sm120.plan")


def test_plans_by_command(plans, tmp_path):
    from trirank_build.cli import app
    from typer.testing import CliRunner

    run = CliRunner().invoke
    listed = run(app, ["engine", "list", str(plans[0].parent)])
    assert "sm86.plan" in listed.output
    assert "tensorrt_rtx" in listed.output
    assert run(app, ["engine", "verify", str(plans[0].parent)]).exit_code == 0
    assert "and no other GPU" in run(app, ["engine", "explain", str(plans[0])]).output
    folder = shutil.copytree(plans[0].parent, tmp_path / "plans")
    damaged = bytearray((folder / "sm86.plan").read_bytes())
    damaged[99] ^= 1
    (folder / "sm86.plan").write_bytes(damaged)
    found = run(app, ["engine", "verify", str(folder)])
    assert found.exit_code == 1
    assert "its manifest says" in found.output
    with pytest.raises(BadModel, match="holds no plan"):
        plans_of(tmp_path)


@pytest.mark.parametrize(
    ("options", "flavour", "words"),
    [
        (BuildOptions(hardware_compatibility="ampere_plus"), "tensorrt_rtx", "no levels of hardware compatibility"),
        (BuildOptions(hardware_compatibility="all"), "tensorrt", "none of none, ampere_plus, same_compute_capability"),
        (BuildOptions(workspace_bytes=1), "tensorrt_rtx", "below 1 MiB"),
        (BuildOptions(version_compatible=True), "tensorrt_rtx", r"cannot build it .*VERSION_COMPATIBLE.*: .*lean"),
    ],
)
def test_options_that_this_flavour_has_not(world, trained, tmp_path, options, flavour, words):
    with pytest.raises(BadModel, match=words):
        build_plans(world.onnx, trained.features.spec, ["86"], tmp_path, flavour, options)
    assert not list(tmp_path.glob("*.plan"))


def test_options_are_part_of_the_key(plans, world, trained, tmp_path):
    folder = shutil.copytree(plans[0].parent, tmp_path / "plans")
    options = BuildOptions(workspace_bytes=1 << 28)
    (plan,) = build_plans(world.onnx, trained.features.spec, ["86"], folder, options=options)
    assert load_plan_manifest(plan).workspace_bytes == 1 << 28
    assert verify(plan, world.onnx) == []
    assert BuildOptions(version_compatible=True, strip_weights=True).flags == [
        "SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN",
    ]  # fmt: skip


def test_a_plan_explains_itself(plans, world):
    answers = dict(explain(plans[0], world.onnx, Machine(("sm86",), None, None)))
    assert answers["for"] == "sm86, and no other GPU"
    assert answers["made by"].startswith("tensorrt_rtx")
    assert answers["as it was built"] == "yes"
    assert answers["runs here"] == "yes, on sm86"
    assert "1024 candidates: batch 1 to 32, best at 8" in answers["profiles"]
    assert "MatMul" in answers["operators"] or "Gemm" in answers["operators"]
    assert "of FLOAT" in answers["weights"]
    assert answers["gate"].startswith("no report")
    assert dict(explain(plans[0], None, Machine((), None, None)))["runs here"] == "no: this machine has no GPU"


def test_what_the_gate_said_is_explained(plans, world, tmp_path):
    graph = shutil.copy(world.onnx, tmp_path / "r.onnx")
    ratio = {"value": 0.99, "low": 0.98, "high": 1.0}
    stage = {"stage": "ensemble", "ndcg10": {"value": 0.5}, "ndcg_ratio": ratio}
    report = {"onnx": load_plan_manifest(plans[0]).onnx, "passed": True, "failures": [], "stages": [stage]}
    for changes, words in (
        ({}, "passed: NDCG@10 0.5000, 0.9900 [0.9800, 1.0000] of the dense ranker's (ensemble)"),
        ({"passed": False, "failures": ["ONNX: too far"]}, "failed: ONNX: too far"),
        ({"onnx": "0" * 64}, "r.gate.json is of another graph"),
    ):
        (tmp_path / "r.gate.json").write_text(json.dumps(report | changes))
        assert words in dict(explain(plans[0], graph))["gate"]


def test_a_damaged_lock(tmp_path):
    (tmp_path / "engines.lock.toml").write_text("[[plan]")
    with pytest.raises(BadModel, match="is damaged"):
        read_lock(tmp_path)


def test_a_flipped_bit_is_noticed(plans, tmp_path):
    plan = tmp_path / "sm86.plan"
    damaged = bytearray(plans[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    plan.write_bytes(damaged)
    manifest_path(plan).write_text(manifest_path(plans[0]).read_text())
    with pytest.raises(BadModel, match="its manifest says"):
        load_plan_manifest(plan)


def test_a_release_for_tensorrt(plans, world, trained, tmp_path):
    release = assemble(trained, Dataset.load(world.data), world.onnx, tmp_path, runtime="tensorrt", plans=plans)
    ranker = release / "models" / "ranker"
    assert sorted(path.name for path in (ranker / "1").iterdir()) == ["model.onnx", "sm86.plan", "sm89.plan"]
    config = parse_config((ranker / "config.pbtxt").read_text())
    assert config.platform == "tensorrt_plan"
    assert dict(config.cc_model_filenames) == {"8.6": "sm86.plan", "8.9": "sm89.plan"}
    with pytest.raises(ServeError, match="no backend tensorrt, which NVIDIA's container has"):
        TritonServer(release)


def test_a_plan_of_another_graph(plans, world, trained, tmp_path):
    for plan in plans:
        (tmp_path / plan.name).write_bytes(plan.read_bytes())
        manifest = json.loads(manifest_path(plan).read_text()) | {"onnx": "0" * 64}
        manifest_path(tmp_path / plan.name).write_text(json.dumps(manifest))
    with pytest.raises(BadModel, match="was built from ONNX 000000000000"):
        assemble(
            trained, Dataset.load(world.data), world.onnx, tmp_path / "out",
            runtime="tensorrt", plans=[tmp_path / "sm86.plan"],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "flavour", "words"),
    [
        (["90"], "tensorrt_rtx", "cannot build for sm90; it can for"),
        (["gpu"], "tensorrt_rtx", "write 86 or sm86"),
        ([], "tensorrt_rtx", "no GPU architecture"),
        (["86"], "abacus", "none of tensorrt, tensorrt_rtx"),
    ],
)
def test_what_cannot_be_built(world, trained, tmp_path, targets, flavour, words):
    with pytest.raises(BadModel, match=words):
        build_plans(world.onnx, trained.features.spec, targets, tmp_path, flavour)
    assert not list(tmp_path.iterdir())


def test_a_truncated_graph(world, trained, tmp_path):
    (tmp_path / "t.onnx").write_bytes(world.onnx.read_bytes()[:2000])
    with pytest.raises(BadModel, match="no whole ONNX"):
        build_plans(tmp_path / "t.onnx", trained.features.spec, ["86"], tmp_path / "out")


@pytest.mark.parametrize(("present", "words"), [("8.9", "which is sm89, not sm86"), (None, "nvidia-smi finds none")])
def test_a_plan_is_not_named_after_another_gpu(world, trained, tmp_path, monkeypatch, present, words):
    """TensorRT's own library is not here; what must be refused is refused before it is asked for anything."""
    monkeypatch.setattr(builder, "library", lambda flavour: SimpleNamespace(__version__="11.0"))
    monkeypatch.setenv("PATH", str(tmp_path))
    if present:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho {present}\n")
        script.chmod(0o755)
    with pytest.raises(BadModel, match=words):
        build_plans(world.onnx, trained.features.spec, ["86"], tmp_path / "out", "tensorrt")
