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
from torch.nn import functional as F

from trirank_build.compression.prune import Sparse
from trirank_build.compression.step import Context, Decisions, Quantised, StepSettings, Work, replace, shared_context
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData, BadRecipe
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features

LOW, HIGH = -128, 127
NARROWEST = 32
"""Linear layers of fewer inputs or outputs stay as they are: they cost next to nothing."""
_NO_PRODUCT = "head.0"
"""Its weights are multiplied with each request's own state before they are used (models.ranker.Head), so they are no
constants."""
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
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


def rebuild(model: nn.Module, decisions: Decisions) -> nn.Module:
    """See step.Step. Decisions: the precision, and the names of the layers and tables that have it."""
    precision = decisions["precision"]
    for name in decisions["linears"]:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        replace(model, name, QuantisedLinear(layer) if precision == "int8" else HalfLinear(layer, precision))
    for name in decisions["tables"]:
        table = model.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        replace(model, name, QuantisedTable(table) if precision == "int8" else HalfTable(table, precision))
    return model


class QuantisedLinear(nn.Module, Quantised):
    """A linear layer on INT8 inputs and weights; ``active`` False leaves it exact, while it waits for its turn."""

    input_scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.active = layer, True
        self.register_buffer("input_scale", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return F.linear(x, self._weight(), self.layer.bias)
        zero = torch.zeros((), dtype=torch.int32, device=x.device)
        x = torch.fake_quantize_per_tensor_affine(x, self.input_scale, zero, LOW, HIGH)
        return F.linear(x, self.quantised_weight(), self.layer.bias)

    def weight_scale(self) -> Tensor:
        """[out], one for each output channel."""
        return (self._weight().detach().abs().amax(1) / HIGH).clamp_min(1e-8)

    def quantised_weight(self) -> Tensor:
        """[out, in] as INT8 says it, gradients passed straight through."""
        weight, scale = self._weight(), self.weight_scale()
        zeros = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, LOW, HIGH)

    def exported(self) -> nn.Module:
        """What takes the layer's place in a graph."""
        return StoredLinear(self)

    def _weight(self) -> Tensor:
        return self.layer.dense_weight() if isinstance(self.layer, Sparse) else self.layer.weight


class QuantisedTable(nn.Module, Quantised):
    """An embedding table of INT8 rows, one scale a row; trained through the rounding, stored without it."""

    scale: Tensor

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.weight.detach())

    def forward(self, ids: Tensor) -> Tensor:
        scale = (self.weight.detach().abs().amax(1) / HIGH).clamp_min(1e-8)
        chosen, scales = F.embedding(ids, self.weight), F.embedding(ids, scale[:, None])
        rounded = torch.clamp(torch.round(chosen / scales), LOW, HIGH) * scales
        return chosen + (rounded - chosen).detach()

    def exported(self) -> nn.Module:
        """What takes the table's place in a graph."""
        return StoredTable(self.weight.detach())


class StoredLinear(nn.Module):
    """QuantizeLinear and DequantizeLinear of the inputs, DequantizeLinear of INT8 weights, MatMul. For export alone:
    its operators are symbols, which calculate nothing."""

    def __init__(self, layer: QuantisedLinear) -> None:
        super().__init__()
        weight, scale = layer.quantised_weight().detach(), layer.weight_scale()
        stored = torch.round(weight / scale[:, None]).clamp(LOW, HIGH).to(torch.int8)
        self.register_buffer("weight", stored.T.contiguous())  # [in, out], as MatMul takes it
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int8))
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("input_zero", torch.zeros((), dtype=torch.int8))
        self.bias = layer.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.input_scale, self.input_zero
        x = _operator("DequantizeLinear", _operator("QuantizeLinear", x, scale, zero), scale, zero)
        x = x @ _operator("DequantizeLinear", self.weight, self.weight_scale, self.weight_zero, axis=1)
        return x if self.bias is None else x + self.bias


class StoredTable(nn.Module):
    """INT8 rows [V, D], gathered before they are scaled by their own scale [V, 1]."""

    rows: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = (weight.abs().amax(1, keepdim=True) / HIGH).clamp_min(1e-8)
        self.register_buffer("rows", torch.clamp(torch.round(weight / scale), LOW, HIGH).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rows).float() * F.embedding(ids, self.scale)


def _operator(name: str, x: Any, scale: Any, zero: Any, **attributes: Any) -> Tensor:
    dtype = torch.int8 if name == "QuantizeLinear" else torch.float32
    found: Tensor = torch.onnx.ops.symbolic(name, (x, scale, zero), attributes, dtype=dtype, shape=x.shape)
    return found


class HalfLinear(nn.Module, Quantised):
    """A linear layer in FP16 or BF16, between FP32."""

    def __init__(self, layer: nn.Linear, precision: str) -> None:
        super().__init__()
        weight = layer.dense_weight() if isinstance(layer, Sparse) else layer.weight
        self.dtype = HALVES[precision]
        self.weight = nn.Parameter(weight.detach().to(self.dtype), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(self.dtype), False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight, self.bias).float()


class HalfTable(nn.Module, Quantised):
    """An embedding table in FP16 or BF16."""

    def __init__(self, table: nn.Embedding, precision: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.weight.detach().to(HALVES[precision]), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()


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
                model(**{name: t for name, t in batch.items() if name not in ("labels", "valid")})
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
