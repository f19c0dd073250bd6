"""What changes while a release is served: users, feedback, prices and stock; and stores that fail."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
from stores import SERVER, free_port, start_redis
from trirank import (
    AsyncRankClient,
    FeedbackEvent,
    History,
    IncompatibleServer,
    InvalidRequest,
    RankClient,
    RankRequest,
    Status,
    Unavailable,
)
from trirank_backend.stores.overlay import COUNTS, read_overlay
from trirank_backend.stores.store import open_store
from trirank_build.commands.serving import _filters
from trirank_build.online.catalogue import apply_delta
from trirank_build.online.requests import logged_requests
from trirank_build.online.skew import measure_skew
from trirank_build.repository.release import recorded_requests
from trirank_build.serving.server import TritonServer
from trirank_build.serving.stores import Stores
from tritonclient.grpc import service_pb2, service_pb2_grpc

_newcomers = itertools.count(5_000_001)


@pytest.fixture
def user():
    """Of whom nothing is known yet."""
    return next(_newcomers)


def bought(user, item, **more):
    return FeedbackEvent(user_id=user, item_id=item, kind="purchase", **more)


def ask(items, user, **more):
    return RankRequest(item_ids=items, user_id=user, top_k=len(items), scenario="home", **more)


@pytest.fixture
def items(shop):
    """One item of each of five products."""
    return shop.items.unique("product_id", keep="first", maintain_order=True)["item_id"].head(5).to_list()


def test_feedback_is_seen_by_the_next_request(client, items, user):
    assert Status.COLD_USER in client.rank(ask(items, user)).status
    result = client.feedback([bought(user, items[0])])
    assert (result.stored, result.repeated) == (1, 0)
    answer = client.rank(ask(items, user))
    assert Status.COLD_USER not in answer.status
    assert items[0] not in answer.item_ids  # home leaves out what was bought
    assert answer.filtered == 1


def test_a_batch_that_is_sent_twice_counts_once(client, items, user):
    batch = [FeedbackEvent(user_id=user, item_id=item, kind="click") for item in items]
    assert client.feedback(batch).stored == len(items)
    again = client.feedback([*batch, FeedbackEvent(user_id=user, item_id=items[0], kind="click")])
    assert (again.stored, again.repeated) == (1, len(items))


def test_both_clients_tell(server, items, user):
    async def tell():
        async with AsyncRankClient(server.grpc, deadline_s=10) as client:
            batches = [[FeedbackEvent(user_id=user, item_id=item, kind="view")] for item in items]
            return await asyncio.gather(*(client.feedback(batch) for batch in batches))

    assert sum(result.stored for result in asyncio.run(tell())) == len(items)


def test_what_is_disliked_is_not_shown_again(client, items, user):
    before = client.rank(RankRequest(item_ids=items, user_id=user, top_k=5, scenario="cross_category"))
    assert items[1] in before.item_ids
    item = before.item_ids[before.item_ids.tolist().index(items[1])]  # numpy's own, as services have it
    client.feedback([FeedbackEvent(user_id=user, item_id=item, kind="dislike")])
    answer = client.rank(RankRequest(item_ids=items, user_id=user, top_k=5, scenario="cross_category"))
    assert items[1] not in answer.item_ids
    own = History(item_ids=[items[2]], behaviours=[1], timestamps=[1_770_000_000])
    request = RankRequest(item_ids=items, user_id=user, top_k=5, scenario="cross_category", history=own)
    assert items[1] not in client.rank(request).item_ids  # a past that comes with the request takes nothing back


BAD_EVENTS = {
    "an unknown item": ({"item_id": 10**12}, r"item 1000000000000 \(event 1\) is not in the catalogue of release"),
    "the future": ({"timestamp": int(time.time()) + 10**6}, "event 1: timestamp is .*; it lies in the future"),
    "long ago": ({"timestamp": 20260101}, "event 1: timestamp is 20260101, .* write seconds since 1970"),
    "an id that is none": (
        {"item_id": "red shoe"},
        "event 1: item_id is 'red shoe'; ids of this catalogue are a number",
    ),
    "a position": ({"position": 5000}, "event 1: position is 5000; it goes from 1 to 1024"),
    "a long id": ({"event_id": "x" * 65}, "event 1: event_id is 'xxx.*; it is text of at most 64 bytes"),
    "no id": ({"event_id": ""}, "event 1 has no event_id"),
}


@pytest.mark.parametrize("name", BAD_EVENTS)
def test_a_bad_event_spoils_its_batch_and_nothing_of_it_is_stored(client, world, items, user, name):
    change, words = BAD_EVENTS[name]
    good = FeedbackEvent(user_id=user, item_id=items[0], kind="click")
    bad = FeedbackEvent(**({"user_id": user, "item_id": items[1], "kind": "click"} | change))
    with pytest.raises(InvalidRequest, match=words):
        client.feedback([good, bad])
    store = open_store(world.users)
    assert store.get([user]) == {}
    store.close()


def test_an_event_id_twice_in_a_batch(client, items, user):
    twice = [FeedbackEvent(user_id=user, item_id=item, kind="click", event_id="the same") for item in items[:2]]
    with pytest.raises(InvalidRequest, match="event 1 has the event_id 'the same' of event 0"):
        client.feedback(twice)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[", "EVENTS is no JSON"),
        (b"{}", "EVENTS holds dict; it is a JSON array of 1 to 1000"),
        (b"[]", "EVENTS holds 0 events"),
        (json.dumps([{}] * 1001).encode(), "EVENTS holds 1001 events; .*: send several batches"),
        (b"[7]", "event 0 is 7; an event is an object of event_id"),
        (b'[{"event": 1}]', "event 0 has the unknown key 'event'"),
        (b'[{"event_id": "a", "kind": "sale", "timestamp": 1770000000, "item_id": 1}]', "kind is 'sale'; kinds are"),
        (b'[{"event_id": "a", "kind": "click", "timestamp": true, "item_id": 1}]', "timestamp is True"),
        (b'[{"event_id": "a", "kind": "click", "timestamp": 1770000000, "item_id": 1.5}]', "item_id is 1.5"),
        ('[{"event_id": "a", "kind": "click", "timestamp": 1770000000, "item_id": "²"}]'.encode(), "item_id is '²'"),
        (b'[{"event_id": "\\ud800", "kind": "click", "timestamp": 1770000000, "item_id": 1}]', "event_id is '.ud800'"),
        (b'[{"event_id": "a", "kind": [], "timestamp": 1770000000, "item_id": 1}]', r"kind is \[\]"),
        (b"[" * 100_000, "EVENTS is no JSON"),
    ],
)
def test_feedback_of_strangers_is_checked(server, text, words):
    """Whoever speaks KServe may send it, without our client."""
    message = service_pb2.ModelInferRequest(model_name="feedback")
    message.inputs.add(name="EVENTS", datatype="BYTES", shape=(1, 1))
    message.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.match(words)


def test_showings_and_clicks_reach_what_explores(client, server, items, user):
    """Within some seconds, by a file that rerank reads again when it is replaced."""

    def counted():
        try:
            records = read_overlay(server._scratch / "counts.npy", COUNTS)
        except FileNotFoundError:
            return 0, 0
        row = records[records["id"] == items[2]]
        return (int(row["impressions"][0]), int(row["clicks"][0])) if len(row) else (0, 0)

    before = counted()
    kinds = ["impression"] * 5 + ["click"] * 2
    client.feedback([FeedbackEvent(user_id=user, item_id=items[2], kind=kind) for kind in kinds])
    deadline = time.monotonic() + 10
    while counted() < (before[0] + 5, before[1] + 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_which_rule_moved_what(client, items, user):
    request = ask(items, user, trace=True)
    plain = client.rank(ask(items, user))
    traced = client.rank(request)
    assert plain.trace is None
    assert traced.item_ids.tolist() == plain.item_ids.tolist()
    assert traced.trace["policy"] == "home"
    assert traced.trace["rules"] == ["available", "mix", "filter", "deduplicate"]
    assert [item["item"] for item in traced.trace["items"] if item["position"]] == plain.item_ids.tolist()
    assert [item["score"] for item in traced.trace["items"]] == pytest.approx(plain.scores.tolist(), abs=1e-5)


def test_filters_of_a_request(client, shop, items, user):
    prices = dict(shop.items.select("item_id", "price").iter_rows())
    limit = float(np.median([prices[item] for item in items]))
    answer = client.rank(ask(items, user, filters=_filters([f"max_price={limit}"])))
    assert sorted(answer.item_ids.tolist()) == sorted(item for item in items if prices[item] <= limit)
    assert answer.filtered == len(items) - len(answer)
    assert Status.ITEMS_FILTERED in answer.status
    for filters, words in (
        ({"region": "atlantis"}, "region is 'atlantis'; this catalogue has none: no item says where it can be had"),
        ({"min_price": 9, "max_price": 3}, "min_price is 9, above max_price 3"),
        ({"colour": "red"}, "filters has 'colour'; filters are region"),
        ({"min_stock": -1}, "min_stock is -1"),
        ({"max_price": 10**400}, "max_price is 1000"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            client.rank(ask(items, user, filters=filters))


def test_a_catalogue_changes_while_it_is_served(client, world, items, tmp_path, user):
    delta, file = tmp_path / "delta.csv", world.stores.catalogue
    before = client.rank(ask(items, user)).item_ids.tolist()
    delta.write_text(f"item_id,stock,blocked\n{items[0]},0,\n{items[1]},,yes\n")
    apply_delta(delta, file, world.release)
    try:
        wanted = [item for item in before if item not in items[:2]]
        assert _within_a_second(client, items, user, wanted)
        delta.write_text(f"item_id,stock\n{items[0]},5\n")
        apply_delta(delta, file, world.release)
        assert _within_a_second(client, items, user, [item for item in before if item != items[1]])
    finally:
        file.unlink()
    assert _within_a_second(client, items, user, before)


def _within_a_second(client, items, user, wanted):
    deadline = time.monotonic() + 1
    while client.rank(ask(items, user)).item_ids.tolist() != wanted:
        if time.monotonic() > deadline:
            return False
    return True


@pytest.mark.skipif(SERVER is None, reason="no redis-server here")
def test_a_store_that_goes_and_comes_back(world, items, user, tmp_path):
    """Answers come all the while, for a new user; feedback is refused, and taken when it is told again."""
    port = free_port()
    redis = start_redis(tmp_path, port)
    address = f"redis://127.0.0.1:{port}/0"
    try:
        with TritonServer(world.release, stores=Stores(address)) as server:
            server.wait_ready()
            with RankClient(server.grpc, deadline_s=5) as client:
                batch = [bought(user, items[0])]
                assert client.feedback(batch).stored == 1
                assert client.rank(ask(items, user)).filtered == 1

                redis.kill()
                redis.wait(10)
                took = []
                for _ in range(20):
                    started = time.monotonic()
                    answer = client.rank(ask(items, user))
                    took.append(time.monotonic() - started)
                    assert Status.DEGRADED | Status.COLD_USER in answer.status
                    assert len(answer) == len(items)
                assert sorted(took)[10] < 0.25
                with pytest.raises(Unavailable, match=r"user store 127\.0\.0\.1:\d+ did not answer"):
                    client.feedback([bought(user, items[1])], deadline_s=0.3)

                redis = start_redis(tmp_path, port)  # it reads its log again
                deadline = time.monotonic() + 5
                while Status.DEGRADED in (answer := client.rank(ask(items, user))).status:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                assert answer.filtered == 1
                assert client.feedback(batch).repeated == 1

                redis.send_signal(signal.SIGSTOP)  # there, and silent
                took = []
                for _ in range(20):
                    started = time.monotonic()
                    answer = client.rank(ask(items, user))
                    took.append(time.monotonic() - started)
                    assert Status.DEGRADED in answer.status
                assert sorted(took)[10] < 0.25
                redis.send_signal(signal.SIGCONT)
    finally:
        redis.kill()
        redis.wait(10)


def test_a_server_without_a_store_takes_no_feedback_and_logs_what_it_is_asked(world, items, tmp_path):
    requests = recorded_requests(world.release)
    with TritonServer(world.release, stores=Stores(requests=f"{tmp_path}?tensors=1")) as server:
        server.wait_ready()
        with RankClient(server.grpc, deadline_s=5) as client:
            assert Status.COLD_USER in client.rank(ask(items, 1)).status
            with pytest.raises(IncompatibleServer, match="takes no feedback; start it with --users"):
                client.feedback([bought(1, items[0])])
            for at, request in enumerate(requests):
                client.rank(replace(request, request_id=f"page-{at}"))
    lines = [line for line in logged_requests(tmp_path) if line["request_id"]]
    assert [line["request_id"] for line in lines] == [f"page-{at}" for at in range(len(requests))]
    assert [line["item_ids"][: len(r.item_ids)] for line, r in zip(lines, requests, strict=True)] == [
        list(request.item_ids) for request in requests
    ]
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.glob("requests-*"))
    found = measure_skew(world.release, tmp_path)
    assert found.compared >= len(requests)
    assert not found.differs
