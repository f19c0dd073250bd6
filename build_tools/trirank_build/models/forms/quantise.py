"""Layers and tables of fewer bits: INT8 with fake quantisation, FP16, BF16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trirank_build.models.forms.form import Decisions, Quantised, replace
from trirank_build.models.forms.prune import Sparse

LOW, HIGH = -128, 127
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
