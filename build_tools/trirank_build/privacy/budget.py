"""The account of differential privacy: how much noise a promise asks for, and counts of items with theirs.

A promise is an epsilon and a delta for a run as a whole (Dwork and Roth, "The algorithmic foundations of differential
privacy", 2014); units are users. Rényi accounting (Mironov 2017; Mironov, Talwar and Zhang 2019) by `opacus` puts
together what each mechanism uses.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable

import numpy as np
import polars as pl
from numpy.typing import NDArray
from trirank.contract import ANONYMOUS_USER

from trirank_build.errors import BadRecipe
from trirank_build.recipe import PrivacyRecipe

_MOST_NOISE = 1e4
_HIGHER = (64, 80, 96, 128, 192, 256, 384, 512)
"""Orders of the Rényi divergence beside those that opacus tries; small epsilons have their best bound there."""
Step = tuple[float, float, int]
"""Of an account: noise multiplier, sampling rate, how often."""


def counts_noise(privacy: PrivacyRecipe) -> float:
    """Noise multiplier of counting, which by itself would use up its share of epsilon."""
    return _least_noise(privacy.epsilon * privacy.counts_share, privacy.delta, lambda noise: [(noise, 1.0, 1)])


def steps_noise(privacy: PrivacyRecipe, rate: float, steps: int) -> float:
    """Noise multiplier of steps that take each user with probability ``rate``, so that they and the counting are within
    epsilon.

    Raises:
        BadRecipe: no noise is enough.
    """
    counted = (counts_noise(privacy), 1.0, 1)
    return _least_noise(privacy.epsilon, privacy.delta, lambda noise: [counted, (noise, rate, steps)])


def spent(account: list[Step], delta: float) -> float:
    """Epsilon of an account."""
    try:
        from opacus.accountants import RDPAccountant  # seconds, which only such runs are to take
    except ImportError as error:
        raise BadRecipe(f"training.privacy needs opacus ({error}); pip install 'trirank[privacy]'") from error
    accountant = RDPAccountant()
    accountant.history = list(account)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is at an end of those tried: the bound holds
        return float(accountant.get_epsilon(delta, alphas=[*RDPAccountant.DEFAULT_ALPHAS, *_HIGHER]))


def _least_noise(epsilon: float, delta: float, account: Callable[[float], list[Step]]) -> float:
    """The smallest noise multiplier, to a thousandth, whose account is within epsilon."""
    low, high = 0.0, 1.0
    while spent(account(high), delta) > epsilon:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise BadRecipe(
                f"no noise gives epsilon {epsilon:g} at delta {delta:g}: take a larger epsilon, a larger delta, or a "
                "smaller counts_share"
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(account(middle), delta) <= epsilon else (middle, high)
    return high


def private_counts(events: pl.DataFrame, ids: NDArray[np.int64], privacy: PrivacyRecipe) -> NDArray[np.int64]:
    """[M] how many users chose each of ``ids`` [M], ascending, with noise: no number is below zero.

    A user counts for ``choices_per_user`` different items at most, so that what one adds has a norm of the root of
    that; an anonymous event counts for itself.

    Args:
        events: user_id, item_id of the training split.
    """
    rng = np.random.default_rng(secrets.randbits(128))
    named = pl.col("user_id") != ANONYMOUS_USER
    pairs = events.filter(named).select("user_id", "item_id").unique(maintain_order=True)
    pairs = pairs[rng.permutation(pairs.height)].group_by("user_id").head(privacy.choices_per_user)
    chosen = pl.concat([pairs["item_id"], events.filter(~named)["item_id"]]).to_numpy()
    exact = np.bincount(np.searchsorted(ids, chosen), minlength=len(ids))
    noise = rng.normal(0.0, counts_noise(privacy) * privacy.choices_per_user**0.5, len(ids))
    return np.maximum(np.rint(exact + noise), 0).astype(np.int64)
