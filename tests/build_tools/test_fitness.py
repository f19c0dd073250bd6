"""What cannot run here is said before Triton sees it, with the field that differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import manifest_of
from trirank_build.data.dataset import Dataset
from trirank_build.engines.machine import Machine, present_sms
from trirank_build.engines.plan import manifest_path
from trirank_build.errors import BadModel, ServeError
from trirank_build.repository.assemble import assemble
from trirank_build.repository.configs import BUCKETS_PARAMETER, parse_config
from trirank_build.repository.release import MODELS, load_manifest, verify
from trirank_build.serving.fitness import unfit
from trirank_build.serving.server import TritonServer
from trirank_build.serving.tritonserver import TritonBinary

HERE = Machine(("sm86",), "10.8.0.43", "12")


@pytest.fixture(scope="module")
def release(world, trained, tmp_path_factory):
    """For TensorRT, with a plan that says that it is one; nothing here looks inside."""
    folder = tmp_path_factory.mktemp("tensorrt")
    plan = folder / "sm86.plan"
    plan.write_bytes(b"a plan")
    manifest_path(plan).write_text(json.dumps(manifest_of(plan, world.onnx).to_json()))
    return assemble(
        trained, Dataset.load(world.data), world.onnx, folder / "releases", runtime="tensorrt", plans=[plan]
    )


@pytest.fixture
def server(tmp_path):
    """A server laid out as in NVIDIA's container."""
    for backend in ("tensorrt", "onnxruntime"):
        (tmp_path / "backends" / backend).mkdir(parents=True)
    return TritonBinary(tmp_path / "bin" / "tritonserver", backends=tmp_path / "backends")


def changed(release, tmp_path, **changes):
    target = shutil.copytree(release, tmp_path / "release")
    manifest = load_manifest(target)
    manifest["engines"][0] |= changes
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_what_fits(release, server):
    assert unfit(release, server, HERE) == []
    assert verify(release) == []


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Machine((), "10.8.0.43", "12"), "there is no GPU"),
        (Machine(("sm89",), "10.8.0.43", "12"), "sm: the plans are for sm86, the GPU is sm89"),
        (Machine(("sm86", "sm89"), "10.8.0.43", "12"), "sm: the plans are for sm86, the GPU is sm89"),
        (Machine(("sm86",), "10.9.0.34", "12"), "version: sm86.plan is of TensorRT 10.8.0, the server has 10.9.0.34"),
        (Machine(("sm86",), "10.8.0.43", "13"), "cuda: sm86.plan is of CUDA 12, the server has 13"),
    ],
)
def test_the_field_that_differs(release, server, machine, words):
    assert words in "; ".join(unfit(release, server, machine))


def test_plans_for_more_than_one(release, server, tmp_path):
    wide = changed(release, tmp_path, hardware_compatibility="ampere_plus", flags=["VERSION_COMPATIBLE"])
    assert unfit(wide, server, Machine(("sm89",), "10.9.0.34", "12")) == []
    assert "sm: " in unfit(wide, server, Machine(("sm75",), "10.8.0.43", "12"))[0]
    assert "version: " in unfit(wide, server, Machine(("sm89",), "11.0.0", "12"))[0]


def test_a_plan_for_more_than_one_is_found_by_triton(world, trained, tmp_path):
    plan = tmp_path / "sm86.plan"
    plan.write_bytes(b"a plan")
    for compatibility, default in (("none", ""), ("ampere_plus", "sm86.plan")):
        manifest = manifest_of(plan, world.onnx, hardware_compatibility=compatibility)
        manifest_path(plan).write_text(json.dumps(manifest.to_json()))
        dataset, out = Dataset.load(world.data), tmp_path / compatibility
        made = assemble(trained, dataset, world.onnx, out, runtime="tensorrt", plans=[plan])
        config = parse_config((made / MODELS / "ranker" / "config.pbtxt").read_text())
        assert config.default_model_filename == default
        assert verify(made) == []


def test_a_plan_of_the_other_flavour(release, server, tmp_path):
    other = changed(release, tmp_path, flavour="tensorrt_rtx")
    assert "flavour: sm86.plan is of tensorrt_rtx" in unfit(other, server, HERE)[0]


def test_a_server_without_the_backend(release, tmp_path):
    (tmp_path / "backends").mkdir()
    bare = TritonBinary(tmp_path / "bin" / "tritonserver", backends=tmp_path / "backends")
    assert "no backend tensorrt" in unfit(release, bare, HERE)[0]


def test_this_machine(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nprintf '8.6\\n12.0\\n'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("TRT_VERSION", "10.8.0.43")
    monkeypatch.setenv("CUDA_VERSION", "12.8.0.038")
    assert Machine.here() == Machine(("sm86", "sm120"), "10.8.0.43", "12")
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert present_sms() == []


def test_without_a_fallback_it_is_not_started(release):
    with pytest.raises(ServeError, match="cannot be served here: .*no backend tensorrt.*--fallback onnxruntime"):
        TritonServer(release)


def test_onnx_runtime_of_triton(world, trained, tmp_path):
    dataset = Dataset.load(world.data)
    for provider, kind in (
        ("cpu", "KIND_CPU"),
        ("openvino", "KIND_CPU"),
        ("cuda", "KIND_GPU"),
        ("tensorrt", "KIND_GPU"),
    ):
        made = assemble(trained, dataset, world.onnx, tmp_path, runtime="onnxruntime", provider=provider, threads=2)
        config = parse_config((made / MODELS / "ranker" / "config.pbtxt").read_text())
        assert config.backend == "onnxruntime"
        assert config.instance_group[0].Kind.Name(config.instance_group[0].kind) == kind
        assert config.parameters["intra_op_thread_count"].string_value == "2"
        accelerators = config.optimization.execution_accelerators
        named = [*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator]
        assert [each.name for each in named] == ([provider] if provider in ("tensorrt", "openvino") else [])
        assert len(config.model_warmup) == 5
        assert config.parameters[BUCKETS_PARAMETER].string_value == "64,128,256,512,1024"
        assert sorted(p.name for p in (made / MODELS / "ranker" / "1").iterdir()) == ["model.onnx"]
        assert verify(made) == []


def test_cuda_graphs_of_every_bucket(release):
    config = parse_config((release / MODELS / "ranker" / "config.pbtxt").read_text())
    graphs = config.optimization.cuda.graph_spec
    assert config.optimization.cuda.graphs
    assert {(spec.batch_size, spec.input["candidates"].dim[0]) for spec in graphs} == {
        (batch, bucket) for batch in (1, 8) for bucket in (64, 128, 256, 512, 1024)
    }
    assert all(len(spec.input) == len(config.input) == len(spec.graph_lower_bound.input) for spec in graphs)


def test_a_plan_without_weights_is_not_assembled(world, trained, tmp_path):
    plan = tmp_path / "sm86.plan"
    plan.write_bytes(b"a plan")
    manifest = manifest_of(plan, world.onnx, flags=["REFIT", "STRIP_PLAN"])
    manifest_path(plan).write_text(json.dumps(manifest.to_json()))
    dataset = Dataset.load(world.data)
    with pytest.raises(BadModel, match="has no weights"):
        assemble(trained, dataset, world.onnx, tmp_path / "out", runtime="tensorrt", plans=[plan])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"runtime": "onnxruntime", "provider": "abacus"}, "none of cpu, openvino, cuda, tensorrt"),
        ({"runtime": "onnxruntime", "threads": 0}, "threads is 0"),
        ({"runtime": "onnxruntime", "engine": "openvino"}, "an engine is for --runtime python"),
        ({"runtime": "onnxruntime", "plans": [Path("sm86.plan")]}, "plans are for --runtime tensorrt"),
    ],
)
def test_choices_that_do_not_go_together(world, trained, tmp_path, choice, words):
    with pytest.raises(BadModel, match=words):
        assemble(trained, Dataset.load(world.data), world.onnx, tmp_path / "out", **choice)
    assert not (tmp_path / "out").exists()
