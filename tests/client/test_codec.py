"""What a request becomes on the wire, and what the client refuses before anything is sent."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trirank import (
    Behaviour,
    EventKind,
    FeedbackEvent,
    History,
    IncompatibleServer,
    InvalidRequest,
    RankRequest,
    ServerError,
    Status,
    _codec,
    contract,
    packing,
    stable_id,
)
from trirank._codec import _header, decode
from trirank._feedback import decode_events, encode_events
from tritonclient.grpc import service_pb2

DTYPES = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}
SPECS = {spec.name: spec for spec in contract.REQUEST}


def encode(request, model):
    """As a server reads it."""
    message, names = _codec.encode(request, model)
    return service_pb2.ModelInferRequest.FromString(message), names


def tensors(message):
    """What one packed tensor holds."""
    (spec,), (raw,) = message.inputs, message.raw_input_contents
    assert (spec.name, spec.datatype, list(spec.shape)) == ("PACKED_REQUEST", "UINT8", [1, len(raw)])
    return {
        name: bytes(part) if SPECS[name].dtype == "BYTES" else np.frombuffer(part, DTYPES[SPECS[name].dtype])
        for name, part in packing.unpack(raw, contract.REQUEST).items()
    }


def test_ids_and_scores_lie_in_one_tensor():
    message, _ = encode(RankRequest(item_ids=[5, 6, 7], retrieval_scores=[0.5, 0.25, 0]), "rank")
    found = tensors(message)
    assert found["ITEM_IDS"].tolist() == [5, 6, 7]
    assert found["RETRIEVAL_SCORES"].tolist() == [0.5, 0.25, 0.0]


def test_huge_scores_are_numbers_too():
    """Their squares are none."""
    message, _ = encode(RankRequest(item_ids=[5, 6], retrieval_scores=[3e38, -3e38]), "rank")
    assert tensors(message)["RETRIEVAL_SCORES"][:2].tolist() == [np.float32(3e38), -np.float32(3e38)]


@pytest.mark.parametrize(("query", "scenario"), [("shoes", b"search"), ("", b"home")])
def test_the_scenario_follows_the_query(query, scenario):
    message, _ = encode(RankRequest(item_ids=[1], query=query), "rank")
    assert tensors(message)["SCENARIO"] == scenario


def test_optional_tensors_stay_away():
    message, _ = encode(RankRequest(item_ids=[1]), "rank")
    assert set(tensors(message)) == {"USER_ID", "ITEM_IDS", "TOP_K", "SCENARIO", "QUERY"}


@pytest.mark.parametrize("change", [{"top_k": 2.5}, {"top_k": "3"}, {"timestamp": 1.5}])
def test_whole_numbers_are_whole(change):
    with pytest.raises(InvalidRequest, match="it is a whole number"):
        encode(RankRequest(item_ids=[1], **change), "rank")


def test_the_anonymous_user():
    message, _ = encode(RankRequest(item_ids=[1]), "rank")
    assert tensors(message)["USER_ID"].tolist() == [contract.ANONYMOUS_USER]


def test_strings_become_stable_ids_and_come_back():
    message, names = encode(RankRequest(item_ids=["a", "b"], user_id="ann"), "rank")
    assert tensors(message)["ITEM_IDS"][:2].tolist() == [stable_id("a"), stable_id("b")]
    assert tensors(message)["USER_ID"].tolist() == [stable_id("ann")]
    response = decode(reply(ids=[stable_id("b"), -1]), names)
    assert [item.item_id for item in response] == ["b"]


def test_numpy_arrays_of_any_integer_kind():
    for dtype in (np.int8, np.uint16, np.int32, np.int64, np.uint64):
        message, _ = encode(RankRequest(item_ids=np.arange(1, 4, dtype=dtype)), "rank")
        assert tensors(message)["ITEM_IDS"][:3].tolist() == [1, 2, 3]


def test_a_history_travels():
    history = History(item_ids=[3, 4], behaviours=[Behaviour.CLICK, Behaviour.PURCHASE], timestamps=[10, 20])
    found = tensors(encode(RankRequest(item_ids=[1], history=history), "rank")[0])
    assert found["HISTORY_IDS"].tolist() == [3, 4]
    assert found["HISTORY_BEHAVIOURS"].tolist() == [2, 5]
    assert found["HISTORY_TIMESTAMPS"].tolist() == [10, 20]


def test_an_empty_history_is_one_padding_event():
    found = tensors(encode(RankRequest(item_ids=[1], history=History(item_ids=[])), "rank")[0])
    assert found["HISTORY_IDS"].tolist() == [contract.PAD_ITEM_ID]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (RankRequest(item_ids=[]), "0 candidates"),
        (RankRequest(item_ids=list(range(1025))), "1025 candidates; a request has 1 to 1024"),
        (RankRequest(item_ids=[1, -1]), "padding"),
        (RankRequest(item_ids=[1.5]), "float64"),
        (RankRequest(item_ids=[[1, 2]]), "2 dimensions"),
        (RankRequest(item_ids=["a", 1]), "mixes strings"),
        (RankRequest(item_ids=[2**63]), "INT64"),
        (RankRequest(item_ids=[2**70]), "64 bits"),
        (RankRequest(item_ids=[1], top_k=0), "top_k is 0"),
        (RankRequest(item_ids=[1], top_k=1025), "top_k is 1025; it goes from 1 to 1024"),
        (RankRequest(item_ids=[1], query="x" * 2049), "2049 bytes"),
        (RankRequest(item_ids=[1], query="\ud800"), "Unicode"),
        (RankRequest(item_ids=[1], retrieval_scores=[float("nan")]), r"retrieval_scores\[0\] is nan"),
        (RankRequest(item_ids=[1], retrieval_scores=[float("inf")]), "inf"),
        (RankRequest(item_ids=[1, 2], retrieval_scores=[1.0]), "one a candidate"),
        (RankRequest(item_ids=[1], timestamp=-5), "timestamp is -5"),
        (RankRequest(item_ids=[1], timestamp=2**80), "timestamp"),
        (RankRequest(item_ids=[1], history=History(item_ids=[1, 2], timestamps=[1])), "history.timestamps"),
        (RankRequest(item_ids=[1], history=History(item_ids=list(range(1025)))), "1025 events"),
    ],
)
def test_what_is_refused_before_it_is_sent(request_, words):
    with pytest.raises(InvalidRequest, match=words):
        encode(request_, "rank")


def reply(ids=(1, 2), status=(0, 0, 0, 0), leave_out=None, wrong_type=None):
    arrays = {
        "RANKED_IDS": np.array(ids, np.int64),
        "SCORES": np.zeros(len(ids), np.float32),
        "REASONS": np.zeros(len(ids), np.int32),
        "STATUS": np.array(status, np.int32),
    }
    arrays.pop(leave_out, None)
    return packed_reply({name: array.tobytes() for name, array in arrays.items()}, wrong_type or "UINT8")


def packed_reply(contents, dtype="UINT8"):
    message = service_pb2.ModelInferResponse(model_name="rank")
    places = packing.places(contract.RESPONSE)
    raw = packing.pack({places[name]: content for name, content in contents.items()})
    message.outputs.add(name="PACKED_RESPONSE", datatype=dtype, shape=[1, len(raw)])
    message.raw_output_contents.append(raw)
    return message


def test_padding_is_cut_from_the_answer():
    assert decode(reply(ids=[7, 8, -1, -1]), {}).item_ids.tolist() == [7, 8]


def test_status_is_typed_and_counted():
    response = decode(reply(status=(6, 2, 3, 4)), {})
    assert response.status == Status.UNKNOWN_ITEMS_DROPPED | Status.DUPLICATES_DROPPED
    assert (response.unknown, response.duplicates, response.filtered) == (2, 3, 4)


@pytest.mark.parametrize("fault", [{"leave_out": "SCORES"}, {"wrong_type": "FP64"}])
def test_another_server_is_named_as_such(fault):
    with pytest.raises(IncompatibleServer, match=next(iter(fault.values()))):
        decode(reply(**fault), {})


def test_a_response_iterates_and_converts():
    response = decode(reply(ids=[7, 8]), {})
    assert [item.position for item in response] == [1, 2]
    assert len(response) == 2
    assert response.to_dicts()[0] == {"position": 1, "item_id": 7, "score": 0.0, "reasons": []}


@given(
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=200),
    top_k=st.integers(1, 1024),
    query=st.text(st.characters(codec="utf-8"), max_size=100),
)
def test_whatever_is_accepted_is_lawful_on_the_wire(ids, top_k, query):
    message, _ = encode(RankRequest(item_ids=ids, top_k=top_k, query=query), "rank")
    found = tensors(message)
    assert found["ITEM_IDS"].tolist() == ids
    assert found["TOP_K"].tolist() == [top_k]
    assert found["QUERY"] == query.encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"history": History(item_ids=[1, 2], timestamps=[5])}, r"history.timestamps has shape \(1,\)"),
        ({"history": History(item_ids=[1, 2], behaviours=[1])}, r"history.behaviours has shape \(1,\)"),
        ({"history": History(item_ids=[1, 2], behaviours=[1, 2, 3])}, r"history.behaviours has shape \(3,\)"),
        ({"history": History(item_ids=[1], timestamps=["noon"])}, "history.timestamps holds what is no whole number"),
        ({"history": History(item_ids=[1], behaviours=["click"])}, "history.behaviours holds what is no whole number"),
        ({"history": History(item_ids=[1], timestamps=[-5])}, "history.timestamps holds -5"),
        ({"retrieval_scores": ["good"]}, "retrieval_scores holds what is no number"),
        ({"retrieval_scores": [[0.1], [0.2, 0.3]]}, "retrieval_scores holds what is no number"),
        ({"retrieval_scores": [None]}, r"retrieval_scores\[0\] is nan"),
        ({"item_ids": [[1], [2, 3]]}, "item_ids"),
        ({"item_ids": 5}, "item_ids is 5; it is a list of ids"),
        ({"item_ids": {1: 2}}, "it is a list of ids"),
        ({"item_ids": {1, 2}}, "it is a list of ids"),
        ({"item_ids": "SKU-1"}, "item_ids is 'SKU-1'; it is a list of ids"),
        ({"item_ids": np.array(5)}, "it is a list of ids"),
        ({"item_ids": ["\ud800"]}, "item_ids is no valid Unicode"),
        ({"user_id": "\ud800"}, "user_id is no valid Unicode"),
        ({"history": History(item_ids=[1], behaviours=[2**40])}, "history.behaviours holds 1099511627776"),
        ({"query": b"shoes"}, "query is b'shoes'; it is text"),
        ({"query": None, "item_ids": [1]}, "query is None; it is text"),
        ({"scenario": 7}, "scenario is 7; it is text"),
    ],
)
def test_whatever_cannot_be_sent_is_an_invalid_request(change, words):
    with pytest.raises(InvalidRequest, match=words):
        encode(RankRequest(**{"item_ids": [1], **change}), "rank")


def test_columns_of_pandas_and_polars_are_ids():
    import pandas
    import polars

    frame = pandas.DataFrame({"id": [5, 6, 7]})
    for ids in (frame[frame.id > 5].id, polars.Series([6, 7])):
        assert tensors(encode(RankRequest(item_ids=ids), "rank")[0])["ITEM_IDS"][:2].tolist() == [6, 7]


def harmed(harm):
    values = {
        "RANKED_IDS": np.array([7, 5], np.int64), "SCORES": np.array([2, 1], np.float32),
        "REASONS": np.zeros(2, np.int32), "STATUS": np.zeros(4, np.int32),
    }  # fmt: skip
    harm(values)
    return packed_reply(
        {name: value if isinstance(value, bytes) else value.tobytes() for name, value in values.items()}
    )


@pytest.mark.parametrize(
    "harm",
    [
        lambda values: values.update(SCORES=b"\0" * 7),
        lambda values: values.update(STATUS=np.zeros(3, np.int32)),
        lambda values: values.update(STATUS=b""),
        lambda values: values.update(REASONS=np.zeros(1, np.int32)),
        lambda values: values.update(SCORES=np.zeros(1, np.float32)),
    ],
)
def test_a_malformed_reply_is_an_incompatible_server(harm):
    with pytest.raises(IncompatibleServer, match="install the client that fits the server"):
        decode(harmed(harm), {})


def test_a_reply_with_fewer_contents_than_outputs():
    reply = harmed(lambda values: None)
    del reply.raw_output_contents[-1]
    with pytest.raises(IncompatibleServer):
        decode(reply, {})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_reach_nobody(bad):
    def harm(values):
        values["SCORES"][1] = bad

    with pytest.raises(ServerError, match=r"SCORES\[1\] is (nan|inf)"):
        decode(harmed(harm), {})


def test_headers_are_few_however_long_histories_are():
    """One a size, of which a cache of 256 would have made most anew."""
    _header.cache_clear()
    for _ in range(2):
        for length in range(1, 400):
            encode(RankRequest(item_ids=[1], history=History(item_ids=list(range(length)))), "rank")
    assert _header.cache_info().misses <= 399


def test_a_string_id_is_hashed_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(contract, "stable_id", lambda key: hashed.append(key) or stable_id(key))
    _, names = encode(RankRequest(item_ids=["a", "b", "c"], user_id="u"), "rank")
    assert sorted(hashed) == ["a", "b", "c", "u"]
    assert names == {stable_id(key): key for key in "abc"}


def test_filters_trace_and_id_go_along():
    request = RankRequest(item_ids=[1, 2], filters={"region": "de", "max_price": 9.5}, trace=True, request_id="page-81")
    message = encode(request, "rank")[0]
    assert message.id == "page-81"
    found = tensors(message)
    assert json.loads(found["FILTERS"]) == {"region": "de", "max_price": 9.5}
    assert found["TRACE"].tolist() == [1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"filters": {"colour": "red"}}, "filters has 'colour'; filters are region, min_price, max_price, min_stock"),
        ({"filters": {"max_price": float("nan")}}, "filters cannot be written as JSON"),
        ({"filters": {"region": b"de"}}, "filters cannot be written as JSON"),
        ({"request_id": "x" * 129}, "request_id has 129 bytes; the limit is 128"),
        ({"request_id": 7}, "request_id is 7; it is text"),
    ],
)
def test_what_goes_along_is_checked(change, words):
    with pytest.raises(InvalidRequest, match=words):
        encode(RankRequest(item_ids=[1], **change), "rank")


def test_a_trace_comes_back_in_the_callers_ids():
    names = {contract.stable_id("SKU-1"): "SKU-1"}
    text = json.dumps({"policy": "home", "rules": [], "items": [{"item": contract.stable_id("SKU-1")}]}).encode()
    message = harmed(lambda values: values.update(TRACE_JSON=text))
    assert decode(message, names).trace["items"] == [{"item": "SKU-1"}]
    with pytest.raises(IncompatibleServer, match="TRACE_JSON cannot be read"):
        decode(harmed(lambda values: values.update(TRACE_JSON=b"{]")), names)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "0 events; a batch has 1 to 1000"),
        ([FeedbackEvent(item_id=1, kind="view")] * 1001, "1001 events; a batch has 1 to 1000: send several"),
        ([FeedbackEvent(item_id=1, kind="sale")], "event 0 is of kind 'sale'; kinds are dislike, impression, view"),
        ([FeedbackEvent(item_id=1, kind=9)], "event 0 is of kind 9"),
        ([FeedbackEvent(item_id=object(), kind="view")], "event 0 is of user None and item <object"),
    ],
)
def test_feedback_is_checked_before_it_is_sent(events, words):
    with pytest.raises(InvalidRequest, match=words):
        encode_events(events)


def test_feedback_is_one_json_array():
    events = [
        FeedbackEvent(item_id=2**62, kind=EventKind.CART, user_id="ann", timestamp=5, event_id="e", position=3),
        FeedbackEvent(item_id="SKU-1", kind="view"),
    ]
    message = service_pb2.ModelInferRequest.FromString(encode_events(events))
    assert message.model_name == "feedback"
    first, second = json.loads(message.raw_input_contents[0][4:])
    assert first == {
        "event_id": "e", "user_id": "ann", "item_id": 2**62, "kind": "cart", "timestamp": 5, "request_id": "",
        "position": 3,
    }  # fmt: skip
    assert second["event_id"]
    assert second["user_id"] is None
    answer = service_pb2.ModelInferResponse(raw_output_contents=[(2).to_bytes(4, "little") + (1).to_bytes(4, "little")])
    assert (decode_events(answer).stored, decode_events(answer).repeated) == (2, 1)
    with pytest.raises(IncompatibleServer, match="not of this client's contract"):
        decode_events(service_pb2.ModelInferResponse())
