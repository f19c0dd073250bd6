"""The pre-training phase: from every place of a sequence, find what came next (GPT), or what is hidden (BERT).

SASRec (Kang and McAuley 2018) and BERT4Rec (Sun et al. 2019) did this for recommendation; a softmax over many or all
items instead of one negative is what makes it work well (Klenitskiy and Vasilev 2023; Petrov and Macdonald 2023).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trirank_build.baselines.popularity import popularity
from trirank_build.data.dataset import Dataset
from trirank_build.evaluation.catalogue import valid_ndcg
from trirank_build.features.fitting import Features
from trirank_build.features.negatives import NegativeSampler
from trirank_build.features.sequences import Sequences
from trirank_build.models.sequence import SequenceRanker, there
from trirank_build.recipe import PretrainingRecipe
from trirank_build.retrieval.tasks import CatalogueTasks, state_scorer
from trirank_build.training.losses import sampled_softmax

_GROUPS = 4
"""Of sequences by length, within a batch."""


class PretrainingStep(nn.Module):
    """A batch of sequences → the loss at all places whose item is to be found.

    Takes history [B, T, F+2]; at [P], flat numbers of those places among the states; chosen [P, F] and chosen_row [P]
    what is found there; others [K, F] and other_rows [K] the negatives, log_q [P] and other_log_q [K]; masked [B, T]
    for the masked objective alone.
    """

    def __init__(self, model: SequenceRanker, log_q: bool, all_items: bool) -> None:
        super().__init__()
        self.model, self.log_q, self.all_items = model, log_q, all_items

    def forward(
        self,
        history: Tensor,
        at: Tensor,
        chosen: Tensor,
        chosen_row: Tensor,
        others: Tensor,
        other_rows: Tensor,
        log_q: Tensor,
        other_log_q: Tensor,
        masked: Tensor | None = None,
    ) -> Tensor:
        model = self.model
        states = (
            self._states(history, at) if masked is None else model.states(history, masked).flatten(0, 1)[at]
        )  # [P, D]
        if self.all_items:  # in chunks, so that the logits of a large catalogue are never there at once
            scaled, items, prior = model.comparable(states, model.item_vectors(others))
            options = nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(scaled, items, chosen_row, linear_bias=prior, options=options)
        logits = model.logits(states, model.item_vectors(others))  # [P, K]
        same = chosen_row[:, None] == other_rows[None]
        own = model.pairs(states, model.item_vectors(chosen))
        return sampled_softmax(own, logits, same, (log_q, other_log_q) if self.log_q else None)

    def _states(self, history: Tensor, at: Tensor) -> Tensor:
        """[P, D] of a causal ranker at the flat places ``at`` of history [B, T, F+2], without calculating much padding:
        sequences of like lengths go through the encoder together, and all of the batch into one loss."""
        batch, longest = history.shape[:2]
        lengths, order = there(history).sum(1).sort()
        found, place = [], torch.zeros(batch * longest, dtype=torch.long, device=history.device)
        done = 0
        for part, length in zip(order.chunk(_GROUPS), lengths.chunk(_GROUPS), strict=True):
            width = max(int(length[-1]), 1)
            found.append(self.model.states(history[part, longest - width :]).flatten(0, 1))
            flat = part[:, None] * longest + torch.arange(longest - width, longest, device=history.device)
            place[flat.flatten()] = torch.arange(done, done + flat.numel(), device=history.device)
            done += flat.numel()
        return torch.cat(found)[place[at]]


class Pretraining:
    """The phase."""

    measure = "NDCG@10"

    def __init__(
        self,
        model: SequenceRanker,
        recipe: PretrainingRecipe,
        dataset: Dataset,
        features: Features,
        seed: int,
        name: str = "",
        since: int | None = None,
    ) -> None:
        self.name: str = name or recipe.objective
        self.settings, self.decays, self.judges_start, self.private = recipe, recipe.decay, False, None
        self.step = PretrainingStep(model, recipe.log_q, recipe.negatives == "all")
        self._model, self._features = model, features
        self._sequences = Sequences(dataset, features, since)
        counts = popularity(dataset.training_choices(), features.catalogue.ids)
        self._sampler = NegativeSampler(recipe.negatives, counts, recipe.negative_samples)
        self._all = features.packer.items(np.arange(len(features.catalogue), dtype=np.int32))
        self._tasks = CatalogueTasks.of(dataset, "valid", features, recipe.validation_users, seed)

    def plan(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """All sequences, in a new order."""
        return self._sequences.plan(rng, self.settings.batch_size)

    def batch(self, which: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        """Sequences, what is to be found in them, and negatives."""
        batch = self._sequences.batch(which)
        masked = None
        if self.settings.objective == "next_item":
            found = batch.following
        else:
            masked = (rng.random(batch.rows.shape) < self.settings.masked_share) & (batch.rows >= 0)
            # The moment after the history is one more place, and the newest event's follower is what is found there.
            found = np.concatenate([np.where(masked, batch.rows, -1), batch.following[:, -1:]], 1)
        at = np.flatnonzero(found >= 0)
        rows = found.ravel()[at]
        negatives = self._sampler.draw(rng, rows)
        others = self._all if self.settings.negatives == "all" else self._all[negatives.rows]
        chosen = self._all[rows]
        if self.settings.item_dropout:
            others = _without_ids(others, self.settings.item_dropout, rng)
            chosen = _without_ids(chosen, self.settings.item_dropout, rng)
        tensors = {
            "history": batch.history, "at": at, "chosen": chosen, "chosen_row": rows.astype(np.int64),
            "others": others, "other_rows": negatives.rows.astype(np.int64),
            "log_q": self._sampler.log_q(rows, len(rows)), "other_log_q": negatives.log_q,
        }  # fmt: skip
        if masked is not None:
            tensors["masked"] = masked
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}

    def validate(self) -> float:
        """NDCG@10 over the whole catalogue, of what users chose in the validation split."""
        return valid_ndcg(self._tasks, state_scorer(self._model, self._features))


def _without_ids(fields: NDArray[np.int32], share: float, rng: np.random.Generator) -> NDArray[np.int32]:
    fields = fields.copy()
    fields[rng.random(len(fields)) < share, 0] = 0
    return fields
