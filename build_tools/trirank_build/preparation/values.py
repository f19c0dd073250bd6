"""What stands in a column, as numbers: prices, times, yes and no, behaviours, ids.

A value is *missing* where the file leaves it out (an empty field, or one of ``MISSING``), and *unreadable* where
something stands there that nobody can tell the meaning of. The report counts the two apart, the second with examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import polars as pl
from trirank.contract import Behaviour, stable_id

from trirank_build.errors import BadData
from trirank_build.preparation.cleaning import Report

MISSING = ("", "na", "n/a", "nan", "null", "none", "-", "?", "nil")
"""What stands for "not known", in any case of letters."""
YES = ("1", "true", "t", "yes", "y", "ja", "j", "oui", "si", "sí", "on", "available", "in stock", "instock", "in_stock")
NO = (
    "0", "false", "f", "no", "n", "nein", "non", "off", "unavailable", "out of stock", "outofstock", "out_of_stock",
    "sold out", "soldout",
)  # fmt: skip
BEHAVIOURS = {
    "view": Behaviour.VIEW, "impression": Behaviour.VIEW, "pv": Behaviour.CLICK, "click": Behaviour.CLICK,
    "1": Behaviour.CLICK, "fav": Behaviour.FAVOURITE, "favourite": Behaviour.FAVOURITE,
    "favorite": Behaviour.FAVOURITE, "like": Behaviour.FAVOURITE, "2": Behaviour.FAVOURITE, "cart": Behaviour.CART,
    "addtocart": Behaviour.CART, "add_to_cart": Behaviour.CART, "3": Behaviour.CART, "buy": Behaviour.PURCHASE,
    "purchase": Behaviour.PURCHASE, "transaction": Behaviour.PURCHASE, "order": Behaviour.PURCHASE,
    "4": Behaviour.PURCHASE,
}  # fmt: skip
"""Words (and Alibaba's numbers) for what a user did. Where nothing but views is logged, a view counts as a click."""
IdKind = Literal["numbers", "strings"]
ID_KINDS: tuple[str, ...] = get_args(IdKind)

_NUMBER = r"^(0|[1-9]\d{0,18})$"
"""An id that means the same as text and as a number: no zeros in front, no sign, no point."""
_PRICE = (
    r"(?i)^(?:\p{Sc}|[a-z]{1,4}\.?|[a-z]{1,3}\p{Sc})?\s*([-+]?\d[\d.,'’\s\u{a0}\u{202f}]*?)"
    r"(?:,-|\.-|,–)?\s*(?:\p{Sc}|[a-z]{1,4}\.?)?$"
)
"""A number between a currency's sign or letters, on either side."""
_SPACE = r"['’\s\u{a0}\u{202f}]"
_SPACED = r"^[-+]?\d{1,3}(['’\s\u{a0}\u{202f}]\d{3})+([.,]\d*)?$"
_POINT_THOUSANDS = r"^[-+]?[1-9]\d{0,2}(\.\d{3})+$"
_SLASHES = r"^\d{1,2}/\d{1,2}/\d{2,4}"
"""A day and a month, or a month and a day: nobody can tell."""
_DAYS, _CLOCKS = ("%Y-%m-%d", "%d.%m.%Y", "%Y/%m/%d"), (" %H:%M:%S%.f", "T%H:%M:%S%.f", " %H:%M", "T%H:%M")
_DATES = (
    *(f"{day}{clock}" for day in _DAYS for clock in _CLOCKS),
    *(f"%Y-%m-%d{clock}%#z" for clock in _CLOCKS[:2]),
    *_DAYS,
)
_UNITS = ((1e17, 1_000_000_000, "nanoseconds"), (1e14, 1_000_000, "microseconds"), (1e11, 1_000, "milliseconds"))


def prices(column: pl.Series, report: Report) -> pl.Series:
    """Float64, NaN where it is not known: ``12.50``, ``12,50 €``, ``$1,234.50``, ``1.234,50``, ``CHF 1'234.50``.

    Which mark stands before the decimals is told from the whole column, by the values that leave no doubt: one or two
    digits behind it, or another mark in front. A mark that three digits follow everywhere stands between thousands.
    """
    text = known(column)
    number = column.cast(pl.Float64) if column.dtype.is_numeric() else _written_prices(text, report)
    found = pl.select(pl.when(number.is_finite() & (number >= 0)).then(number)).to_series()
    report.read(column.name, text, found, "taken as unknown; a price is a number of 0 or more")
    return found.fill_null(float("nan")).alias(column.name)


def _written_prices(text: pl.Series, report: Report) -> pl.Series:
    """Float64 of prices as people write them, null for what is none."""
    bare = text.str.extract(_PRICE)
    spaced = bare.str.contains(_SPACE)
    bare = pl.select(pl.when(~spaced | bare.str.contains(_SPACED)).then(bare)).to_series()
    bare = bare.str.replace_all(_SPACE, "")
    by_comma = _decimals_after(bare, ",")
    by_point = _decimals_after(bare, ".")
    comma_decimal = by_comma > by_point
    point_thousands = comma_decimal or (not by_point and bool(bare.str.contains(_POINT_THOUSANDS).any()))
    if by_comma or by_point:
        others = min(by_comma, by_point)
        against = f" (in {others:,} values it is the other way round)" if others else ""
        report.note(f"{text.name}: a {'comma' if comma_decimal else 'point'} stands before the decimals{against}")
    elif point_thousands:
        report.note(f"{text.name}: points stand between thousands, since three digits follow each of them")
    one, last = pl.col("bare"), pl.col("bare").str.contains
    comma_is_last, point_is_last = last(r"\..*,"), last(r",.*\.")
    as_comma = comma_is_last | (~point_is_last & pl.lit(point_thousands))
    # Marks stand where they may, or it is no number: 1,2,3.
    with_comma = one.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True)
    with_comma = pl.when(one.str.contains(r"^[-+]?([1-9]\d{0,2}(\.\d{3})+|\d+)(,\d*)?$")).then(with_comma)
    with_point = one.str.replace_all(",", "", literal=True)
    with_point = pl.when(one.str.contains(r"^[-+]?([1-9]\d{0,2}(,\d{3})+|\d+)(\.\d*)?$")).then(with_point)
    number = pl.when(as_comma).then(pl.coalesce(with_comma, with_point)).otherwise(with_point)
    # What is written otherwise may still be a number: 1e3.
    plain = pl.when(~pl.col("text").str.contains(r"^[-+]?[\d.,]+$")).then(pl.col("text"))
    number = pl.coalesce(number.cast(pl.Float64, strict=False), plain.cast(pl.Float64, strict=False))
    return pl.DataFrame({"bare": bare, "text": text}).select(number=number).to_series()


def _decimals_after(bare: pl.Series, mark: str) -> int:
    """How many values leave no doubt that a mark stands before the decimals."""
    own, other = (r"\.", ",") if mark == "." else (",", r"\.")
    sure = bare.str.contains(rf"{own}(\d{{1,2}}|\d{{4,}})$") | bare.str.contains(rf"{other}\d*{own}")
    return int((sure | bare.str.contains(rf"^[-+]?0{own}\d+$")).sum())


def seconds(column: pl.Series, report: Report) -> pl.Series:
    """Int64 seconds since 1970, null where it is not known, from numbers of any unit or from dates."""
    text = known(column)
    if column.dtype in (pl.Datetime, pl.Date):
        found = column.cast(pl.Datetime("ms")).dt.epoch("s")
    else:
        numbers = text.cast(pl.Float64, strict=False)
        found = pl.Series(column.name, [None] * len(text), dtype=pl.Int64)
        if numbers.null_count() < numbers.len():
            middle = float(str(numbers.median()))
            divisor, unit = next(((d, u) for least, d, u in _UNITS if middle > least), (1, "seconds"))
            report.note(f"{column.name}: {unit} since 1970")
            found = (numbers / divisor).floor().cast(pl.Int64, strict=False)
        if found.null_count() > text.null_count():
            found = pl.select(pl.coalesce(found, _dates(text))).to_series()
            if found.null_count() < numbers.null_count():
                report.note(f"{column.name}: dates, in UTC where they name no time zone")
    report.read(
        column.name, text, found,
        "write seconds since 1970, or dates like 2026-01-31 13:45:00; of 01/02/2026 nobody can tell day and month",
    )  # fmt: skip
    return found.alias(column.name)


def _dates(text: pl.Series) -> pl.Series:
    """Int64 seconds of dates; null where it is none, or one that could be two."""
    dates = pl.select(pl.when(~text.str.contains(_SLASHES)).then(text.str.replace(r"\s*UTC$", "Z"))).to_series()
    found = pl.Series([None] * len(text), dtype=pl.Int64)
    for form in _DATES:
        if found.null_count() == text.null_count():
            break
        read = dates.str.to_datetime(form, strict=False, time_unit="us").dt.epoch("s")
        found = pl.select(pl.coalesce(found, read)).to_series()
    return found


def yes_or_no(column: pl.Series, report: Report) -> pl.Series:
    """Boolean, null where it is not known; a number above 0, such as what is in stock, is a yes."""
    text = known(column).str.to_lowercase()
    number = text.cast(pl.Float64, strict=False) > 0
    found = pl.select(
        pl.when(text.is_in(YES)).then(True).when(text.is_in(NO)).then(False).otherwise(number)
    ).to_series()
    report.read(column.name, text, found, f"taken as yes; write {', '.join(YES[:4])}, … or {', '.join(NO[:4])}, …")
    return found.alias(column.name)


def shares(column: pl.Series, report: Report) -> pl.Series:
    """Float64 from -1 to 1, null where it is not known; ``12 %`` and ``12%`` are 0.12."""
    text = known(column).str.replace(",", ".", literal=True)
    percent = text.str.ends_with("%")
    number = text.str.strip_chars(" %").cast(pl.Float64, strict=False)
    found = pl.select(pl.when(percent).then(number / 100).otherwise(number)).to_series()
    found = pl.select(pl.when(found.abs() <= 1).then(found)).to_series()
    report.read(column.name, text, found, "left unknown; write a share of the price such as 0.25, or 25 %")
    return found.alias(column.name)


def words(column: pl.Series) -> pl.Series:
    """List(String): of lists, or of text with commas, semicolons or bars between the words."""
    if column.dtype == pl.List(pl.String):
        return column.list.drop_nulls()
    split = known(column).str.replace_all(r"[;|]", ",").str.split(",")
    return split.list.eval(pl.element().str.strip_chars()).list.eval(pl.element().filter(pl.element() != ""))


def behaviours(column: pl.Series, extra: Mapping[str, Behaviour | None], report: Report) -> pl.Series:
    """Int8 codes of Behaviour, null for a word that nobody knows or that ``extra`` maps to None.

    Args:
        extra: further words, or other meanings of known ones; None: rows to be left out.
    """
    words = column.cast(pl.String).str.strip_chars().str.to_lowercase()
    meanings: dict[str, Behaviour | None] = {**BEHAVIOURS, **extra}
    codes = {word: meaning.value for word, meaning in meanings.items() if meaning is not None}
    found = words.replace_strict(list(codes), list(codes.values()), default=None, return_dtype=pl.Int8)
    unknown = words.filter(found.is_null() & words.is_not_null() & ~words.is_in(list(meanings)))
    if not len(unknown):
        report.lost("unknown behaviours", words.len(), 0, "", "")
    else:
        counts = unknown.value_counts(sort=True, name="count")
        named = ", ".join(f"{word!r} ({count:,})" for word, count in counts.head(5).iter_rows())
        more = f" and {counts.height - 5} more" if counts.height > 5 else ""
        first = str(counts.row(0)[0])
        report.lost(
            "unknown behaviours", words.len(), len(unknown), f"{named}{more}",
            f"say what they mean, such as --behaviour {first}=click, or --behaviour {first}=skip to leave them out",
        )  # fmt: skip
    return found.alias("behaviour")


def kind_of_ids(what: str, columns: Sequence[pl.Series], wanted: str | None, report: Report) -> IdKind:
    """Whether ids are taken as numbers or as text, which callers then have to send: of all columns alike.

    Args:
        what: ``item`` or ``user``.
        wanted: one of ID_KINDS; None: as they look.

    Raises:
        BadData: one is negative; or most are numbers and some are not, which may be damage, and nobody said what to do.
    """
    if wanted is not None:
        report.note(f"{what} ids: {wanted}")
        return "numbers" if wanted == "numbers" else "strings"
    odd, total, examples = 0, 0, list[str]()
    for column in columns:
        text = id_text(column).drop_nulls()
        negative = text.filter(text.str.contains(r"^-\d+$"))
        if len(negative):
            raise BadData(
                f"{what}_id holds {negative[0]}; ids are 0 or more: leave the field empty where it is nobody, or say "
                f"--{what}-ids strings to take all of them as text"
            )
        strange = text.filter(~text.str.contains(_NUMBER))
        odd, total = odd + len(strange), total + len(text)
        examples += strange.unique(maintain_order=True).head(3).to_list()
    if not odd:
        report.note(f"{what} ids: numbers")
        return "numbers"
    named = " and ".join(repr(example) for example in examples[:2])
    if odd * 2 < total:
        raise BadData(
            f"{odd:,} of {total:,} {what} ids are no plain numbers, such as {named}; say --{what}-ids strings to take "
            f"all of them as text (callers then send strings), or --{what}-ids numbers to leave those out"
        )
    report.note(f"{what} ids: strings, such as {named}; callers send them as strings")
    return "strings"


def are_numbers(column: pl.Series) -> bool:
    """Whether every id that is there is a plain number."""
    return bool(id_text(column).drop_nulls().str.contains(_NUMBER).all())


def to_ids(column: pl.Series, kind: IdKind) -> pl.Series:
    """Int64 ids: numbers as they are, text by ``contract.stable_id``; null where there is none, or no number.

    Raises:
        BadData: two names collide.
    """
    name = column.name
    if kind == "numbers" and column.dtype.is_integer():  # as most files have them, and many times as fast
        return pl.select(pl.when(column >= 0).then(column.cast(pl.Int64, strict=False))).to_series().alias(name)
    text = id_text(column)
    if kind == "numbers":
        plain = pl.select(pl.when(text.str.contains(_NUMBER)).then(text)).to_series()
        return plain.cast(pl.Int64, strict=False).alias(name)
    keys = text.drop_nulls().unique()
    hashed = pl.Series("id", [stable_id(key) for key in keys], dtype=pl.Int64)
    if hashed.n_unique() < keys.len():
        raise BadData(f"two values of {name} have the same 64-bit hash; rename one of them")
    return text.replace_strict(keys, hashed, default=None, return_dtype=pl.Int64).alias(name)


def known(column: pl.Series) -> pl.Series:
    """A column's values as text without spaces around; null where they are missing."""
    text = column.cast(pl.String).str.strip_chars()
    return pl.select(pl.when(~text.str.to_lowercase().is_in(MISSING)).then(text)).to_series().alias(column.name)


def id_text(column: pl.Series) -> pl.Series:
    """Ids as the log has them; null where there is none.

    Raises:
        BadData: the column's type holds no ids.
    """
    if column.dtype.is_nested() or column.dtype.is_temporal() or column.dtype == pl.Binary:
        raise BadData(f"{column.name} is of type {column.dtype}; ids are whole numbers or text")
    text = known(column)
    # Whole numbers beside missing ones become 7.0 in many a file.
    return text.str.replace(r"^(\d+)\.0+$", "${1}").alias(column.name)
