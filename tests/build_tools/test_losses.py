"""What the ranker is trained to do, term by term."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trirank_build.training.losses import (
    RANKING_LOSSES,
    TaskWeights,
    lambda_loss,
    listwise_softmax,
    pointwise,
    sampled_softmax,
    targets_of,
)


def column(*values):
    """[1, N, 1]"""
    return torch.tensor(values, dtype=torch.float32)[None, :, None]


ALL = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_every_loss_prefers_the_right_order(name):
    loss = RANKING_LOSSES[name]
    assert loss(column(2, 0, 0), column(1, 0, 0), ALL) < loss(column(0, 2, 0), column(1, 0, 0), ALL)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_padding_takes_no_part(name):
    loss, valid = RANKING_LOSSES[name], torch.tensor([[True, True, False]])
    padded = loss(column(1, 0.5, 9), column(1, 0, 0), valid)
    assert torch.allclose(padded, loss(column(1, 0.5), column(1, 0), valid[:, :2]))


@pytest.mark.parametrize("name", ["listwise", "lambda"])
def test_requests_without_success_teach_nothing(name):
    loss = RANKING_LOSSES[name](torch.randn(2, 3, 1), torch.zeros(2, 3, 1), torch.ones(2, 3, dtype=torch.bool))
    assert loss.tolist() == [0]


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_there_is_a_loss_for_each_task_and_a_gradient(name):
    scores = torch.randn(4, 6, 3, requires_grad=True)
    targets = targets_of(torch.randint(0, 4, (4, 6)).float(), (1.0, 2.0, 3.0))
    loss = RANKING_LOSSES[name](scores, targets, torch.ones(4, 6, dtype=torch.bool))
    assert loss.shape == (3,)
    loss.sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad.any()


def test_targets_are_steps_or_the_label_itself():
    assert targets_of(torch.tensor([[0.0, 1, 3]]), (2.0, 0.0))[0].tolist() == [[0, 0], [0, 1], [1, 3]]


def test_listwise_is_cross_entropy_with_one_choice():
    scores = torch.randn(5, 8, 1)
    target = F.one_hot(torch.arange(5), 8).float()[..., None]
    ours = listwise_softmax(scores, target, torch.ones(5, 8, dtype=torch.bool))
    assert torch.allclose(ours, F.cross_entropy(scores[..., 0], torch.arange(5)))


def test_pointwise_is_binary_cross_entropy():
    scores, target = torch.randn(5, 8, 1), (torch.rand(5, 8, 1) > 0.5).float()
    ours = pointwise(scores, target, torch.ones(5, 8, dtype=torch.bool))
    assert torch.allclose(ours, F.binary_cross_entropy_with_logits(scores, target))


def test_lambda_weighs_a_pair_by_what_its_swap_changes():
    """Two candidates, one relevant: the swap changes NDCG by 1/log2(2) - 1/log2(3), the ideal is 1."""
    valid = torch.ones(1, 2, dtype=torch.bool)
    loss = lambda_loss(column(0.3, -0.2), column(1, 0), valid)
    assert loss.item() == pytest.approx((1 - 1 / np.log2(3)) * np.log1p(np.exp(-0.5)), rel=1e-5)


def test_lambda_cares_more_for_the_top():
    """The same mistake costs more among the first places than among the last."""
    scores = torch.arange(10, 0, -1).float()[None, :, None]
    valid = torch.ones(1, 10, dtype=torch.bool)
    high, low = torch.zeros(1, 10, 1), torch.zeros(1, 10, 1)
    high[0, [0, 2]], low[0, [0, 9]] = 1, 1
    assert lambda_loss(scores, high, valid) < lambda_loss(scores, low, valid)


def test_sampled_softmax_without_samples_of_the_choice_itself():
    chosen, others = torch.tensor([1.0]), torch.tensor([[0.0, 5.0]])
    same = torch.tensor([[False, True]])
    assert sampled_softmax(chosen, others, same).item() == pytest.approx(np.log(1 + np.exp(-1.0)), rel=1e-5)


def test_log_q_undoes_popular_sampling():
    """With many negatives drawn by popularity, the corrected gradient is that of the softmax over all items."""
    rng, items = np.random.default_rng(0), 50
    share = rng.dirichlet(np.full(items, 0.5)).clip(1e-4)
    share /= share.sum()
    logits = torch.randn(items, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits[None], torch.tensor([3])).backward()
    full, logits.grad = logits.grad.clone(), None
    rows = torch.from_numpy(rng.choice(items, 200_000, p=share))
    log_q = torch.from_numpy(np.log(share * 200_000))

    def gradient(correction):
        same = (rows == 3)[None]
        sampled_softmax(logits[3:4], logits[rows][None], same, correction).backward()
        found, logits.grad = logits.grad.clone(), None
        return found

    # Each draw stands for 1 / (n q) items, and the choice for itself.
    corrected = gradient((torch.zeros(1, dtype=torch.float64), log_q[rows]))
    assert (corrected - full).abs().max() < 0.02
    assert (gradient(None) - full).abs().max() > 0.05


def test_given_task_weights():
    weigh = TaskWeights(torch.tensor([1.0, 0.0, 3.0]), 3)
    assert weigh(torch.tensor([4.0, 100.0, 8.0])).item() == pytest.approx(7)


def test_learned_task_weights_turn_down_what_cannot_be_learned():
    weigh = TaskWeights(None, 2)
    optimiser = torch.optim.SGD(weigh.parameters(), lr=0.05)
    for _ in range(500):
        optimiser.zero_grad()
        weigh(torch.tensor([0.5, 4.0])).backward()
        optimiser.step()
    assert torch.exp(-weigh.learned).tolist() == pytest.approx([2.0, 0.25], rel=0.05)
