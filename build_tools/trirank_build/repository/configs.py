"""Every model's ``config.pbtxt``, written through Triton's own protobuf from the contract.

The files in ``model_repository/`` are these with -1 wherever a release decides; a test keeps them so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from trirank import contract
from trirank.contract import PackedShape, TensorSpec
from tritonclient.grpc import model_config_pb2 as pb

from trirank_build.errors import BadModel

OPEN_SHAPE = PackedShape(*[-1] * len(PackedShape._fields))
"""Sizes not yet decided by a release."""
RUNTIMES = ("python", "onnxruntime", "tensorrt")
PIPELINES = ("ensemble", "single")
"""How the stages run: as three models and an ensemble of them, or all in the process of one Python model."""
PROVIDERS = ("cpu", "openvino", "cuda", "tensorrt")
"""Execution providers of Triton's ONNX Runtime backend."""
GRAPH_BATCHES = ((1, 1), (8, 2))
"""Batch sizes of the CUDA graphs of each bucket, and the smallest batch that each may serve."""
BUCKETS_PARAMETER = "candidate_buckets"
"""Says in the ranker's configuration which lengths its variable axis takes, so that equal shapes do meet."""


@dataclass(frozen=True)
class Instances:
    """Instances of each stage, or of the pipeline ``single``. More rankers than one answer some more requests a second
    where there are cores for them, and answer single requests a little later, since each instance has caches of its own
    to warm."""

    preprocess: int = 1
    ranker: int = 1
    rerank: int = 1
    single: int = 1


@dataclass(frozen=True)
class Batching:
    """Of every model.

    Attributes:
        most: requests of a batch.
        delay_us: how long the first of them waits for company; nobody does, by default: batches form while others are
            worked on.
    """

    most: int = contract.MAX_BATCH
    delay_us: int = 0

    def __post_init__(self) -> None:
        """Raises BadModel for what no release can have."""
        if not 1 <= self.most <= contract.MAX_BATCH:
            raise BadModel(f"a batch has {self.most} requests; it has 1 to {contract.MAX_BATCH}")
        if self.delay_us < 0:
            raise BadModel(f"the queue delay is {self.delay_us} µs; it is 0 or more")


@dataclass(frozen=True)
class RankerRuntime:
    """What scores, and how.

    Attributes:
        name: one of RUNTIMES.
        engine: for ``python``: one of trirank_backend.scoring.ENGINES.
        provider: for ``onnxruntime``: one of PROVIDERS.
        threads: for ``python`` and ``onnxruntime``: of one call on a CPU.
        plans: for ``tensorrt``: compute capability ("8.6") → plan file, one optimisation profile a bucket in each.
        other_gpus: for ``tensorrt``: the plan for GPUs that ``plans`` does not name; empty: none runs on them.
    """

    name: str = "python"
    engine: str = "onnxruntime"
    provider: str = "cpu"
    threads: int = 1
    plans: Mapping[str, str] = field(default_factory=dict)
    other_gpus: str = ""

    def __post_init__(self) -> None:
        """Raises BadModel if the runtime or provider is not known."""
        if self.name not in RUNTIMES:
            raise BadModel(f"runtime {self.name!r} is none of {', '.join(RUNTIMES)}")
        if self.provider not in PROVIDERS:
            raise BadModel(f"provider {self.provider!r} is none of {', '.join(PROVIDERS)}")
        if self.threads < 1:
            raise BadModel(f"threads is {self.threads}; a call needs 1 or more")


def models_of(pipeline: str) -> tuple[str, ...]:
    """Names of the models that a release of this pipeline holds.

    Raises:
        BadModel: there is no such pipeline.
    """
    if pipeline not in PIPELINES:
        raise BadModel(f"pipeline {pipeline!r} is none of {', '.join(PIPELINES)}")
    return (contract.ENSEMBLE,) if pipeline == "single" else (contract.ENSEMBLE, *contract.STAGES)


def model_configs(
    shape: PackedShape,
    runtime: RankerRuntime,
    instances: Instances,
    pipeline: str = "ensemble",
    ids: Mapping[str, str] | None = None,
    batching: Batching | None = None,
) -> dict[str, str]:
    """Model name → text of its config.pbtxt.

    Args:
        ids: ``item`` and ``user`` → ``numbers`` or ``strings``, for clients to know.

    Raises:
        BadModel: there is no such pipeline, or the runtime does not run in it.
    """
    models_of(pipeline)
    if pipeline == "single":
        single = _single(runtime, instances.single)
        _tell_ids(single, ids or {})
        return _batched({contract.ENSEMBLE: single}, batching or Batching())
    packed, scores = contract.ranker_inputs(shape), contract.ranker_outputs(shape)
    preprocess = _python(contract.PREPROCESS, contract.INPUTS, (*packed, contract.HANDOVER), instances.preprocess)
    rerank = _python(contract.RERANK, (*scores, contract.HANDOVER), contract.OUTPUTS, instances.rerank)
    ranker = _ranker(packed, scores, runtime, instances.ranker)
    configs = {config.name: config for config in (preprocess, ranker, rerank, _ensemble(preprocess, ranker, rerank))}
    _tell_ids(configs[contract.ENSEMBLE], ids or {})
    return _batched(configs, batching or Batching())


def _batched(configs: dict[str, Any], batching: Batching) -> dict[str, str]:
    """Texts of configurations, with batches as they shall be."""
    for config in configs.values():
        config.max_batch_size = batching.most
        if config.HasField("dynamic_batching") and batching.delay_us:
            config.dynamic_batching.max_queue_delay_microseconds = batching.delay_us
    return {name: config_text(config) for name, config in configs.items()}


def feedback_config() -> Any:
    """The configuration of the model that takes feedback. What comes while a batch is on its way to the disk is the
    next batch: the more events, the more of them a commit has."""
    return _python(contract.FEEDBACK, contract.FEEDBACK_REQUEST, contract.FEEDBACK_RESPONSE, 1, ragged=False)


def _tell_ids(config: Any, ids: Mapping[str, str]) -> None:
    for what, kind in ids.items():
        config.parameters[contract.ID_PARAMETERS[what]].string_value = kind


def ranker_config(shape: PackedShape, runtime: RankerRuntime) -> Any:
    """The ranker's configuration alone, for a runtime that takes another one's place."""
    return _ranker(contract.ranker_inputs(shape), contract.ranker_outputs(shape), runtime, 1)


def packed_shape(ranker: Any) -> PackedShape:
    """The sizes that a ranker's configuration declares.

    Raises:
        BadModel: a tensor of the contract is missing.
    """
    dims = {tensor.name: tuple(tensor.dims) for tensor in (*ranker.input, *ranker.output)}
    try:
        (length, width), (query,), context = dims["history"], dims["query"], dims["context"][0]
        fields, dense, tasks = (dims[name][1] for name in ("candidates", "dense", "scores"))
    except (KeyError, ValueError, IndexError) as error:
        raise BadModel(
            f"the configuration of {ranker.name} is not of the contract ({error}); assemble again"
        ) from error
    return PackedShape(length, width, query, fields, dense, context, tasks)


def problems_of(config: Any) -> list[str]:
    """In what a stage's configuration, or the ensemble's, differs from the contract."""
    packed, scores = contract.ranker_inputs(OPEN_SHAPE), contract.ranker_outputs(OPEN_SHAPE)
    wanted = {
        contract.ENSEMBLE: (contract.INPUTS, contract.OUTPUTS),
        contract.PREPROCESS: (contract.INPUTS, (*packed, contract.HANDOVER)),
        contract.RANKER: (packed, scores),
        contract.RERANK: ((*scores, contract.HANDOVER), contract.OUTPUTS),
    }
    problems = []
    for kind, specs, tensors in zip(
        ("input", "output"), wanted[config.name], (config.input, config.output), strict=True
    ):
        declared = {tensor.name: tensor for tensor in tensors}
        problems += [
            f"{kind} {name} is not of the contract" for name in sorted(declared.keys() - {s.name for s in specs})
        ]
        for spec in specs:
            tensor = declared.get(spec.name)
            if tensor is None:
                problems.append(f"{kind} {spec.name} is missing")
            elif tensor.data_type != _type(spec):
                problems.append(f"{kind} {spec.name} is {pb.DataType.Name(tensor.data_type)}, not {spec.dtype}")
            elif len(tensor.dims) != len(spec.shape) or any(
                own != given for own, given in zip(spec.shape, tensor.dims, strict=True) if own != -1
            ):
                problems.append(f"{kind} {spec.name} has shape {list(tensor.dims)}, not {list(spec.shape)}")
    if not 1 <= config.max_batch_size <= contract.MAX_BATCH:
        problems.append(f"max_batch_size is {config.max_batch_size}, not 1 to {contract.MAX_BATCH}")
    return problems


def parse_config(text: str) -> Any:
    """A config.pbtxt as Triton reads it."""
    return text_format.Parse(text, pb.ModelConfig())


def config_text(config: Any) -> str:
    """A config.pbtxt."""
    return text_format.MessageToString(config)


def _ranker(packed: Sequence[TensorSpec], scores: Sequence[TensorSpec], runtime: RankerRuntime, count: int) -> Any:
    if runtime.name == "python":
        config = _python(contract.RANKER, packed, scores, count, ragged=False)
        _tell_engine(config, runtime)
    elif runtime.name == "onnxruntime":
        config = _onnxruntime(packed, scores, runtime, count)
    else:
        config = _tensorrt(packed, scores, runtime)
    config.parameters[BUCKETS_PARAMETER].string_value = ",".join(str(bucket) for bucket in contract.BUCKETS)
    return config


def _python(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], count: int, ragged: bool = True
) -> Any:
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=contract.MAX_BATCH)
    _add_tensors(config, inputs, outputs)
    for tensor in config.input:
        # A Python stage pads for itself, so requests of different buckets may share a batch there.
        tensor.allow_ragged_batch = ragged and -1 in tensor.dims
    config.instance_group.add(count=count, kind=pb.ModelInstanceGroup.KIND_CPU)
    _batch(config)
    return config


def _single(runtime: RankerRuntime, count: int) -> Any:
    if runtime.name != "python":
        raise BadModel(
            f"--pipeline single runs the ranker in its own process, with --runtime python; {runtime.name} needs a "
            "model of its own: --pipeline ensemble"
        )
    config = _python(contract.ENSEMBLE, contract.INPUTS, contract.OUTPUTS, count)
    _tell_engine(config, runtime)
    config.parameters[contract.CONTRACT_PARAMETER].string_value = str(contract.CONTRACT_VERSION)
    return config


def _tell_engine(config: Any, runtime: RankerRuntime) -> None:
    config.parameters["engine"].string_value = runtime.engine
    if runtime.threads > 1:
        config.parameters["threads"].string_value = str(runtime.threads)


def _onnxruntime(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], runtime: RankerRuntime, count: int
) -> Any:
    config = pb.ModelConfig(name=contract.RANKER, backend="onnxruntime", max_batch_size=contract.MAX_BATCH)
    _add_tensors(config, inputs, outputs)
    on_gpu = runtime.provider in ("cuda", "tensorrt")
    config.instance_group.add(
        count=count, kind=pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    )
    # Without numbers ONNX Runtime starts a spinning thread a core in every instance.
    config.parameters["intra_op_thread_count"].string_value = str(runtime.threads)
    config.parameters["inter_op_thread_count"].string_value = "1"
    accelerators = config.optimization.execution_accelerators
    if runtime.provider == "tensorrt":
        accelerators.gpu_execution_accelerator.add(name="tensorrt")
    elif runtime.provider == "openvino":
        accelerators.cpu_execution_accelerator.add(name="openvino")
    _batch(config)
    _warm_up(config)
    return config


def _tensorrt(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], runtime: RankerRuntime) -> Any:
    config = pb.ModelConfig(name=contract.RANKER, platform="tensorrt_plan", max_batch_size=contract.MAX_BATCH)
    _add_tensors(config, inputs, outputs)
    group = config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU)
    group.profile.extend(str(index) for index in range(len(contract.BUCKETS)))
    for capability, file in sorted(runtime.plans.items()):
        config.cc_model_filenames[capability] = file
    config.default_model_filename = runtime.other_gpus
    cuda = config.optimization.cuda
    cuda.graphs = True
    for bucket in contract.BUCKETS:
        for batch, smallest in GRAPH_BATCHES:
            spec = cuda.graph_spec.add(batch_size=batch)
            spec.graph_lower_bound.batch_size = smallest
            for tensor in inputs:
                dims = [bucket if axis < 0 else axis for axis in tensor.shape]
                spec.input[tensor.name].dim.extend(dims)
                spec.graph_lower_bound.input[tensor.name].dim.extend(dims)
    _batch(config)
    _warm_up(config)
    return config


def _batch(config: Any) -> None:
    """Batches form by themselves while the instances are busy, without a queue delay.

    And without a queue policy: with a timeout, an override of it or a largest size, Triton's batcher prepares no batch
    while an instance is at work, and a request that comes between an answer and the instance's return to its queue
    wakes nobody, until half a second is over (triton-inference-server/core: PriorityQueue,
    RateLimiter::PayloadSlotAvailable; docs/performance.md has the measurements). What comes too late is refused by the
    stages; what its caller has given up is taken out of the queue by Triton.
    """
    config.dynamic_batching.SetInParent()


def _warm_up(config: Any) -> None:
    """A first request of each bucket, so that no caller waits for what a runtime prepares late."""
    for bucket in contract.BUCKETS:
        warm_up = config.model_warmup.add(name=f"bucket {bucket}", batch_size=1)
        for tensor in config.input:
            sample = warm_up.inputs[tensor.name]
            sample.data_type, sample.zero_data = tensor.data_type, True
            sample.dims.extend(bucket if axis < 0 else axis for axis in tensor.dims)


def _ensemble(*stages: Any) -> Any:
    config = pb.ModelConfig(name=contract.ENSEMBLE, platform="ensemble", max_batch_size=contract.MAX_BATCH)
    _add_tensors(config, contract.INPUTS, contract.OUTPUTS)
    config.parameters[contract.CONTRACT_PARAMETER].string_value = str(contract.CONTRACT_VERSION)
    # No tensor is renamed on its way, which works because the contract gives no two the same name.
    for stage in stages:
        step = config.ensemble_scheduling.step.add(model_name=stage.name, model_version=-1)
        for tensor in stage.input:
            step.input_map[tensor.name] = tensor.name
        for tensor in stage.output:
            step.output_map[tensor.name] = tensor.name
    return config


def _add_tensors(config: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        config.input.add(name=spec.name, data_type=_type(spec), dims=spec.shape, optional=spec.optional)
    for spec in outputs:
        config.output.add(name=spec.name, data_type=_type(spec), dims=spec.shape)


def _type(spec: TensorSpec) -> int:
    return int(pb.DataType.Value("TYPE_STRING" if spec.dtype == "BYTES" else f"TYPE_{spec.dtype}"))


def templates() -> dict[str, str]:
    """Folder of ``model_repository/`` → text of its config.pbtxt."""
    runtime, instances = RankerRuntime(), Instances()
    single = model_configs(OPEN_SHAPE, runtime, instances, "single")[contract.ENSEMBLE]
    feedback = config_text(feedback_config())
    return model_configs(OPEN_SHAPE, runtime, instances) | {"single": single, contract.FEEDBACK: feedback}


def main() -> None:
    """Write the files of ``model_repository/`` again."""
    folder = Path(__file__).parent.parent / "model_repository"
    for name, text in templates().items():
        (folder / name / "config.pbtxt").write_text(text)


if __name__ == "__main__":
    main()
