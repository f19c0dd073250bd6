"""Which server is called, how often extra calls are made, and when a call is late. Time is made up."""

from __future__ import annotations

from collections import Counter

import pytest
from trirank import EjectionPolicy, Unavailable
from trirank._budget import LateTimes, TokenBucket
from trirank._pool import Pool


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def pool(addresses, clock, balancing="least_loaded", **ejection):
    return Pool(addresses, balancing, EjectionPolicy(**ejection), clock, seed=1)


def call(servers, healthy=True, tried=frozenset()):
    endpoint = servers.pick(tried)
    servers.done(endpoint, healthy)
    return endpoint.address


def test_all_take_turns(clock):
    servers = pool("abc", clock, "round_robin")
    assert Counter(call(servers) for _ in range(30)) == {"a": 10, "b": 10, "c": 10}


def test_the_one_with_less_to_do_is_taken(clock):
    servers = pool("ab", clock)
    busy = servers.pick()
    assert {call(servers) for _ in range(20)} == ({"a", "b"} - {busy.address})


def test_power_of_two_spreads(clock):
    servers = pool("abcd", clock)
    held = Counter(servers.pick().address for _ in range(100))
    assert max(held.values()) - min(held.values()) <= 3


def test_a_retry_goes_elsewhere(clock):
    servers = pool("ab", clock)
    assert {call(servers, tried=frozenset("a")) for _ in range(20)} == {"b"}
    assert call(servers, tried=frozenset("ab")) in "ab"  # all have been tried: any will do


def test_who_fails_in_a_row_is_left_alone_and_comes_back(clock):
    servers = pool("ab", clock, failures=3, pause_s=1.0, slow_start_s=0)
    for _ in range(3):
        servers.done(next(iter(fail_at(servers, "a"))), False)
    assert {call(servers) for _ in range(50)} == {"b"}
    clock.now += 1.1
    assert {call(servers) for _ in range(50)} == {"a", "b"}


def fail_at(servers, address):
    others = []
    while (endpoint := servers.pick()).address != address:
        others.append(endpoint)
    for other in others:
        servers.done(other, None)
    return [endpoint]


def test_it_is_left_alone_for_longer_each_time(clock):
    servers = pool("ab", clock, failures=1, pause_s=1.0, max_pause_s=3.0, slow_start_s=0)
    pauses = []
    for _ in range(4):
        endpoint = fail_at(servers, "a")[0]
        servers.done(endpoint, False)
        pauses.append(endpoint.left_alone_until - clock.now)
        clock.now = endpoint.left_alone_until + 0.01
    assert pauses == pytest.approx([1, 2, 3, 3])


def test_a_success_in_between_counts(clock):
    servers = pool("ab", clock, failures=2, slow_start_s=0)
    for _ in range(5):
        servers.done(fail_at(servers, "a")[0], False)
        servers.done(fail_at(servers, "a")[0], True)
    assert {call(servers) for _ in range(50)} == {"a", "b"}


def test_one_always_remains(clock):
    servers = pool("abc", clock, failures=1, max_share=1.0, slow_start_s=0)
    for address in "abc":
        if any(e.address == address for e in servers.endpoints):
            servers.done(servers.pick(frozenset("abc") - {address}), False)
    assert sum(e.left_alone_until > clock.now for e in servers.endpoints) == 2
    alone = pool("a", clock, failures=1)
    alone.done(alone.pick(), False)
    assert call(alone) == "a"


def test_overload_is_no_reason_to_leave_alone(clock):
    servers = pool("ab", clock, failures=1)
    for _ in range(10):
        call(servers, healthy=None)
    assert all(e.left_alone_until == 0 for e in servers.endpoints)


def test_a_new_one_starts_slowly(clock):
    servers = pool("ab", clock, "round_robin", slow_start_s=10.0)
    servers.update("abc")
    counts = Counter(call(servers) for _ in range(1000))
    assert 0 < counts["c"] < 120
    clock.now += 11
    counts = Counter(call(servers) for _ in range(900))
    assert counts["c"] > 250


def test_one_that_leaves_finishes_what_it_has(clock):
    servers = pool("ab", clock)
    last = fail_at(servers, "a")[0]
    (gone,) = servers.update("bc")
    assert gone is last
    assert gone.leaving
    servers.done(last, True)
    assert gone.under_way == 0
    assert {call(servers) for _ in range(200)} == {"b", "c"}


def test_an_empty_list_is_not_believed(clock):
    servers = pool("ab", clock)
    assert servers.update([]) == []
    assert len(servers) == 2
    with pytest.raises(Unavailable, match="no server"):
        pool([], clock).pick()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 1.0])
def test_extra_calls_stay_within_their_share(share):
    bucket, extra = TokenBucket(share, start=10.0), 0
    for _ in range(10_000):
        bucket.earn()
        extra += bucket.take()
    assert extra <= 10_000 * share + 10
    assert extra >= 10_000 * share - 1


def test_a_quantile_of_late(clock):
    times = LateTimes(0.95, window=100)
    for _ in range(19):
        times.add(0.001)
    assert times.value is None
    for at in range(101):
        times.add(at**2 / 1000)
    assert times.value == pytest.approx(95**2 / 1000, rel=0.05)
    for _ in range(200):  # old times go, and where all take the same, late is twice that
        times.add(0.5)
    assert times.value == 1.0


def test_a_thousand_ejections_are_as_good_as_ten(clock):
    servers = pool("ab", clock, failures=1, pause_s=1.0, max_pause_s=3.0, slow_start_s=0)
    for _ in range(1100):
        endpoint = fail_at(servers, "a")[0]
        servers.done(endpoint, False)
        assert endpoint.left_alone_until - clock.now == pytest.approx(min(3.0, 2.0 ** min(endpoint.ejections - 1, 10)))
        clock.now = endpoint.left_alone_until + 0.01


def test_calls_that_were_under_way_do_not_eject_again(clock):
    """Thirty failures at once are one outage, and one pause."""
    servers = pool("ab", clock, failures=3, pause_s=1.0, max_pause_s=30.0, slow_start_s=0)
    endpoint = next(e for e in servers.endpoints if e.address == "a")
    began = clock.now
    for _ in range(30):
        servers.done(endpoint, False, began)
        endpoint.under_way += 1
    assert endpoint.left_alone_until == clock.now + 1.0
    clock.now += 5  # the last of them end after the pause
    for _ in range(30):
        servers.done(endpoint, False, began)
    assert endpoint.left_alone_until < clock.now


def test_one_that_does_not_fit_is_left_alone_at_once(clock):
    servers = pool("ab", clock, failures=3, pause_s=1.0, slow_start_s=0)
    servers.unfit(fail_at(servers, "a")[0])
    assert {call(servers) for _ in range(50)} == {"b"}


def test_a_hedge_goes_only_to_a_server_whose_contract_is_known(clock):
    servers = pool("ab", clock)
    first = servers.pick()
    tried = frozenset({first.address})
    assert servers.pick_hedge(tried) is None
    for endpoint in servers.endpoints:
        endpoint.checked = True
    assert servers.pick_hedge(tried).address == ({"a", "b"} - tried).pop()
    assert servers.pick_hedge(frozenset("ab")) is None


def test_clocks_are_compared_again_after_a_while(clock):
    servers = pool("a", clock)
    (endpoint,) = servers.endpoints
    servers.clock_differs(endpoint)
    assert not servers.clock_agrees(endpoint)
    clock.now += 61
    assert servers.clock_agrees(endpoint)


def test_saved_up_hedges_are_few():
    """However long a client was quiet, a burst of hedges stays a burst."""
    bucket = TokenBucket(0.05)
    for _ in range(10_000):
        bucket.earn()
    assert sum(bucket.take() for _ in range(100)) == 10


def test_what_is_put_aside_is_nobody_elses_to_put_aside():
    bucket = TokenBucket(0.1, start=2.0)
    assert [bucket.reserve() for _ in range(3)] == [True, True, False]
    bucket.release()
    assert bucket.reserve()
    bucket.redeem()
    bucket.redeem()
    assert not bucket.take()
