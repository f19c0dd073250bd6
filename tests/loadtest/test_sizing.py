"""The model on paper is the formula where the formula is exact, and never says that more load is faster."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trirank_loadtest.errors import BadLoad
from trirank_loadtest.sizing import Server, erlang_c, machines, percentile_ms


@pytest.mark.parametrize(("places", "load", "chance"), [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (5, 4.0, 0.5541), (2, 3.0, 1)])
def test_erlangs_chance_to_wait(places, load, chance):
    """M/M/1 waits with the load itself; the others are in any table of Erlang C."""
    assert erlang_c(places, load) == pytest.approx(chance, abs=1e-4)


def test_one_place_is_mm1():
    """The wait of M/M/1 is exponential: P(W > t) = load * exp(-(mu - lambda) t)."""
    server = Server(capacity=100, cores=1, base_ms=1.0)
    wait_ms = percentile_ms(server, 80, 99) - 1.0
    assert 0.8 * math.exp(-(100 - 80) * wait_ms / 1e3) == pytest.approx(0.01)


@given(st.floats(10, 1e4), st.integers(1, 64), st.floats(0.01, 0.98), st.floats(0.01, 0.98), st.floats(0, 4))
def test_more_load_is_never_faster(capacity, cores, one, other, variation):
    server = Server(capacity, cores, 1.0, variation)
    low, high = sorted((one, other))
    assert 1.0 <= percentile_ms(server, low * capacity, 99) <= percentile_ms(server, high * capacity, 99)
    assert percentile_ms(server, capacity, 99) == math.inf


@given(st.floats(10, 1e4), st.integers(1, 16), st.floats(0.5, 20))
def test_what_one_machine_was_measured_to_hold_one_machine_holds(rate, cores, base_ms):
    server = Server.holding(rate, 50.0, cores, base_ms)
    assert server.capacity > rate
    assert machines(server, rate, 99, 50.0) == 1
    assert machines(server, 2.2 * rate, 99, 50.0) >= 2


def test_the_fewest_machines_that_keep_the_promise():
    server = Server(capacity=1800, cores=2, base_ms=1.5)
    found = machines(server, 10_000, 99, 50)
    assert percentile_ms(server, 10_000 / found, 99) <= 50
    assert percentile_ms(server, 10_000 / (found - 1), 99) > 50
    assert machines(server, 10_000, 99, 50, spare=2) == found + 2
    assert machines(server, 1, 99, 50) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: machines(Server(100, 1, 60.0), 10, 99, 50), "a request alone takes 60 ms"),
        (lambda: machines(Server(100, 1, 1.0), 0, 99, 50), "rate is 0"),
        (lambda: Server(0, 1, 1.0), "is no server"),
        (lambda: Server.holding(100, 50, 1, 60.0), "a request alone takes 60 ms"),
        (lambda: machines(Server(0.01, 1, 1.0), 1e6, 99, 50), "machines would be needed"),
    ],
)
def test_what_no_number_of_machines_can_do(call, words):
    with pytest.raises(BadLoad, match=words):
        call()
