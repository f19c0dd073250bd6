"""Matrices of low rank as two."""

from __future__ import annotations

from torch import nn

from trirank_build.models.forms.form import Decisions, replace


def rebuild(model: nn.Module, decisions: Decisions) -> nn.Module:
    """See step.Step. Decisions: the rank of each matrix that became two."""
    for name, rank in decisions["ranks"].items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Embedding):
            rows = nn.Embedding(layer.num_embeddings, rank)
            replace(model, name, nn.Sequential(rows, nn.Linear(rank, layer.embedding_dim, bias=False)))
        else:
            assert isinstance(layer, nn.Linear)
            last = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
            if layer.bias is not None:
                last.bias = layer.bias
            replace(model, name, nn.Sequential(nn.Linear(layer.in_features, rank, bias=False), last))
    return model
