"""Under overload a stage works for those that it can answer in time, and for nobody in vain."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from trirank.contract import PATIENCE
from trirank_backend.admission import Admission, Queue, Wait


def knowing(cost_s):
    found = Admission()
    found.took(cost_s, 1)
    return found


def test_without_deadlines_all_are_taken():
    assert knowing(10.0).admitted([math.inf] * 32) == [True] * 32


def test_nobody_has_learned_yet():
    assert Admission().admitted([0.001] * 4) == [True] * 4


def test_those_with_the_most_time_are_taken():
    assert knowing(0.01).admitted([0.005, 0.03, 0.002, 0.04]) == [False, True, False, True]


def test_one_is_always_taken_so_that_a_cost_that_was_high_is_unlearned():
    admission = knowing(5.0)
    assert admission.admitted([0.01, 0.02]) == [False, True]
    for _ in range(60):
        assert any(admission.admitted([0.01, 0.02]))
        admission.took(0.001, 1)
    assert admission.admitted([0.01, 0.02]) == [True, True]


def test_an_empty_batch():
    assert knowing(1.0).admitted([]) == []


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=32), st.floats(1e-4, 0.1))
def test_as_many_as_can_all_be_answered_in_time(left_s, cost_s):
    taken = [left for left, is_taken in zip(left_s, knowing(cost_s).admitted(left_s), strict=True) if is_taken]
    assert taken
    if len(taken) > 1:
        assert len(taken) * cost_s <= min(taken)
    others = len(left_s) - len(taken)
    if others:  # one more would be late, or make another late
        ordered = sorted(left_s, reverse=True)
        assert (len(taken) + 1) * cost_s * 1.25 > ordered[len(taken)]


def looked_into(queue, waited, at_s):
    """By a stage that works for 10 ms on what it finds: requests that have a second each."""
    found = queue.waited_too_long([Wait(each, 1.0) for each in waited], at_s)
    queue.idle(at_s + 0.01)
    return found


def test_a_burst_is_waited_for():
    queue = Queue()
    assert not any(any(looked_into(queue, [0.9, 0.5], at / 100)) for at in range(10))
    assert not any(looked_into(queue, [0.6, 0.05], 0.1))  # there it ends
    assert not any(any(looked_into(queue, [0.9, 0.5], 0.11 + at / 100)) for at in range(10))


def test_in_a_queue_that_stands_those_who_waited_long_are_refused():
    queue, both = Queue(), [PATIENCE + 0.01, PATIENCE - 0.01]
    looked_into(queue, both, 0.0)
    for at in range(1, 12):
        assert looked_into(queue, both, at / 100) == [at == 11, False]
    assert looked_into(queue, [], 0.12) == []  # all came too late: that is no short queue
    assert looked_into(queue, both, 0.13) == [True, False]
    assert looked_into(queue, [*both, 0.0], 0.14) == [False] * 3  # somebody has not waited: it is short again
    assert looked_into(queue, both, 0.15) == [False] * 2


def test_one_long_batch_is_no_queue_and_two_are():
    queue = Queue()
    assert looked_into(queue, [0.0], 0.0) == [False]
    queue.idle(0.5)
    assert looked_into(queue, [0.5], 0.5) == [False]
    queue.idle(1.0)
    assert looked_into(queue, [0.5], 1.0) == [True]


def test_a_long_way_is_no_queue():
    """Who is far away comes late, but finds a stage that had nothing to do."""
    queue = Queue()
    assert not any(any(looked_into(queue, [0.9], at / 20)) for at in range(100))


def test_who_says_nothing_has_no_say():
    """Nor who has so much time that no queue is long for him, or a clock that is ahead."""
    queue = Queue()
    others = [None, Wait(0.5, 60.0), Wait(-0.01, 1.0)]
    queue.idle(0.0)
    for at in range(12):
        found = queue.waited_too_long([Wait(0.5, 1.0), *others], at / 100)
        queue.idle(at / 100 + 0.005)
    assert found == [True, False, False, False]
    assert queue.waited_too_long([None], 0.11) == [False]
    assert queue.waited_too_long([Wait(0.5, 1.0)], 0.11) == [False]  # all begins anew


def test_who_has_little_time_speaks_for_himself():
    """A retry has what is left of its call's time: the queue may be long for it, and short for the others."""
    queue = Queue()
    queue.idle(0.0)
    for at in range(12):
        found = queue.waited_too_long([Wait(0.005, 0.012), Wait(0.034, 0.1)], at / 100)
        queue.idle(at / 100 + 0.005)
    assert found == [True, False]
