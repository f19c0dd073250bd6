"""Many tensors in one, for the way between a client of ours and a server: each tensor that crosses a process boundary
in Triton has its price, whatever its size (benchmarks/hops.py measures it).

Layout, little-endian: how many tensors there are (int32), of each its place in the list of specifications and its
length in bytes (int32 both), then their contents, each beginning at a multiple of 8 bytes. A tensor has one row; one of
BYTES has one value, which lies there as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from trirank.contract import TensorSpec

_ALIGNMENT = 8
"""Of contents, so that numbers of any type can be read where they lie."""
_PADDING = [bytes(-length % _ALIGNMENT) for length in range(_ALIGNMENT)]


def places(specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Name → place in the list, which is what goes over the wire: lists only grow at their end."""
    return {spec.name: place for place, spec in enumerate(specs)}


def pack(contents: Mapping[int, bytes]) -> bytes:
    """One tensor's bytes.

    Args:
        contents: place of a specification → the tensor's bytes.
    """
    numbers = [len(contents)]
    for place, content in contents.items():
        numbers += (place, len(content))
    head = struct.pack(f"<{len(numbers)}i", *numbers)
    parts = [head, _PADDING[len(head) % _ALIGNMENT]]
    for content in contents.values():
        parts += (content, _PADDING[len(content) % _ALIGNMENT])
    return b"".join(parts)


def unpack(packed: bytes | memoryview, specs: Sequence[TensorSpec]) -> dict[str, memoryview]:
    """Name → bytes of each tensor, nothing copied.

    Raises:
        ValueError: the bytes are not of this layout, name no specification, or one twice; it says which.
    """
    whole = memoryview(packed).cast("B")
    size = len(whole)
    if size < 4:
        raise ValueError(f"has {size} bytes, fewer than its count of tensors takes")
    (count,) = struct.unpack_from("<i", whole)
    at = 4 + 8 * count
    if not 0 <= count <= len(specs) or at > size:
        raise ValueError(f"says that it holds {count} tensors, in {size} bytes; it holds 0 to {len(specs)}")
    numbers = struct.unpack_from(f"<{2 * count}i", whole, 4)
    at += -at % _ALIGNMENT
    found: dict[str, memoryview] = {}
    for place, length in zip(numbers[::2], numbers[1::2], strict=True):
        if not 0 <= place < len(specs):
            raise ValueError(f"holds a tensor number {place}; there are 0 to {len(specs) - 1}")
        name = specs[place].name
        if name in found:
            raise ValueError(f"holds {name} twice")
        if length < 0 or at + length > size:
            raise ValueError(f"says that {name} has {length} bytes, and ends before")
        found[name] = whole[at : at + length]
        at += length + -length % _ALIGNMENT
    return found
