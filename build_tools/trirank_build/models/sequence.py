"""What all rankers of the family share: item vectors, the user's states, and how well they go together.

A ranker is served through ``forward`` (trirank.contract.ranker_inputs). It is pre-trained through ``states`` and
``item_vectors``: at every event of a history, the state says what comes next. So the family's members, baselines
included, learn from the same loops and are compared under the same protocols.

Letters: B requests, N candidates, L history, Q query tokens, F fields of an item, D width, T tasks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from trirank_backend.features import HISTORY_EXTRA, FeatureSpec

from trirank_build.models.embeddings import make_embedding
from trirank_build.recipe import ModelRecipe

TEMPERATURE = 20.0
"""What cosines are multiplied with at the start; learned from there."""
_EPSILON = 1e-6


class SequenceRanker(nn.Module):
    """Base of the family: embeddings, similarity.

    Attributes:
        has_states: whether ``states`` exists, so that the ranker can be pre-trained and find items by itself.
    """

    has_states = True

    def __init__(self, spec: FeatureSpec, recipe: ModelRecipe) -> None:
        super().__init__()
        self.spec = spec
        self.history_length, self.tasks = spec.history_length, len(spec.tasks)
        self.fields = spec.shape.item_fields
        self.embedding = make_embedding(spec, recipe)
        self.folded: nn.Module | None = None
        """Rows of whole items, once their fields were folded together (trirank_build.compression.fold)."""
        self.dropout = nn.Dropout(recipe.dropout)
        self.cosine = recipe.similarity == "cosine"
        self.prior = nn.Linear(recipe.dim, 1, bias=False)
        """How likely an item is whoever asks; a cosine alone cannot say it."""
        nn.init.zeros_(self.prior.weight)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(TEMPERATURE) if self.cosine else 0.0), requires_grad=self.cosine
        )

    def item_vectors(self, fields: Tensor) -> Tensor:
        """Items by their fields [..., F], or folded by their row [..., 1] → [..., D]."""
        vectors: Tensor = self.embedding(fields).sum(-2) if self.folded is None else self.folded(fields[..., 0])
        return vectors

    def event_vectors(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Items [B, L, D], and behaviours with time gaps [B, L, D], of a history [B, L, F+2]."""
        return self.item_vectors(history[:, :, : self.fields]), self.embedding(history[:, :, self.fields :]).sum(2)

    def states(self, history: Tensor, masked: Tensor | None = None) -> Tensor:
        """What each event leads one to expect: [B, L, F+2] → [B, L, D], or [B, L+1, D] with ``masked`` [B, L], whose
        events' items are hidden; the last row then stands for the moment after the history. L may be shorter than
        at serving."""
        raise NotImplementedError

    def linear_parts(self) -> tuple[nn.Linear, nn.Parameter] | None:
        """What a score is made of linearly, where the ranker says so: the weights of the dense features, D to T, and
        those of the affinity [T]. With both at zero, and all else as it was made, every score is zero."""
        return None

    def request_state(self, history: Tensor, query: Tensor, context: Tensor) -> Tensor:
        """[B, D] what the affinity of candidates is to; only of rankers with ``linear_parts``."""
        raise NotImplementedError

    def next_state(self, history: Tensor) -> Tensor:
        """[B, L, F+2] → [B, D], the state after the newest event."""
        return self.states(history)[:, -1]

    def comparable(self, states: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States [..., D], items [..., D] → the same, scaled so that a logit is their product plus the item's prior
        [...]. The temperature goes to the states, of which there are fewer numbers than of logits."""
        prior = self.prior(items)[..., 0]
        if self.cosine:
            states, items = unit(states), unit(items)
        return states * self.log_temperature.exp(), items, prior

    def logits(self, states: Tensor, items: Tensor) -> Tensor:
        """[..., X, D] and [..., Y, D] → [..., X, Y], every state against every item."""
        states, items, prior = self.comparable(states, items)
        return states @ items.transpose(-1, -2) + prior[..., None, :]

    def affinities(self, state: Tensor, items: Tensor) -> Tensor:
        """[B, D] and [B, N, D] → [B, N], ``logits`` of one state, in the cheaper way for few states and many items: the
        items are not scaled but the products are."""
        if self.cosine:
            state = unit(state) * self.log_temperature.exp()
        both = torch.stack([state, self.prior.weight.expand_as(state)], -1)  # [B, D, 2]
        product, prior = (items @ both).unbind(-1)
        if self.cosine:
            product = product * torch.rsqrt((items * items).sum(-1) + _EPSILON)
        return product + prior

    def pairs(self, states: Tensor, items: Tensor) -> Tensor:
        """[..., D] and [..., D] → [...], each state against its own item."""
        states, items, prior = self.comparable(states, items)
        return (states * items).sum(-1) + prior


def there(history: Tensor) -> Tensor:
    """[B, L] where a history [B, L, F+2] has an event: every event has a behaviour or an item."""
    return (history != 0).any(-1)


def unit(vectors: Tensor) -> Tensor:
    """Scaled to length one; safe where all is zero, and plain enough for every runtime."""
    return vectors * torch.rsqrt((vectors * vectors).sum(-1, keepdim=True) + _EPSILON)


assert HISTORY_EXTRA == ("behaviour", "time_gap"), "event_vectors counts on these two"
