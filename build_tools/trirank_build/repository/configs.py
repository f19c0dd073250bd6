"""Every model's ``config.pbtxt``, written through Triton's own protobuf from the contract.

The files in ``model_repository/`` are these with -1 wherever a release decides; a test keeps them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from trirank import contract
from trirank.contract import PackedShape, TensorSpec
from tritonclient.grpc import model_config_pb2 as pb

from trirank_build.errors import BadModel

OPEN_SHAPE = PackedShape(*[-1] * len(PackedShape._fields))
"""Sizes not yet decided by a release."""
RUNTIMES = ("python", "tensorrt")
_FORWARDED = ("TOP_K", "SCENARIO")
"""What rerank reads straight from the request."""


@dataclass(frozen=True)
class Instances:
    """Instances of each stage. More rankers than one answer some more requests a second where there are cores for
    them, and answer single requests a little later, since each instance has caches of its own to warm."""

    preprocess: int = 1
    ranker: int = 1
    rerank: int = 1


def model_configs(
    shape: PackedShape,
    runtime: str,
    instances: Instances,
    plans: dict[str, str] | None = None,
    engine: str = "onnxruntime",
) -> dict[str, str]:
    """Model name → text of its config.pbtxt.

    Args:
        engine: for ``python``: one of trirank_backend.scoring.ENGINES.
        plans: for ``tensorrt``: compute capability ("8.6") → plan file, one optimisation profile a bucket in each.

    Raises:
        BadModel: the runtime is not known.
    """
    if runtime not in RUNTIMES:
        raise BadModel(f"runtime {runtime!r} is none of {', '.join(RUNTIMES)}")
    request, answer = contract.REQUEST, contract.RESPONSE
    packed, scores = contract.ranker_inputs(shape), contract.ranker_outputs(shape)
    between = (contract.ITEMS, contract.PREPROCESS_STATUS)
    forwarded = tuple(spec for spec in request if spec.name in _FORWARDED)
    to_preprocess = tuple(spec for spec in request if spec.name not in _FORWARDED)
    preprocess = _python(contract.PREPROCESS, (*to_preprocess, *forwarded), (*packed, *between), instances.preprocess)
    rerank = _python(contract.RERANK, (*scores, *between, *forwarded), answer, instances.rerank)
    if runtime == "python":
        ranker = _python(contract.RANKER, packed, scores, instances.ranker, ragged=False)
        ranker.parameters["engine"].string_value = engine
    else:
        ranker = _tensorrt(packed, scores, plans or {})
    configs = {config.name: config for config in (preprocess, ranker, rerank, _ensemble(preprocess, ranker, rerank))}
    return {name: text_format.MessageToString(config) for name, config in configs.items()}


def parse_config(text: str) -> Any:
    """A config.pbtxt as Triton reads it."""
    return text_format.Parse(text, pb.ModelConfig())


def _python(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], count: int, ragged: bool = True
) -> Any:
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=contract.MAX_BATCH)
    _add_tensors(config, inputs, outputs)
    for tensor in config.input:
        # A Python stage pads for itself, so requests of different buckets may share a batch there.
        tensor.allow_ragged_batch = ragged and -1 in tensor.dims
    config.instance_group.add(count=count, kind=pb.ModelInstanceGroup.KIND_CPU)
    # No queue delay: batches form by themselves while the instances are busy.
    config.dynamic_batching.SetInParent()
    return config


def _tensorrt(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], plans: dict[str, str]) -> Any:
    config = pb.ModelConfig(name=contract.RANKER, platform="tensorrt_plan", max_batch_size=contract.MAX_BATCH)
    _add_tensors(config, inputs, outputs)
    group = config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU)
    group.profile.extend(str(index) for index in range(len(contract.BUCKETS)))
    for capability, file in sorted(plans.items()):
        config.cc_model_filenames[capability] = file
    config.dynamic_batching.SetInParent()
    return config


def _ensemble(*stages: Any) -> Any:
    config = pb.ModelConfig(name=contract.ENSEMBLE, platform="ensemble", max_batch_size=contract.MAX_BATCH)
    _add_tensors(config, contract.REQUEST, contract.RESPONSE)
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


def main() -> None:
    """Write the files of ``model_repository/`` again."""
    folder = Path(__file__).parent.parent / "model_repository"
    for name, text in model_configs(OPEN_SHAPE, "python", Instances()).items():
        (folder / name / "config.pbtxt").write_text(text)


if __name__ == "__main__":
    main()
