"""The shared-context ranker: the user is encoded once, each candidate attends to that encoding.

Candidates never attend to each other, so an answer does not depend on padding or on what else was sent, and one
more candidate costs a cross-attention row instead of a whole sequence (BST, Chen et al. 2019, repeats the user for
every candidate). Pre-norm blocks (Xiong et al. 2020), GELU feed-forward.

Letters: B requests, N candidates, L history, Q query tokens, S = L + Q + 1, F fields, D width, T tasks.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from trirank_backend.features import FeatureSpec

from trirank_build.models.embeddings import STD
from trirank_build.models.sequence import SequenceRanker, there
from trirank_build.recipe import ModelRecipe

MASKED = -1e4
"""Added to the logits of what is padding; finite, so that FP16 survives it."""


def later(size: int, like: Tensor) -> Tensor:
    """[size, size] MASKED where a column's event is later than the row's; made where ``like`` is, since a copy from the
    host cannot be part of a CUDA graph."""
    return torch.full((size, size), MASKED, dtype=like.dtype, device=like.device).triu(1)


class Attention(nn.Module):
    """Multi-head attention from x [B, X, D] to memory [B, S, D]; ``mask`` [B, 1, 1 or X, S] is added to the logits."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q = self._split(self.query(x))  # [B, H, X, D/H]
        key, value = self.key_value(memory).chunk(2, dim=-1)
        k, v = self._split(key), self._split(value)  # [B, H, S, D/H]
        weights = (q @ k.transpose(-1, -2) * self.head_dim**-0.5 + mask).softmax(-1)  # [B, H, X, S]
        merged = (self.dropout(weights) @ v).transpose(1, 2).flatten(2)  # [B, X, D]
        return self.out(merged)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual around it."""

    def __init__(self, recipe: ModelRecipe, attention_dropout: float) -> None:
        super().__init__()
        dim = recipe.dim
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, recipe.heads, attention_dropout)
        self.ffn = nn.Sequential(nn.Linear(dim, recipe.ffn), nn.GELU(), nn.Linear(recipe.ffn, dim))
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor) -> Tensor:
        normed = self.norm_attention(x)
        x = x + self.dropout(self.attention(normed, normed if memory is None else memory, mask))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))

    def newest(self, x: Tensor, mask: Tensor) -> Tensor:
        """The last row [B, 1, D] of what ``forward`` makes of x [B, X, D], which may see all others."""
        normed = self.norm_attention(x)
        last = x[:, -1:] + self.dropout(self.attention(normed[:, -1:], normed, mask))
        return last + self.dropout(self.ffn(self.norm_ffn(last)))


class Head(nn.Sequential):
    """Scores [B, N, T] of x [B, N, D] beside its product with the context's state [B, 1, D]: Linear, GELU, Linear."""

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        first, activation, last = self
        if isinstance(first, nn.Linear):
            # x V + (x · state) W is x (V + state · W): one product of D for every candidate instead of one of 2 D.
            dim = x.shape[-1]
            hidden = x @ (first.weight[:, :dim] + first.weight[:, dim:] * state).transpose(1, 2) + first.bias
        else:
            hidden = first(torch.cat([x, x * state], -1))
        scores: Tensor = last(activation(hidden))
        return scores


class SharedContextRanker(SequenceRanker):
    """history [B, L, F+2], query [B, Q], candidates [B, N, F], dense [B, N, Dn], context [B, C] → scores [B, N, T].

    Ids are of the joint vocabulary with 0 for "missing"; see trirank.contract.ranker_inputs. A score is the sum of

    - the affinity of the candidate to the user's state, which pre-training teaches;
    - a linear part of the dense features;
    - what cross-attention finds between the candidate and the history, the query and the context. With
      ``cross_blocks = 0`` there is none of it, and of a causal encoder's last block nothing but the newest event's
      state is calculated, so that a candidate costs one product with it.
    """

    def __init__(self, spec: FeatureSpec, recipe: ModelRecipe) -> None:
        super().__init__(spec, recipe)
        shape, dim = spec.shape, recipe.dim
        self.dim = dim
        self.causal = recipe.attention == "causal"
        self.position = nn.Parameter(torch.randn(shape.history_length + shape.query_length, dim) * STD)
        self.mask = nn.Parameter(torch.randn(dim) * STD)
        self.context = nn.Linear(shape.context, dim)
        self.encoder = nn.ModuleList(Block(recipe, recipe.dropout) for _ in range(recipe.encoder_blocks))
        self.norm_memory = nn.LayerNorm(dim)
        # No dropout on the weights of candidates: there are many, and drawing so many numbers took a fifth of a step.
        self.cross = nn.ModuleList(Block(recipe, 0.0) for _ in range(recipe.cross_blocks))
        self.head: Head | None = None
        self.dense_head = nn.Linear(shape.dense, shape.tasks)
        starting_at_zero = [self.dense_head]  # a ranker starts from its affinity, or from training.start, alone
        if recipe.cross_blocks:
            self.dense = nn.Linear(shape.dense, dim)
            self.norm_candidate, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
            starting_at_zero.append(last := nn.Linear(dim, shape.tasks))
            self.head = Head(nn.Linear(2 * dim, dim), nn.GELU(), last)
        self.affinity = nn.Parameter(torch.ones(shape.tasks))
        for layer in starting_at_zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def linear_parts(self) -> tuple[nn.Linear, nn.Parameter]:
        return self.dense_head, self.affinity

    def encode(
        self, history: Tensor, query: Tensor | None, context: Tensor | None, masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is known of the request, oldest first, then the query, then the context: memory [B, S, D] and the
        mask [B, 1, 1, S] of what is padding."""
        items, extra = self.event_vectors(history)
        if masked is not None:
            items = torch.where(masked[..., None], self.mask, items)
        length = history.shape[1]
        parts = [items + extra + self.position[self.history_length - length : self.history_length]]
        known = [there(history)]
        if query is not None:
            parts.append(self.embedding(query) + self.position[self.history_length :])
            known.append(query != 0)
        sequence = self.dropout(torch.cat(parts, 1))
        if context is not None:  # always there, so no row of the softmax is ever empty at serving
            sequence = torch.cat([sequence, self.context(context)[:, None]], 1)
            known.append(torch.ones_like(known[0][:, :1]))
        mask = (~torch.cat(known, 1))[:, None, None, :].to(sequence.dtype) * MASKED  # [B, 1, 1, S]
        size = sequence.shape[1]
        allowed = mask
        if self.causal:
            allowed = torch.clamp(mask + later(size, mask), min=MASKED)
        for block in self.encoder:
            sequence = block(sequence, None, allowed)
        return self.norm_memory(sequence), mask

    def states(self, history: Tensor, masked: Tensor | None = None) -> Tensor:
        context = None if masked is None else torch.zeros(len(history), self.context.in_features)
        return self.encode(history, None, None if context is None else context.to(self.mask), masked)[0]

    def next_state(self, history: Tensor) -> Tensor:
        if self.causal:
            return self._newest_state(history)
        return self.states(history, torch.zeros_like(history[..., 0], dtype=torch.bool))[:, -1]

    def _newest_state(self, history: Tensor) -> Tensor:
        """[B, D] of a causal encoder, whose last block is calculated for the newest event alone."""
        items, extra = self.event_vectors(history)
        x = self.dropout(items + extra + self.position[self.history_length - history.shape[1] : self.history_length])
        mask = (~there(history))[:, None, None, :].to(x.dtype) * MASKED  # [B, 1, 1, L]
        blocks, size = cast(list[Block], list(self.encoder)), history.shape[1]
        for block in blocks[:-1]:
            x = block(x, None, torch.clamp(mask + later(size, mask), min=MASKED))
        state: Tensor = self.norm_memory(blocks[-1].newest(x, mask) if blocks else x[:, -1:])[:, 0]
        return state

    def forward(self, history: Tensor, query: Tensor, candidates: Tensor, dense: Tensor, context: Tensor) -> Tensor:
        if self.head is not None:
            return self.rank(*self.encode(history, query, context), history, candidates, dense)
        affinity = self.affinities(self.request_state(history, query, context), self.item_vectors(candidates))
        return self.dense_head(dense) + affinity[..., None] * self.affinity

    def request_state(self, history: Tensor, query: Tensor, context: Tensor) -> Tensor:
        """[B, D] what the affinity of candidates is to: the state after the newest event, zero without one; of an
        encoder that is not causal, what it makes of all there is."""
        if self.causal:
            return self._newest_state(history) * there(history)[:, -1:].to(self.mask.dtype)
        return self.encode(history, query, context)[0][:, -1]

    def rank(self, memory: Tensor, mask: Tensor, history: Tensor, candidates: Tensor, dense: Tensor) -> Tensor:
        """Scores [B, N, T] from what ``encode`` made of the request."""
        if self.head is None:
            raise TypeError("a ranker without cross blocks has no memory to rank by; call forward")
        items = self.item_vectors(candidates)
        if self.causal:  # the state after the newest event, and none without one
            known = there(history)[:, -1:].to(memory.dtype)  # [B, 1]
            state = memory[:, self.history_length - 1] * known
        else:
            state = memory[:, -1]
        affinity = self.affinities(state, items)[..., None]  # [B, N, 1]
        x = self.norm_candidate(items) + self.dense(dense)  # [B, N, D]
        for block in self.cross:
            x = block(x, memory, mask)
        scores: Tensor = self.head(self.norm_out(x), memory[:, -1:])
        return scores + self.dense_head(dense) + affinity * self.affinity
