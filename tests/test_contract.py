"""Everything that crosses a boundary is what the contract says: every config.pbtxt, and the exported graph."""

from __future__ import annotations

import onnx
import pytest
from trirank import contract
from trirank_build.errors import BadModel
from trirank_build.repository.configs import (
    OPEN_SHAPE,
    Instances,
    RankerRuntime,
    model_configs,
    parse_config,
    problems_of,
    templates,
)
from trirank_build.repository.release import MODELS, TEMPLATES
from tritonclient.grpc import model_config_pb2 as pb

REQUEST, RESPONSE = contract.INPUTS, contract.OUTPUTS


def described(tensors):
    return {t.name: (pb.DataType.Name(t.data_type).removeprefix("TYPE_"), tuple(t.dims)) for t in tensors}


def expected(specs):
    return {s.name: ("STRING" if s.dtype == "BYTES" else s.dtype, s.shape) for s in specs}


def configs_of(folder):
    return {path.parent.name: parse_config(path.read_text()) for path in folder.glob("*/config.pbtxt")}


@pytest.fixture(scope="module", params=["repository", "release"])
def configs(request, world, trained):
    if request.param == "repository":
        return configs_of(TEMPLATES), OPEN_SHAPE
    return configs_of(world.release / MODELS), trained.features.spec.shape


def test_the_four_models_are_there(configs):
    others = {"single", contract.FEEDBACK}
    assert {contract.ENSEMBLE, *contract.STAGES} <= set(configs[0]) <= {contract.ENSEMBLE, *contract.STAGES, *others}


def test_the_ensemble_is_the_contract(configs):
    ensemble = configs[0][contract.ENSEMBLE]
    assert described(ensemble.input) == expected(REQUEST)
    assert described(ensemble.output) == expected(RESPONSE)
    assert {t.name for t in ensemble.input if t.optional} == {s.name for s in REQUEST if s.optional}


def test_the_ranker_is_the_contract(configs):
    found, shape = configs
    ranker = found[contract.RANKER]
    assert described(ranker.input) == expected(contract.ranker_inputs(shape))
    assert described(ranker.output) == expected(contract.ranker_outputs(shape))


def test_preprocess_gives_what_ranker_and_rerank_take(configs):
    found = configs[0]
    given = described(found[contract.PREPROCESS].output) | described(found[contract.RANKER].output)
    given |= expected(REQUEST)
    for stage in (contract.RANKER, contract.RERANK):
        for name, what in described(found[stage].input).items():
            assert given[name] == what


def test_every_tensor_of_every_step_is_mapped(configs):
    found = configs[0]
    steps = {step.model_name: step for step in found[contract.ENSEMBLE].ensemble_scheduling.step}
    assert list(steps) == list(contract.STAGES)
    for name, step in steps.items():
        assert set(step.input_map) == {tensor.name for tensor in found[name].input}
        assert set(step.output_map) == {tensor.name for tensor in found[name].output}


def test_batching_is_on_without_delay(configs):
    for name in contract.STAGES:
        config = configs[0][name]
        assert config.HasField("dynamic_batching")
        assert config.dynamic_batching.max_queue_delay_microseconds == 0
        assert config.max_batch_size == contract.MAX_BATCH


def test_no_queue_has_a_policy_that_lets_requests_sleep(configs):
    for config in configs[0].values():
        assert not config.dynamic_batching.HasField("default_queue_policy")


def test_all_stages_in_one_model_are_the_contract():
    text = model_configs(OPEN_SHAPE, RankerRuntime(engine="openvino"), Instances(single=2), "single")
    assert list(text) == [contract.ENSEMBLE]
    config = parse_config(text[contract.ENSEMBLE])
    assert problems_of(config) == []
    assert config.backend == "python"
    assert config.instance_group[0].count == 2
    assert config.parameters["engine"].string_value == "openvino"
    assert config.parameters[contract.CONTRACT_PARAMETER].string_value == str(contract.CONTRACT_VERSION)


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_other_runtimes_need_a_model_of_their_own(runtime):
    with pytest.raises(BadModel, match=f"{runtime} needs a model of its own: --pipeline ensemble"):
        model_configs(OPEN_SHAPE, RankerRuntime(runtime), Instances(), "single")


def test_a_pipeline_that_there_is_not():
    with pytest.raises(BadModel, match="'duet' is none of ensemble, single"):
        model_configs(OPEN_SHAPE, RankerRuntime(), Instances(), "duet")


def test_no_cache_on_personal_answers(configs):
    assert not any(config.response_cache.enable for config in configs[0].values())


def test_no_name_is_both_input_and_output_of_the_ensemble():
    assert not {s.name for s in REQUEST} & {s.name for s in RESPONSE}


def test_the_files_in_the_repository_are_what_the_code_writes():
    for name, text in templates().items():
        path = TEMPLATES / name / "config.pbtxt"
        assert path.read_text() == text, f"run python -m trirank_build.repository.configs to write {path} again"


def test_the_onnx_is_the_contract(world, trained):
    graph = onnx.load(str(world.onnx)).graph
    shape = trained.features.spec.shape
    for values, specs in (
        (graph.input, contract.ranker_inputs(shape)),
        (graph.output, contract.ranker_outputs(shape)),
    ):
        types = {onnx.TensorProto.INT32: "INT32", onnx.TensorProto.FLOAT: "FP32"}
        found = {
            v.name: (
                types[v.type.tensor_type.elem_type],
                tuple(d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim),
            )
            for v in values
        }
        assert found == {s.name: (s.dtype, (-1, *s.shape)) for s in specs}


def test_tensorrt_config_has_a_profile_a_bucket(trained):
    shape = trained.features.spec.shape
    text = model_configs(shape, RankerRuntime("tensorrt", plans={"8.6": "sm86.plan", "8.9": "sm89.plan"}), Instances())[
        contract.RANKER
    ]
    config = parse_config(text)
    assert config.platform == "tensorrt_plan"
    assert list(config.instance_group[0].profile) == [str(at) for at in range(len(contract.BUCKETS))]
    assert dict(config.cc_model_filenames) == {"8.6": "sm86.plan", "8.9": "sm89.plan"}


@pytest.mark.parametrize(("count", "bucket"), [(1, 64), (64, 64), (65, 128), (200, 256), (1024, 1024)])
def test_buckets(count, bucket):
    assert contract.bucket_for(count) == bucket


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_no_bucket(count):
    with pytest.raises(ValueError, match="1 to 1024"):
        contract.bucket_for(count)


def test_stable_ids_do_not_change():
    # Catalogues and histories on disk hold these numbers.
    assert contract.stable_id("SKU-1") == 7664180966255574605
    assert len({contract.stable_id(f"SKU-{i}") for i in range(10_000)}) == 10_000
    assert all(contract.stable_id(f"SKU-{i}") >= 0 for i in range(1_000))
