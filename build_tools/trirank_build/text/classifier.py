"""A small Transformer over the places of a text, and a linear model of its n-grams beside it.

Letters: B texts, L places, F orders, D width, C classes, U units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trirank_build.models.embeddings import STD
from trirank_build.models.ranker import MASKED, Block
from trirank_build.recipe import ModelRecipe
from trirank_build.text.recipe import TextModelRecipe

_LEAST = 1e-6


class TextClassifier(nn.Module):
    """fields [B, L, F], grams [B, G] int32 → logits [B, C].

    A logit is the sum of what the encoder says (a weighted mean of its states, and their largest numbers) and of what
    a linear model says of all units and n-grams of the text, divided by the root of how many there are. The linear
    model is fitted by itself (trirank_build.text.linear), since beside one that knows the training texts nothing would
    be left for the encoder to learn; it is zero until then.

    Args:
        size: numbers of the linear model.
        units: different ones, which masked training finds.
    """

    def __init__(self, size: int, units: int, classes: int, recipe: TextModelRecipe) -> None:
        super().__init__()
        dim = recipe.dim
        self.units, self.rows, self.length = units, recipe.rows, recipe.length
        # Most rows are those of n-grams, of which a batch has few.
        self.embedding = nn.Embedding(units + recipe.rows, dim, padding_idx=0, sparse=True)
        self.linear = nn.Embedding(size, classes + 1, padding_idx=0)
        """Of each unit and n-gram its weights, and whether it counts."""
        nn.init.zeros_(self.linear.weight)
        self.linear.requires_grad_(False)
        nn.init.normal_(self.embedding.weight, std=STD)
        with torch.no_grad():
            self.embedding.weight[0] = 0
        self.position = nn.Parameter(torch.randn(recipe.length, dim) * STD)
        sizes = ModelRecipe(dim=dim, heads=recipe.heads, ffn=recipe.ffn, dropout=recipe.dropout)
        # No dropout on attention's weights: drawing so many numbers took most of a step.
        self.encoder = nn.ModuleList(Block(sizes, 0.0) for _ in range(recipe.blocks))
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.Linear(dim, 1)
        self.head = nn.Sequential(
            nn.Linear(2 * dim, dim), nn.GELU(), nn.Dropout(recipe.dropout), nn.Linear(dim, classes)
        )
        self.found = nn.Linear(dim, dim)
        """From a hidden place's state to the vector of what is hidden there; for masked training alone."""
        self.dropout = nn.Dropout(recipe.dropout)

    def states(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, L, D], and where there is a unit [B, L]."""
        there = fields[..., 0] > 0
        mask = (~there)[:, None, None, :].to(self.position.dtype) * MASKED
        x = self.dropout(self.embedding(fields).sum(2) + self.position[: fields.shape[1]])
        for block in self.encoder:
            x = block(x, None, mask)
        return self.norm(x), there

    def forward(self, fields: Tensor, grams: Tensor) -> Tensor:
        states, there = self.states(fields)
        known = there.to(states.dtype)[..., None]
        weight = (self.attention(states) + (1 - known) * MASKED).softmax(1)
        most = (states + (1 - known) * MASKED).amax(1).clamp_min(-10.0)  # of no unit at all: no number
        pooled = torch.cat([(states * weight).sum(1), most], -1)
        told: Tensor = self.linear(grams).sum(1)
        return self.head(pooled) + told[:, :-1] * torch.rsqrt(told[:, -1:].clamp_min(_LEAST))

    def hidden_units(self, fields: Tensor, at: Tensor) -> Tensor:
        """[P, U] logits of what stands at the flat places ``at`` [P]."""
        found = self.found(self.states(fields)[0].flatten(0, 1)[at])
        # Looked up and not sliced, so that gradients of the table stay those of rows.
        units = self.embedding(torch.arange(self.units, device=fields.device))
        return F.linear(found, units)
