"""What stands in a column: nothing is lost in silence, and nothing is taken for what it is not."""

from __future__ import annotations

import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trirank.contract import Behaviour, stable_id
from trirank_build.errors import BadData
from trirank_build.preparation.cleaning import Report
from trirank_build.preparation.values import behaviours, kind_of_ids, prices, seconds, to_ids, yes_or_no

NOON = 1_767_268_800  # 2026-01-01 12:00 UTC


def column(*values, name="price"):
    return pl.Series(name, values, strict=False)


def patient():
    return Report(max_loss=1.0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["12.50", "3"], [12.5, 3]),
        (["12,50", "3"], [12.5, 3]),
        (["1.234,50", "12,00"], [1234.5, 12]),
        (["1,234.50", "12.00"], [1234.5, 12]),
        (["1,234", "12,345,678"], [1234, 12345678]),
        (["1.234", "0,99"], [1234, 0.99]),
        (["1.234", "0.99"], [1.234, 0.99]),
        (["€ 12,50", "12,50 €", "12,50 EUR", "EUR 12,50", "€12"], [12.5, 12.5, 12.5, 12.5, 12]),
        (["$1,234.50", "US$ 3", "£3.20", "¥ 1200"], [1234.5, 3, 3.2, 1200]),
        (["CHF 1'234.50", "12.-", "Rs. 300"], [1234.5, 12, 300]),
        (["1 234,50", "1\u00a0234,50"], [1234.5, 1234.5]),
        (["12,-", "9,99"], [12, 9.99]),
        (["1e3", "12.5"], [1000, 12.5]),
        (["899", "1.299", "2.499"], [899, 1299, 2499]),
        (["150.000", "150.000", "1.250.000"], [150_000, 150_000, 1_250_000]),
        (["0,500", "0,250"], [0.5, 0.25]),
        (["0.500", "0.250"], [0.5, 0.25]),
        ([12, 13], [12, 13]),
        ([1.5, None], [1.5, math.nan]),
        ([1.299, 2.499], [1.299, 2.499]),  # numbers of a Parquet file mean what they are
        (["", "N/A", "null", "-", "7"], [math.nan] * 4 + [7]),
    ],
)
def test_prices_as_people_write_them(written, meant):
    report = patient()
    assert prices(column(*written), report).to_list() == pytest.approx(meant, nan_ok=True)
    assert not any("unreadable" in line for line in report.notes)


@pytest.mark.parametrize("written", ["ask us", "-5", "12/13", "inf", "1,2,3,4", "12 or 13", "12 13"])
def test_what_is_no_price_is_unreadable_and_not_missing(written):
    report = patient()
    assert math.isnan(prices(column("1.50", written), report)[1])
    assert f"unreadable price: 1 of 2, such as {written!r}" in report.notes


def test_one_odd_price_does_not_turn_the_others():
    report = patient()
    found = prices(column("1,299", "2,499.00", "3,999", "12,5", "4,199.00"), report).to_list()
    assert found == pytest.approx([1299, 2499, 3999, math.nan, 4199], nan_ok=True)
    assert "unreadable price: 1 of 5, such as '12,5'" in report.notes


@given(st.lists(st.floats(0, 1e9).map(lambda price: round(price, 2)), min_size=1))
def test_a_price_is_the_same_in_german_and_in_english(values):
    english = [f"{value:,.2f}" for value in values]
    german = [text.translate(str.maketrans(",.", ".,")) for text in english]
    for written in (english, german):
        assert prices(column(*written), patient()).to_list() == pytest.approx(values)


def test_more_than_a_tenth_unreadable_is_an_error_that_shows_some():
    written = ["1"] * 8 + ["call", "soon"]
    with pytest.raises(
        BadData, match=r"unreadable price: 2 of 10, such as 'call', 'soon'.*more than 10%.*--max-loss 1"
    ):
        prices(column(*written), Report())


@pytest.mark.parametrize(
    "written",
    [
        NOON, str(NOON), NOON * 10**3, NOON * 10**6, NOON * 10**9, f"{NOON}.25", "2026-01-01 12:00:00",
        "2026-01-01T12:00:00", "2026-01-01T12:00:00Z", "2026-01-01T14:00:00+02:00", "2026-01-01 12:00",
        "01.01.2026 12:00", "2026/01/01 12:00:00", "2026-01-01 12:00:00 UTC", "2026-01-01T12:00:00.000Z",
    ],
)  # fmt: skip
def test_times_of_any_unit(written):
    assert seconds(column(written, written, name="timestamp"), patient()).to_list() == [NOON, NOON]


def test_days_alone_are_their_first_second():
    assert seconds(column("2026-01-01", "2026-01-02"), patient()).to_list() == [
        NOON - 43_200,
        NOON + 43_200,
    ]


def test_dates_and_numbers_may_stand_in_one_column():
    written = column(str(NOON), "2026-01-01 12:00:00", "2026-01-01T13:00:00+01:00", name="timestamp")
    assert seconds(written, patient()).to_list() == [NOON, NOON, NOON]


def test_a_day_that_could_be_a_month_is_no_time():
    report = patient()
    assert seconds(column("12/01/2025", "12/05/2025", name="timestamp"), report).to_list() == [None, None]
    assert "unreadable timestamp: 2 of 2, such as '12/01/2025', '12/05/2025'" in report.notes


def test_what_is_no_time_is_told():
    report = patient()
    assert seconds(column(str(NOON), "yesterday", None, name="timestamp"), report).to_list() == [NOON, None, None]
    assert "unreadable timestamp: 1 of 3, such as 'yesterday'" in report.notes


@pytest.mark.parametrize(("word", "meaning"), [("nein", False), ("0", False), ("FALSE", False), ("Sold out", False),
                                               ("ja", True), ("Yes", True), ("12", True), ("", None)])  # fmt: skip
def test_yes_and_no_in_several_languages(word, meaning):
    assert yes_or_no(column(word, "yes"), patient())[0] is meaning


def test_what_is_neither_yes_nor_no_is_told():
    report = patient()
    yes_or_no(column("maybe", "no", name="available"), report)
    assert "unreadable available: 1 of 2, such as 'maybe'" in report.notes


def test_unknown_behaviours_are_named_and_counted():
    report = patient()
    words = column(*["click"] * 5, "wishlist", "wishlist", "share")
    assert behaviours(words, {}, report).to_list() == [Behaviour.CLICK] * 5 + [None] * 3
    assert "unknown behaviours: 3 of 8, 'wishlist' (2), 'share' (1)" in report.notes


def test_behaviours_can_be_said():
    report = patient()
    found = behaviours(column("Wishlist", "share", "buy"), {"wishlist": Behaviour.CART, "share": None}, report)
    assert found.to_list() == [Behaviour.CART, None, Behaviour.PURCHASE]
    assert report.notes == []


def test_a_few_odd_ids_do_not_turn_numbers_into_text():
    ids = column(*map(str, range(100)), "0009", name="item_id")
    with pytest.raises(
        BadData, match=r"1 of 101 item ids are no plain numbers, such as '0009'.*--item-ids strings.*numbers"
    ):
        kind_of_ids("item", [ids], None, patient())
    assert kind_of_ids("item", [ids], "strings", patient()) == "strings"
    assert to_ids(ids, "strings")[100] == stable_id("0009") != to_ids(ids, "strings")[9]
    assert to_ids(ids, "numbers").to_list() == [*range(100), None]


def test_text_among_which_some_look_like_numbers_is_text():
    report = patient()
    assert kind_of_ids("item", [column("A-1", "B-2", "17")], None, report) == "strings"
    assert "item ids: strings, such as 'A-1' and 'B-2'; callers send them as strings" in report.notes


def test_ids_of_log_and_item_file_are_of_one_kind():
    log, items = column("1", "2"), column("A", "B", "C")
    assert kind_of_ids("item", [log, items], None, patient()) == "strings"


def test_no_id_is_made_up():
    ids = column(1.2, 1.9, 3.0, math.nan, math.inf, name="item_id")
    assert kind_of_ids("item", [ids], "numbers", patient()) == "numbers"
    assert to_ids(ids, "numbers").to_list() == [None, None, 3, None, None]
    assert to_ids(column("null", "", "a", name="user_id"), "strings").to_list() == [None, None, stable_id("a")]


def test_a_negative_id_is_an_error_wherever_it_stands():
    with pytest.raises(BadData, match="user_id holds -5; ids are 0 or more: leave the field empty"):
        kind_of_ids("user", [column("a", "b", "c", "d", "-5")], None, patient())


@pytest.mark.parametrize("values", [[[1], [2]], [b"a"]])
def test_ids_of_no_kind(values):
    with pytest.raises(BadData, match="ids are whole numbers or text"):
        to_ids(pl.Series("item_id", values), "numbers")


@pytest.mark.parametrize("values", [[1, 2], [1.0, None], ["1", "2"], ["1.0", "2.0"]])
def test_numbers_are_numbers(values):
    assert kind_of_ids("item", [column(*values)], None, patient()) == "numbers"
    assert to_ids(column(*values), "numbers")[0] == 1
