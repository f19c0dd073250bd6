"""Text → words: stems, numbers in one form, units by one name, and pairs of letters where nothing parts words.

``2 in. x 1-1/2 ft`` and ``2" x 1.5 foot`` are the same words. A run of Chinese, Japanese or Thai letters becomes its
overlapping pairs, which for retrieval do as well as segmentation by a dictionary (Nie, Gao, Zhang and Zhou, "On the use
of words and n-grams for Chinese information retrieval", 2000) and need none.
"""

from __future__ import annotations

import html
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

import snowballstemmer

LANGUAGES = tuple(sorted(snowballstemmer.algorithms()))
"""That have a stemmer."""
ANY = "any"
"""No language in particular: words are not stemmed."""
NUMBER = "#"
"""What a number begins with."""
_NAMES = {
    "inch": "in inch inches zoll", "foot": "ft foot feet", "yard": "yd yard yards", "millimetre": "mm millimeter",
    "centimetre": "cm centimeter", "metre": "m meter", "pound": "lb lbs pound pounds", "ounce": "oz ounce ounces",
    "gram": "g gramm grams", "kilogram": "kg kilogramm", "gallon": "gal gallon gallons", "litre": "l liter liters",
    "millilitre": "ml milliliter", "square": "sq square", "cubic": "cu cubic", "volt": "v volt volts",
    "watt": "w watt watts", "ampere": "a amp amps ampere", "horsepower": "hp",
}  # fmt: skip
UNITS = {word: name for name, words in _NAMES.items() for word in words.split()}
"""Word → unit; those of less than three letters only behind a number."""
_UNSTEMMED = frozenset(_NAMES)
_APART = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
"""Letters of scripts that part no words."""
_TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?![\d,])|\d+[- ]\d+/\d+|\d+/\d+|\d+[.,]\d+|\.\d+|\d+"
    rf"|[{_APART}]+|[^\W\d_{_APART}]+|[\"'″′×]"
)
_BETWEEN = frozenset({"x", "by", "×"})
"""Between the numbers of a dimension."""
_MARKS = {'"': "inch", "″": "inch", "'": "foot", "′": "foot"}
_HEAD_ENDS = re.compile(r"[(,;]| [-–] | (?:with|for|and|in(?= [^\W\d])|mit|für|aus|und|avec|pour|con|para) ")
"""What ends the part of a title that names the product."""


class Analyser:
    """Cuts text into words.

    Args:
        language: one of LANGUAGES, or ANY.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self._stem = str if language == ANY else lru_cache(1 << 16)(snowballstemmer.stemmer(language).stemWord)

    def words(self, text: str) -> list[str]:
        """In their order; numbers begin with NUMBER."""
        found: list[str] = []
        after_number = False
        tokens = [match.group() for match in _TOKEN.finditer(normalised(text))]
        for at, token in enumerate(tokens):
            first = token[0]
            if first.isdigit() or first == ".":
                found.append(NUMBER + _number(token))
                after_number = True
                continue
            if token in _MARKS:
                if after_number:
                    found.append(_MARKS[token])
                    continue
            elif after_number and token in _BETWEEN and at + 1 < len(tokens) and tokens[at + 1][0].isdigit():
                pass
            elif "\u0e00" <= first <= "\u0e7f" or "\u3040" <= first <= "\u9fff" or "\uf900" <= first <= "\ufaff":
                found += [token[k : k + 2] for k in range(len(token) - 1)] or [token]
            elif token != "×" and (unit := UNITS.get(token)) and (after_number or len(token) > 2):
                found.append(unit)
                continue  # what comes between ``8 in. x 10 ft.`` is between two numbers
            elif token != "×":
                found.append(self._stem(token))
            after_number = False
        return found

    def head(self, title: str) -> int:
        """How many of a title's words name the product, before what it is made of, comes with or is for."""
        end = _HEAD_ENDS.search(normalised(title), 8)
        return len(self.words(title if end is None else normalised(title)[: end.start()]))


def normalised(text: str) -> str:
    """One form of each letter, small, without the marks of web pages."""
    return unicodedata.normalize("NFKC", html.unescape(text)).replace("\u2044", "/").lower()


def is_unit(word: str) -> bool:
    """Whether a word of ``Analyser.words`` is a unit."""
    return word in _UNSTEMMED


def _number(token: str) -> str:
    """One form: ``1-1/2``, ``1 1/2``, ``1.5`` and ``1,5`` are 1.5; ``5,000`` is 5000."""
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+", token):
        token = token.replace(",", "")
    if token.isdecimal():
        return token.lstrip("0") or "0"  # every digit of it: it may be a part's number
    try:
        if "/" in token:
            return f"{float(sum(Fraction(part) for part in re.split('[- ]', token))):.6g}"
        return f"{float(token.replace(',', '.')):.6g}"
    except (ValueError, ZeroDivisionError, OverflowError):
        return token
