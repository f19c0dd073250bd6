"""PACKED_REQUEST and PACKED_RESPONSE as the tensors that they stand for; trirank.packing says how they lie in there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank import contract, packing

from trirank_backend.errors import InvalidInput

_NUMPY: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4"), "FP32": np.dtype("<f4")}
_SPECS = {spec.name: spec for spec in contract.REQUEST}
_ANSWERED = packing.places(contract.RESPONSE)


def unpacked_request(tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Tensors [1, …] of the request, by name; they are read where they lie.

    Raises:
        InvalidInput: it is not of the layout, or comes with other tensors beside it.
    """
    name = contract.PACKED_REQUEST.name
    packed = tensors[name]
    if len(tensors) > 1:
        raise InvalidInput(f"{name} comes with {', '.join(sorted(tensors.keys() - {name}))}; send it alone")
    if len(packed) != 1:
        raise InvalidInput(f"{name} has {len(packed)} rows; it has 1: send several requests")
    try:
        contents = packing.unpack(np.ascontiguousarray(packed[0]).data, contract.REQUEST)
    except ValueError as error:
        raise InvalidInput(f"{name} {error}") from None
    return {name: _array(name, content) for name, content in contents.items()}


def packed_answer(answer: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """PACKED_RESPONSE of an answer of one row."""
    contents = {
        _ANSWERED[name]: array[0, 0] if array.dtype == object else array.tobytes() for name, array in answer.items()
    }
    return {contract.PACKED_RESPONSE.name: np.frombuffer(packing.pack(contents), np.uint8)[None]}


def _array(name: str, content: memoryview) -> NDArray[Any]:
    spec = _SPECS[name]
    if spec.dtype == "BYTES":
        value = np.empty((1, 1), object)
        value[0, 0] = bytes(content)
        return value
    dtype = _NUMPY[spec.dtype]
    if len(content) % dtype.itemsize:
        raise InvalidInput(
            f"{contract.PACKED_REQUEST.name}: {name} has {len(content)} bytes, which is no number of {spec.dtype}"
        )
    array = np.frombuffer(content, dtype)[None]
    if spec.shape != (-1,) and array.shape[1:] != spec.shape:
        raise InvalidInput(
            f"{contract.PACKED_REQUEST.name}: {name} has {array.shape[1]} numbers; it has {spec.shape[0]}"
        )
    return array
