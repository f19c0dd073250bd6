"""A request in one tensor is the request in many, and so is its answer; bytes that are neither harm nobody."""

from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trirank import History, RankRequest, _codec, contract, packing
from trirank_backend.errors import InvalidInput
from trirank_backend.packed import packed_answer, unpacked_request
from trirank_backend.requests import Request
from tritonclient.grpc import service_pb2

POLICIES = {"home": 0, "search": 1}


def sent(request):
    """As Triton hands it over."""
    message = service_pb2.ModelInferRequest.FromString(_codec.encode(request, "rank")[0])
    return {"PACKED_REQUEST": np.frombuffer(message.raw_input_contents[0], np.uint8)[None]}


def raw(contents):
    return {"PACKED_REQUEST": np.frombuffer(packing.pack(contents), np.uint8)[None]}


def test_what_a_client_sends_is_what_a_stage_reads():
    request = RankRequest(
        item_ids=[5, 6, 7], user_id=42, query="kaffeemühle", top_k=2, retrieval_scores=[3, 2, 1], timestamp=99,
        history=History(item_ids=[8, 9], behaviours=[2, 5], timestamps=[10, 20]), filters={"min_price": 3}, trace=True,
    )  # fmt: skip
    found = Request(sent(request), POLICIES)
    assert found.packed
    assert found.item_ids.tolist() == [[5, 6, 7]]
    assert (found.users, found.queries, found.top_k, found.policies) == ([42], ["kaffeemühle"], [2], [1])
    assert (found.timestamps, found.trace) == ([99], [1])
    assert found.retrieval_scores.tolist() == [[3, 2, 1]]
    assert found.histories[0].item_ids.tolist() == [8, 9]
    assert found.histories[0].behaviours.tolist() == [2, 5]
    assert found.filters[0].min_price == 3


@given(
    st.dictionaries(st.integers(0, len(contract.REQUEST) - 1), st.binary(max_size=40), max_size=len(contract.REQUEST))
)
def test_whatever_is_packed_is_unpacked(contents):
    names = [spec.name for spec in contract.REQUEST]
    found = packing.unpack(packing.pack(contents), contract.REQUEST)
    assert {name: bytes(part) for name, part in found.items()} == {names[at]: part for at, part in contents.items()}


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_understood(junk):
    """And harm in no other way."""
    with suppress(InvalidInput):
        unpacked_request({"PACKED_REQUEST": np.frombuffer(junk, np.uint8)[None]})


PLACES = packing.places(contract.REQUEST)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (raw({}), "USER_ID is missing; every request has USER_ID, ITEM_IDS, TOP_K, SCENARIO"),
        (raw({PLACES["ITEM_IDS"]: b"123"}), "ITEM_IDS has 3 bytes, which is no number of INT64"),
        (raw({PLACES["USER_ID"]: bytes(16)}), "USER_ID has 2 numbers; it has 1"),
        ({"PACKED_REQUEST": np.zeros((1, 0), np.uint8)}, "has 0 bytes"),
        ({"PACKED_REQUEST": np.zeros((2, 8), np.uint8)}, "has 2 rows"),
        ({"PACKED_REQUEST": np.zeros((1, 8), np.uint8), "TOP_K": np.ones((1, 1), np.int32)}, "comes with TOP_K"),
        ({"PACKED_REQUEST": np.frombuffer(struct.pack("<i", -1), np.uint8)[None]}, "holds -1 tensors"),
        ({"PACKED_REQUEST": np.frombuffer(struct.pack("<3i4x", 1, 99, 0), np.uint8)[None]}, "a tensor number 99"),
        ({"PACKED_REQUEST": np.frombuffer(struct.pack("<3i4x", 1, 0, 8), np.uint8)[None]}, "and ends before"),
        ({"PACKED_REQUEST": np.frombuffer(struct.pack("<3i4x", 1, 0, -8), np.uint8)[None]}, "and ends before"),
        ({"PACKED_REQUEST": np.frombuffer(struct.pack("<5i4x", 2, 0, 0, 0, 0), np.uint8)[None]}, "USER_ID twice"),
    ],
)
def test_what_is_no_packed_request(tensors, words):
    with pytest.raises(InvalidInput, match=words):
        Request(tensors, POLICIES)


def test_an_answer_comes_back_whole():
    answer = {
        "RANKED_IDS": np.array([[7, 5, -1]]), "SCORES": np.array([[2, 1, 0]], np.float32),
        "REASONS": np.array([[1, 0, 0]], np.int32), "STATUS": np.array([[16, 1, 2, 3]], np.int32),
        "TRACE_JSON": np.array([[b'{"items": []}']], object),
    }  # fmt: skip
    packed = packed_answer(answer)["PACKED_RESPONSE"]
    reply = service_pb2.ModelInferResponse()
    reply.outputs.add(name="PACKED_RESPONSE", datatype="UINT8")
    reply.raw_output_contents.append(packed.tobytes())
    found = _codec.decode(reply, {})
    assert found.item_ids.tolist() == [7, 5]
    assert found.scores.tolist() == [2, 1]
    assert found.reasons.tolist() == [1, 0]
    assert (found.unknown, found.duplicates, found.filtered) == (1, 2, 3)
    assert found.trace == {"items": []}
