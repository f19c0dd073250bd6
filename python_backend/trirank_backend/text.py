"""Text to token ids: one tokeniser for titles at build time and queries at serving time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trirank_backend.errors import InvalidRelease


class TextEncoder:
    """Token ids of the joint vocabulary, cut and 0-padded to a fixed length.

    Args:
        tokenizer: its id 0 is padding.
        offset: where the tokens start in the joint vocabulary: token ``t`` is ``offset + t``.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._offset = offset

    @classmethod
    def load(cls, path: Path, offset: int) -> TextEncoder:
        """Read a ``tokenizer.json``.

        Raises:
            InvalidRelease: it is missing or damaged.
        """
        try:
            return cls(Tokenizer.from_file(str(path)), offset)
        except Exception as error:  # the library raises bare Exception
            raise InvalidRelease(f"tokeniser {path} cannot be read ({error}); assemble again") from error

    def encode(self, texts: list[str], length: int) -> NDArray[np.int32]:
        """[B, length] int32."""
        ids = np.zeros((len(texts), length), np.int32)
        for row, encoding in enumerate(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
            tokens = encoding.ids[:length]
            ids[row, : len(tokens)] = tokens
        return np.where(ids > 0, ids + self._offset, 0).astype(np.int32)
