"""Queries as the titles would write them: misspelt words, words written together or apart.

Deletions of known words are looked up (SymSpell, Garbe 2012, by symspellpy); a word that no title has and that two
titles' words make up is taken apart, and two that titles write as one are put together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from symspellpy import SymSpell, Verbosity

from trirank_backend.errors import InvalidRelease

FILE = "spelling.json"
MOST = 100_000
"""Words and pairs that are known, the most frequent ones."""
_LEAST_COUNT = 3
"""Titles that a word is in before another is taken for it."""
_SHORTEST = 4
"""Letters of a word that is mended; of fewer too many are near."""
_PART = 3
"""Letters of the parts of a word that is taken apart."""
_COMMON = 20
"""Titles that each part is in, where no title has both beside each other."""
_LETTERS = re.compile(r"[^\W\d_]+")
_LINKS = ("", "s", "n", "es", "en")
"""What stands between the parts of a German compound."""


class Speller:
    """Args:
    words: how many titles have each word, as it is written.
    pairs: how many have two words beside each other, ``a b``.
    """

    def __init__(self, words: dict[str, int], pairs: dict[str, int]) -> None:
        self.words, self.pairs = words, pairs
        self._near = SymSpell(max_dictionary_edit_distance=2, prefix_length=7)
        for word, count in words.items():
            if count >= _LEAST_COUNT and len(word) >= _SHORTEST - 1:
                self._near.create_dictionary_entry(word, count)

    @classmethod
    def load(cls, directory: Path) -> Speller:
        """Read what ``save`` wrote.

        Raises:
            InvalidRelease: it is missing or damaged.
        """
        try:
            found = json.loads((directory / FILE).read_text())
            return cls(found["words"], found["pairs"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidRelease(f"{directory / FILE} cannot be read ({error}); assemble again") from error

    def save(self, directory: Path) -> None:
        """Write into ``directory``."""
        (directory / FILE).write_text(json.dumps({"words": self.words, "pairs": self.pairs}, ensure_ascii=False))

    def mended(self, query: str) -> str:
        """The query, in small letters, with the words that titles have."""
        found: list[str] = []
        written: list[tuple[str, bool]] = []  # parts, and whether each is a word
        end = 0
        for match in _LETTERS.finditer(query):
            written += [(query[end : match.start()], False), (match.group(), True)]
            end = match.end()
        written.append((query[end:], False))
        at = 0
        while at < len(written):
            part, is_word = written[at]
            if is_word and at + 2 < len(written) and written[at + 1][0] == " " and written[at + 2][1]:
                other = written[at + 2][0]
                joined = self.words.get(part + other, 0)
                if joined >= _LEAST_COUNT and joined > self.pairs.get(f"{part} {other}", 0):
                    found.append(part + other)
                    at += 3
                    continue
            found.append(" ".join(self._word(part)) if is_word else part)
            at += 1
        return "".join(found)

    def _word(self, word: str) -> list[str]:
        if len(word) < _SHORTEST or word in self.words or (not word.isascii() and not word.isalpha()):
            return [word]
        if parts := self._apart(word, beside=True):
            return parts
        most = 2 if len(word) > 5 else 1
        if near := self._near.lookup(word, Verbosity.CLOSEST, max_edit_distance=most):
            return [near[0].term]
        return self._apart(word, beside=False) or [word]

    def _apart(self, word: str, beside: bool) -> list[str]:
        """The two known words that it is made of, or none."""
        best: tuple[int, list[str]] = (0, [])
        for at in range(_PART, len(word) - _PART + 1):
            first, second = word[:at], word[at:]
            if beside:
                count = self.pairs.get(f"{first} {second}", 0)
                if count > max(best[0], 1):
                    best = count, [first, second]
                continue
            for link in _LINKS:
                stem = first[: len(first) - len(link)] if link and first.endswith(link) else first
                if (link and stem == first) or len(stem) < _PART:
                    continue
                count = min(self.words.get(stem, 0), self.words.get(second, 0))
                if count >= _COMMON and count > best[0]:
                    best = count, [stem, second]
        return best[1]
