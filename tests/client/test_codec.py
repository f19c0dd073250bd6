"""What a request becomes on the wire, and what the client refuses before anything is sent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trirank import (
    Behaviour,
    History,
    IncompatibleServer,
    InvalidRequest,
    RankRequest,
    Status,
    contract,
    stable_id,
)
from trirank._codec import decode, encode
from tritonclient.grpc import service_pb2

DTYPES = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}


def tensors(message):
    found = {}
    for spec, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        found[spec.name] = raw[4:] if spec.datatype == "BYTES" else np.frombuffer(raw, DTYPES[spec.datatype])
    return found


def test_ids_are_padded_to_their_bucket():
    message, _ = encode(RankRequest(item_ids=[5, 6, 7]), "rank")
    ids = tensors(message)["ITEM_IDS"]
    assert len(ids) == 64
    assert ids[:3].tolist() == [5, 6, 7]
    assert (ids[3:] == contract.PAD_ITEM_ID).all()


def test_scores_are_padded_alike():
    message, _ = encode(RankRequest(item_ids=[5, 6], retrieval_scores=[0.5, 0.25]), "rank")
    scores = tensors(message)["RETRIEVAL_SCORES"]
    assert len(scores) == 64
    assert scores[:3].tolist() == [0.5, 0.25, 0.0]


@pytest.mark.parametrize(("query", "scenario"), [("shoes", b"search"), ("", b"home")])
def test_the_scenario_follows_the_query(query, scenario):
    message, _ = encode(RankRequest(item_ids=[1], query=query), "rank")
    assert tensors(message)["SCENARIO"] == scenario


def test_optional_tensors_stay_away():
    message, _ = encode(RankRequest(item_ids=[1]), "rank")
    assert set(tensors(message)) == {"USER_ID", "ITEM_IDS", "TOP_K", "SCENARIO"}


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
        (RankRequest(item_ids=[1], history=History(item_ids=[1, 2], timestamps=[1])), "history_timestamps"),
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
    message = service_pb2.ModelInferResponse(model_name="rank")
    for spec in contract.RESPONSE:
        if spec.name == leave_out:
            continue
        message.outputs.add(name=spec.name, datatype="FP64" if spec.name == wrong_type else spec.dtype)
        message.raw_output_contents.append(arrays[spec.name].tobytes())
    return message


def test_padding_is_cut_from_the_answer():
    assert decode(reply(ids=[7, 8, -1, -1]), {}).item_ids.tolist() == [7, 8]


def test_status_is_typed_and_counted():
    response = decode(reply(status=(6, 2, 3, 4)), {})
    assert response.status == Status.UNKNOWN_ITEMS_DROPPED | Status.DUPLICATES_DROPPED
    assert (response.unknown, response.duplicates, response.filtered) == (2, 3, 4)


@pytest.mark.parametrize("fault", [{"leave_out": "SCORES"}, {"wrong_type": "REASONS"}])
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
    assert len(found["ITEM_IDS"]) in contract.BUCKETS
    assert found["ITEM_IDS"][: len(ids)].tolist() == ids
    assert found.get("QUERY", b"") == query.encode()
    specs = {spec.name: spec for spec in contract.REQUEST}
    for tensor in message.inputs:
        assert tensor.datatype == specs[tensor.name].dtype
