"""Fewer bits: INT8 as QDQ, FP16, BF16.

INT8 is symmetric with zero point 0, as TensorRT wants it: one scale for each output channel of a linear layer's
weights, one scale for its inputs. Only products with constant weights are quantised: the attention's own products cost
more to quantise than they save. Rows of embedding tables get one scale each. What the module computes with fake
quantisation is what the exported graph computes with QuantizeLinear and DequantizeLinear.

How the weights get used to it (``mode``):

- post_training: they do not; only the scales of the inputs are found, on real requests (``calibration``)
- aware: training with fake quantisation, gradients passed straight through (Jacob et al., CVPR 2018)
- incremental: group by group, what is quantised stays frozen while the rest is trained (after Zhou et al., ICLR 2017)

FP16 and BF16 round weights and the inputs of linear layers; LayerNorm, softmax and all sums between layers stay in
FP32, since LayerNorm overflows in FP16 (NVIDIA/TensorRT #2564).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector
from pydantic import Field, model_validator
from torch import Tensor, nn

from trirank_build.compression.step import JUDGED, Context, StepSettings, Work
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData, BadRecipe
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features
from trirank_build.models.forms.form import Decisions, shared_context
from trirank_build.models.forms.quantise import HIGH, QuantisedLinear, rebuild

NARROWEST = 32
"""Linear layers of fewer inputs or outputs stay as they are: they cost next to nothing."""
_NO_PRODUCT = "head.0"
"""Its weights are multiplied with each request's own state before they are used (models.ranker.Head), so they are no
constants."""
_BINS = 2_048
_VALUES = 1 << 18
"""Of a layer's inputs in one batch that a histogram reads."""


class Settings(StepSettings):
    """What becomes of weights and inputs."""

    kind: Literal["quantise"] = "quantise"
    precision: Literal["int8", "float16", "bfloat16"] = "int8"
    mode: Literal["post_training", "aware", "incremental"] = "post_training"
    calibration: Literal["minmax", "entropy", "percentile"] = "percentile"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    requests: Annotated[int, Field(ge=1)] = 256
    """Real ones, read for the scales of inputs."""
    calibration_data: Path | None = None
    """Another dataset whose training requests are read instead of those of the chain's."""
    groups: Annotated[int, Field(ge=2)] = 3
    """Of layers, for incremental."""
    embeddings: bool = True
    """Whether embedding tables are quantised too."""
    skip: tuple[str, ...] = ()
    """Names of layers to leave as they are."""

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.precision != "int8" and self.mode != "post_training":
            raise ValueError(f'precision = "{self.precision}" needs no training; say mode = "post_training"')
        return self

    @property
    def reads(self) -> str:
        """See StepSettings."""
        if self.precision != "int8":
            return ""
        if self.mode != "post_training":
            return f'mode = "{self.mode}"'
        return "" if self.calibration_data is not None else "calibration"


def check(model: nn.Module, settings: Settings, features: Features) -> tuple[nn.Module, Features]:
    """See step.Step."""
    shared_context(model, "quantise")
    if unknown := set(settings.skip) - set(_linears(model)):
        raise BadRecipe(f"quantise.skip names {sorted(unknown)}; the layers are {', '.join(_linears(model))}")
    if settings.calibration_data is not None:
        _calibration_examples(settings.calibration_data, features)
    decisions = _decide(model, settings)
    if not decisions["linears"] and not decisions["tables"]:
        raise BadRecipe(f"quantise finds nothing: embeddings = false, and no linear layer that is not skipped has "
                        f"{NARROWEST} inputs and outputs")  # fmt: skip
    return rebuild(model, decisions), features


def run(work: Work, settings: Settings, context: Context) -> None:
    """See step.Step."""
    decisions = _decide(work.model, settings)
    work.model = rebuild(work.model, decisions)
    work.decisions.append((settings.kind, decisions))
    if settings.precision != "int8":
        return
    if settings.calibration_data is None:
        batches = context.batches(work.features, settings.requests)
    else:
        examples = _calibration_examples(settings.calibration_data, work.features)
        batches = list(_inputs(examples, settings.requests))
    calibrate(work.model, batches, settings)
    if settings.mode == "aware":
        context.finetune(work, settings.training, "aware")
    elif settings.mode == "incremental":
        _incrementally(work, settings, context)


def calibrate(model: nn.Module, batches: Iterable[dict[str, Tensor]], settings: Settings) -> None:
    """Find the scale of each layer's inputs; the layers are exact while they are watched.

    ``minmax`` takes the largest value, ``entropy`` the cut whose histogram diverges least from the whole one,
    ``percentile`` the value that so many are below; histograms are ONNX Runtime's own."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    if not layers:  # tables alone need no calibration
        return
    method = "entropy" if settings.calibration == "entropy" else "percentile"
    collector = HistogramCollector(method, True, _BINS, 128, settings.percentile, "same")
    largest = dict.fromkeys(layers, 0.0)
    seen: dict[str, list[NDArray[np.float32]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().flatten()
            largest[name] = max(largest[name], float(values.abs().max()))
            step = max(1, len(values) // _VALUES)
            seen[name] = [values[::step].numpy()]

        return hook

    model.eval()
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    for layer in layers.values():
        layer.active = False
    try:
        # The collector tells what it does on the standard output, where results go.
        with torch.no_grad(), redirect_stdout(StringIO()):
            for batch in batches:
                model(**{name: t for name, t in batch.items() if name not in JUDGED})
                if settings.calibration != "minmax":
                    collector.collect(seen)
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer.active = True
    if settings.calibration != "minmax":
        with redirect_stdout(StringIO()):
            found = collector.compute_collection_result()
        largest = {name: float(np.abs(np.asarray(found[name][:2])).max()) for name in layers}
    for name, layer in layers.items():
        layer.input_scale.fill_(max(largest[name], 1e-6) / HIGH)


def _incrementally(work: Work, settings: Settings, context: Context) -> None:
    linears = [module for module in work.model.modules() if isinstance(module, QuantisedLinear)]
    for layer in linears:
        layer.active = False
    # Those nearest to the scores are quantised last, so that what follows can make up for what came before.
    parts = np.array_split(np.arange(len(linears)), min(settings.groups, len(linears)))
    for number, part in enumerate(parts, 1):
        for at in part:
            linears[at].active = True
            linears[at].requires_grad_(False)
        if number < len(parts):
            context.finetune(work, settings.training, f"group-{number}")
    work.model.requires_grad_(True)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _decide(model: nn.Module, settings: Settings) -> Decisions:
    linears = [
        name for name, layer in _linears(model).items()
        if name not in (*settings.skip, _NO_PRODUCT) and min(layer.in_features, layer.out_features) >= NARROWEST
    ]  # fmt: skip
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return {"precision": settings.precision, "linears": linears, "tables": tables if settings.embeddings else []}


def _calibration_examples(directory: Path, features: Features) -> Examples:
    """The training requests of another dataset.

    Raises:
        BadData: its schema is another one, or its items are not those of the catalogue.
    """
    dataset, spec = Dataset.load(directory), features.spec
    for what, own, given in (
        ("tasks", spec.tasks, tuple(dataset.description.tasks)), ("timed", spec.timed, dataset.description.timed),
    ):  # fmt: skip
        if own != given:
            raise BadData(f"calibration data {directory} has {what} {given}, the ranker {own}; calibrate with requests "
                          "of the service that it ranks for")  # fmt: skip
    known = float((features.catalogue.rows(dataset.items["item_id"].to_numpy()) >= 0).mean())
    if known < 0.5:
        raise BadData(f"calibration data {directory} shares {known:.0%} of its items with the ranker's catalogue; at "
                      "least half must be known, or its requests say nothing about the ones served")  # fmt: skip
    return Examples.read(dataset, "train", features)


def _inputs(examples: Examples, count: int) -> Iterable[dict[str, Any]]:
    for start in range(0, min(count, len(examples)), 64):
        which = np.arange(start, min(start + 64, count, len(examples)))
        yield {name: torch.from_numpy(array) for name, array in examples.whole(which).packed.tensors().items()}
