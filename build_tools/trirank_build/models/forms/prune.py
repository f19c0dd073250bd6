"""Rankers of fewer heads, narrower layers, fewer blocks, and layers of which two of four weights are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trirank_build.errors import BadRecipe
from trirank_build.models.forms.form import Decisions, replace, shared_context
from trirank_build.models.ranker import Attention, SharedContextRanker


def rebuild(model: nn.Module, decisions: Decisions) -> nn.Module:
    """See step.Step. Decisions: what is kept of each part, and of which blocks."""
    ranker = shared_context(model, "prune")
    if (kept := decisions.get("blocks")) is not None:
        ranker.encoder = nn.ModuleList(ranker.encoder[at] for at in kept)
    with torch.no_grad():
        for name, heads in decisions["heads"].items():
            attention = ranker.get_submodule(name)
            assert isinstance(attention, Attention)
            _keep_heads(attention, heads)
        for name, places in decisions["ffn"].items():
            layers = ranker.get_submodule(name)
            assert isinstance(layers, nn.Sequential)
            layers[0] = _rows(layers[0], torch.tensor(places))
            layers[2] = _columns(layers[2], torch.tensor(places))
        if (numbers := decisions.get("width")) is not None:
            _keep_numbers(ranker, torch.tensor(numbers))
        if (length := decisions.get("history_length")) is not None:
            events = ranker.position[: ranker.history_length][-length:]
            ranker.position = nn.Parameter(torch.cat([events, ranker.position[ranker.history_length :]]))
            ranker.history_length = length
        if decisions.get("sparsity") == "2:4":
            for name, layer in sparse_layers(ranker).items():
                replace(ranker, name, Sparse(layer))
    return ranker


class Sparse(nn.Linear):
    """A linear layer of which two of every four neighbouring weights of a row are zero, whatever training does."""

    kept: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        groups = layer.weight.detach().abs().reshape(len(layer.weight), -1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(2, dim=2).indices, True)
        self.register_buffer("kept", kept.flatten(1))
        self.weight.data *= self.kept

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight(), self.bias)

    def dense_weight(self) -> Tensor:
        """[out, in] with its zeros."""
        return self.weight * self.kept


def feed_forwards(ranker: SharedContextRanker) -> dict[str, nn.Linear]:
    """Name of each pair of layers → its first one, whose outputs are the places that can go."""
    found = {}
    for name, module in ranker.named_modules():
        if isinstance(module, nn.Sequential) and len(module) == 3 and isinstance(module[1], nn.GELU):
            if not (isinstance(module[0], nn.Linear) and isinstance(module[2], nn.Linear)):
                raise BadRecipe(f"prune does not fit {name}, whose layers were factorised or quantised; prune first")
            found[name] = module[0]
    return found


def sparse_layers(ranker: SharedContextRanker) -> dict[str, nn.Linear]:
    blocks = {**{f"encoder.{name}": m for name, m in ranker.encoder.named_modules()},
              **{f"cross.{name}": m for name, m in ranker.cross.named_modules()}}  # fmt: skip
    return {n: m for n, m in blocks.items() if type(m) is nn.Linear and m.in_features % 4 == 0}


def embedding_tables(ranker: SharedContextRanker) -> list[str] | None:
    """Names of the tables of vectors; None where a table is no plain one."""
    names = ["embedding" if isinstance(ranker.embedding, nn.Embedding) else "embedding.table"]
    names += ["folded"] if ranker.folded is not None else []
    modules = dict(ranker.named_modules())
    return names if all(isinstance(modules.get(name), nn.Embedding) for name in names) else None


def axes(ranker: SharedContextRanker) -> dict[str, tuple[int, int]]:
    """Every parameter that vectors are made of or go into → the axis of their numbers, and how many vectors lie there
    side by side."""
    axes = {f"{name}.weight": (1, 1) for name in embedding_tables(ranker) or ()}
    axes |= dict.fromkeys(("mask", "context.weight", "context.bias"), (0, 1))
    axes |= {"position": (1, 1), "prior.weight": (1, 1)}
    if ranker.head is not None:
        axes |= {"dense.weight": (0, 1), "dense.bias": (0, 1), "head.0.weight": (1, 2)}
    for name, module in ranker.named_modules():
        if isinstance(module, nn.LayerNorm):
            axes |= {f"{name}.weight": (0, 1), f"{name}.bias": (0, 1)}
        elif isinstance(module, Attention):
            axes |= {f"{name}.query.weight": (1, 1), f"{name}.key_value.weight": (1, 1), f"{name}.out.weight": (0, 1),
                     f"{name}.out.bias": (0, 1)}  # fmt: skip
    for name in feed_forwards(ranker):
        if name != "head":
            axes |= {f"{name}.0.weight": (1, 1), f"{name}.2.weight": (0, 1), f"{name}.2.bias": (0, 1)}
    return axes


def _keep_numbers(ranker: SharedContextRanker, kept: Tensor) -> None:
    width = ranker.dim
    for name, (axis, times) in axes(ranker).items():
        at = torch.cat([kept + width * part for part in range(times)])
        parent, _, last = name.rpartition(".")
        owner = ranker.get_submodule(parent)
        setattr(owner, last, nn.Parameter(getattr(owner, last).detach().index_select(axis, at)))
    for module in ranker.modules():
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (len(kept),)
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = len(kept)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    ranker.dim = len(kept)


def _keep_heads(attention: Attention, heads: list[int]) -> None:
    at = (torch.tensor(heads)[:, None] * attention.head_dim + torch.arange(attention.head_dim)).flatten()
    inner = attention.heads * attention.head_dim
    attention.query = _rows(attention.query, at)
    attention.key_value = _rows(attention.key_value, torch.cat([at, at + inner]))
    attention.out = _columns(attention.out, at)
    attention.heads = len(heads)


def _rows(layer: Any, kept: Tensor) -> nn.Linear:
    smaller = nn.Linear(layer.in_features, len(kept))
    smaller.weight, smaller.bias = nn.Parameter(layer.weight[kept]), nn.Parameter(layer.bias[kept])
    return smaller


def _columns(layer: Any, kept: Tensor) -> nn.Linear:
    smaller = nn.Linear(len(kept), layer.out_features)
    smaller.weight, smaller.bias = nn.Parameter(layer.weight[:, kept]), nn.Parameter(layer.bias.detach())
    return smaller
