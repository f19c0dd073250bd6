"""Differential privacy in training: whether any one user is in the training split hardly changes what comes of it.

DP-SGD (Abadi et al., "Deep learning with differential privacy", CCS 2016) with users for units: each step takes every
user with the same probability (Poisson sampling), one request of each, cuts its gradient to a largest norm, and adds
noise to the sum; so whatever a user did moves a step by that norm at most, as in the user-level sampling of Charles et
al., "Fine-tuning large language models with user-level differential privacy" (2024), with one example a user. The
gradients of single requests come from torch.func, which takes all layers as they are; cutting and noise are those of
`opacus` (Yousefpour et al. 2021). Each request's loss is its own, so a task of which few requests know anything counts
as much less; usually it is a mean over those that do, whose number nobody may know here.

What else is fitted on users are counts of items, which have noise, too, and are in the same account (privacy.budget).
Words, brands, prices and which items there are are the catalogue's own. See docs/privacy.md for what is not covered.
"""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from trirank.contract import ANONYMOUS_USER

from trirank_build.errors import BadData
from trirank_build.features.examples import Examples
from trirank_build.privacy.budget import counts_noise, spent, steps_noise
from trirank_build.recipe import PrivacyRecipe
from trirank_build.training.optimiser import Optimiser

_NUMBERS = 1 << 22
"""Of single requests' gradients that are in memory at a time: 16 MiB, which took two thirds of the time of 256."""


class Users(NamedTuple):
    """Whose request is whose.

    Attributes:
        requests: [R] numbers of requests, those of a user one after the other.
        begins: [U + 1] where each user's begin.
    """

    requests: NDArray[np.int64]
    begins: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Examples, teaching: NDArray[np.int64]) -> Users:
        """Of the requests numbered ``teaching``. Who is anonymous is somebody else every time."""
        users = examples.users[teaching]
        _, first, number = np.unique(users, return_index=True, return_inverse=True)
        alone = users == ANONYMOUS_USER
        number = np.where(alone, len(first) + np.cumsum(alone), number)
        order = np.argsort(number, kind="stable")
        begins = np.flatnonzero(np.diff(number[order], prepend=-1))
        return cls(teaching[order], np.append(begins, len(order)))

    def __len__(self) -> int:
        return len(self.begins) - 1

    def draw(self, rate: float, rng: np.random.Generator) -> NDArray[np.int64]:
        """Every user with probability ``rate``, and one request of each."""
        taken = np.flatnonzero(rng.random(len(self)) < rate)
        first, after = self.begins[taken], self.begins[taken + 1]
        return self.requests[rng.integers(first, after)]


class Private:
    """What a phase needs to train with differential privacy.

    Nobody who knows the seed may know who was taken or what was added: both come from the system's own chance, so no
    run is like another.

    Attributes:
        rate, steps: with what probability a step takes a user, and how many steps there are.
        noise: multiplier of the largest norm.

    Raises:
        BadData: there are fewer users than a step takes, or too many for delta.
    """

    def __init__(self, privacy: PrivacyRecipe, users: Users, batch_size: int, epochs: int) -> None:
        if len(users) < 2 * batch_size:
            raise BadData(
                f"{len(users):,} users have something to teach, and training with differential privacy takes "
                f"{batch_size:,} of them in a step, which is to be half at most; lower training.batch_size, or bring a "
                "longer log"
            )
        if privacy.delta * len(users) >= 1:
            raise BadData(
                f"training.privacy.delta = {privacy.delta:g} says nothing of {len(users):,} users: with that chance "
                f"one of them may be given away; take one well below {1 / len(users):.1g}"
            )
        self.settings, self.batch_size, self._users = privacy, batch_size, users
        self.per_epoch = round(len(users) / batch_size)
        self.rate, self.steps = batch_size / len(users), self.per_epoch * epochs
        self.noise = steps_noise(privacy, self.rate, self.steps)
        self._rng = np.random.default_rng(secrets.randbits(128))

    def plan(self) -> list[NDArray[np.int64]]:
        """The requests of each step of an epoch."""
        return [self._users.draw(self.rate, self._rng) for _ in range(self.per_epoch)]

    def chance(self) -> np.random.Generator:
        """Of one batch, for candidates, hidden ids and dropout. A seed that somebody knows would give each place of a
        batch its own, so that whoever comes in between moves what all behind them see."""
        torch.manual_seed(secrets.randbits(63))
        return np.random.default_rng(secrets.randbits(128))

    def facts(self) -> dict[str, Any]:
        """What is promised, and by what means."""
        privacy, counting = self.settings, counts_noise(self.settings)
        account = [(counting, 1.0, 1), (self.noise, self.rate, self.steps)]
        return {
            "unit": "user", "epsilon": round(spent(account, privacy.delta), 4), "delta": privacy.delta,
            "accounting": "Rényi", "users": len(self._users), "sampling_rate": self.rate, "steps": self.steps,
            "noise_multiplier": self.noise, "max_norm": privacy.max_norm, "counts_noise_multiplier": counting,
            "choices_per_user": privacy.choices_per_user,
        }  # fmt: skip


class PrivateOptimiser(Optimiser):
    """AdamW on gradients of single requests that were cut, summed and blurred."""

    def __init__(self, module: nn.Module, learning_rate: float, weight_decay: float, private: Private) -> None:
        from opacus.optimizers import DPOptimizer  # seconds, which only such runs are to take

        super().__init__(module, learning_rate, weight_decay)
        self._names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        numbers = sum(parameter.numel() for parameter in self._whole)
        self._missing = [
            (part.padding_idx, part.weight) for part in module.modules()
            if isinstance(part, nn.Embedding) and part.padding_idx is not None and part.weight.requires_grad
        ]  # fmt: skip
        self._together = max(1, _NUMBERS // numbers)
        generator = torch.Generator(self._whole[0].device).manual_seed(secrets.randbits(63))
        self._blur = DPOptimizer(
            torch.optim.SGD(self._whole), noise_multiplier=private.noise, max_grad_norm=private.settings.max_norm,
            expected_batch_size=private.batch_size, generator=generator,
        )  # fmt: skip

    def backward(self, step: nn.Module, tensors: dict[str, Tensor], half: bool = False) -> Tensor:
        """See Optimiser.backward; the loss is the mean over the requests that were drawn."""
        named = dict(step.named_parameters())
        trained = {name: named[name].detach() for name in self._names}
        rest = {name: each.detach() for name, each in named.items() if name not in trained}

        def of_one(own: dict[str, Tensor], request: dict[str, Tensor]) -> Tensor:
            alone = {name: tensor[None] for name, tensor in request.items()}
            loss: Tensor = functional_call(step, {**rest, **own}, kwargs=alone)
            return loss

        total, size = torch.zeros(()), len(tensors["labels"])
        for start in range(0, size, self._together):
            self._blur.zero_grad(set_to_none=True)  # what was summed of earlier parts of this batch stays
            part = {name: tensor[start : start + self._together] for name, tensor in tensors.items()}
            gradients, losses = vmap(grad_and_value(of_one), in_dims=(None, 0), randomness="different")(trained, part)
            # One that is no number could not be cut, and a run that ended with it would tell of who has it.
            sums = [each.reshape(len(each), -1).sum(1) for each in gradients.values()]
            wrong = ~torch.stack(sums).isfinite().all(0)
            for name, parameter in zip(self._names, self._whole, strict=True):
                if wrong.any():
                    gradients[name] = gradients[name].clone()  # one number may stand for all of a batch
                    gradients[name][wrong] = 0
                parameter.grad_sample = gradients[name]  # type: ignore[attr-defined]
            self._blur.signal_skip_step(start + self._together < size)
            self._blur.pre_step()
            total = total + losses.nan_to_num(0.0, 0.0, 0.0).sum().cpu()
        for row, table in self._missing:  # no request has a gradient there: noise alone would train what means nothing
            assert table.grad is not None
            table.grad[row] = 0
        return total / size
