"""Policy files: those that are shipped, what is none, and what does not fit a release."""

from __future__ import annotations

import numpy as np
import pytest
from rules import apply, bound_to, page_of
from trirank_backend.errors import InvalidPolicy, InvalidRelease
from trirank_backend.policies import RULES, SHIPPED, Policy, load_policies, load_policy

RELEASE = bound_to()


@pytest.mark.parametrize("name", ["search", "home", "new_items", "cross_category"])
def test_shipped_policies_fit_any_release(name):
    policy = load_policies(SHIPPED)[name]
    assert policy.description
    for release in (RELEASE, bound_to(5)):
        policy.bind(release)


def test_every_rule_has_a_reason_of_its_own_or_drops_or_concerns_all():
    reasons = [rule.reason for rule in RULES if rule.reason is not None]
    assert len(set(reasons)) == len(reasons)
    assert {rule.__name__ for rule in RULES if rule.reason is None} == {"Mix", "Filter"}


BAD = {
    "unknown rule": ('[[rules]]\nrule = "shuffle"', "rule 1: there is no rule 'shuffle'; rules are mix, filter, boost"),
    "no rule": ("[[rules]]\nby = 1.0", "rule 1: it does not say which rule it is"),
    "unknown key": ('[[rules]]\nrule = "mmr"\nlambda = 1', r"rule 1 \(mmr\).lambda: unknown key"),
    "unknown setting": ("shuffle = true", "shuffle: unknown key"),
    "cap 0": ('[[rules]]\nrule = "cap"\nfield = "brand"\nat_most = 0', r"at_most: Input should be .* 1 \(got 0\)"),
    "cap of all": ('[[rules]]\nrule = "cap"\nfield = "brand"\nat_most = 10\nwindow = 10', "is no cap; say less"),
    "field": ('[[rules]]\nrule = "cap"\nfield = "colour"', r"field: Input should be .* \(got 'colour'\)"),
    "signal": ('[[rules]]\nrule = "boost"\nsignals = ["SHINY"]\nby = 1.0', "signals .*SHINY.* do not exist"),
    "boost of nothing": ('[[rules]]\nrule = "boost"\nby = 1.0', "boost is for no item at all"),
    "boost by nan": ('[[rules]]\nrule = "boost"\nitems = [1]\nby = nan', "finite number"),
    "filter of nothing": ('[[rules]]\nrule = "filter"', "filter is for no item at all"),
    "limits": ('[[rules]]\nrule = "filter"\nmin_price = 9\nmax_price = 3', "min_price is 9, above max_price 3"),
    "mix of nothing": ('[[rules]]\nrule = "mix"\ntasks = { click = 0.0 }', "all weights are 0"),
    "two mixes": ('[[rules]]\nrule = "mix"\n[[rules]]\nrule = "mix"', r"rule 2 \(mix\) comes after mix"),
    "mix after boost": (
        '[[rules]]\nrule = "boost"\nitems = [1]\nby = 1.0\n[[rules]]\nrule = "mix"', "whose score it would replace"
    ),
    "boost after mmr": (
        '[[rules]]\nrule = "mmr"\n[[rules]]\nrule = "boost"\nitems = [1]\nby = 1.0',
        r"rule 2 \(boost\) comes after mmr, whose work it would undo",
    ),
    "two rules for a slot": (
        '[[rules]]\nrule = "pin"\nitem = 1\nposition = 2\n[[rules]]\nrule = "sponsored"\nitems = [3]\nslots = [2]',
        "rules 1 and 2 both want position 2",
    ),
    "a slot twice": ('[[rules]]\nrule = "sponsored"\nitems = [3]\nslots = [2, 2]', "name a position twice"),
    "an item pinned twice": (
        '[[rules]]\nrule = "pin"\nitem = 1\nposition = 2\n[[rules]]\nrule = "pin"\nitem = 1\nposition = 3',
        "rule 2 pins item 1, which another rule pins already",
    ),
    "a pin against a filter": (
        '[[rules]]\nrule = "filter"\nitems = [1]\n[[rules]]\nrule = "pin"\nitem = 1\nposition = 3',
        "rule 1 filters item 1 out, which another rule pins",
    ),
    "position 0": ('[[rules]]\nrule = "pin"\nitem = 1\nposition = 0', r"position: .* \(got 0\)"),
    "quota that cannot be": ('[[rules]]\nrule = "quota"\nwithin = 3\ndifferent = 5', "5 different ones do not fit"),
    "quota of nothing": ('[[rules]]\nrule = "quota"', "it asks for nothing"),
    "prior": ('[[rules]]\nrule = "explore"\nprior_clicks = 30.0', "prior_clicks is 30, of 20 prior_showings"),
    "boost by too much": ('[[rules]]\nrule = "boost"\nitems = [1]\nby = 1e39', "by: Input should be less than"),
    "explore for ever": ('[[rules]]\nrule = "explore"\nuntil = 100000000000000000000', "until: Input should be less"),
    "an id of 70 bits": ('[[rules]]\nrule = "pin"\nitem = 9223372036854775808\nposition = 1', "item.*: Input should"),
    "dedupe of nothing": ('[[rules]]\nrule = "deduplicate"\nvariants = false', "neither variants nor titles"),
    "no TOML": ("rules = [", "is no valid TOML"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_policy(name, tmp_path):
    text, words = BAD[name]
    (tmp_path / "home.toml").write_text(text)
    with pytest.raises(InvalidPolicy, match=words):
        load_policy(tmp_path / "home.toml")


@pytest.mark.parametrize("order", ["mmr", "dpp"])
def test_an_order_from_the_scores_undoes_no_other(order):
    cap = {"rule": "cap", "field": "brand"}
    with pytest.raises(ValueError, match=rf"rule 2 \({order}\) comes after cap, whose order it would undo"):
        Policy.model_validate({"rules": [cap, {"rule": order}]})
    with pytest.raises(ValueError, match=rf"rule 2 \({order}\) comes after mmr"):
        Policy.model_validate({"rules": [{"rule": "mmr"}, {"rule": order}]})
    assert Policy.model_validate({"rules": [{"rule": order}, cap, cap | {"field": "seller"}]})
    searches = [{"rule": name, "queries": [name]} for name in ("mmr", "dpp")]
    assert Policy.model_validate({"rules": searches})  # no request meets both


def test_pins_for_different_searches_may_share_a_position():
    pins = [{"rule": "pin", "item": at, "position": 1, "queries": [f"query {at}"]} for at in (1, 2)]
    assert Policy.model_validate({"rules": pins})


def test_what_does_not_fit_a_release():
    with pytest.raises(InvalidRelease, match=r"rule 1 \(mix\): tasks sale are none of the ranker's: click, purchase"):
        Policy.model_validate({"rules": [{"rule": "mix", "tasks": {"sale": 1.0}}]}).bind(RELEASE)
    row = int(np.flatnonzero(RELEASE.items.brands >= 0)[0])
    brand = RELEASE.attributes.names["brand"][RELEASE.items.brands[row]]
    pinned = [{"rule": "filter", "brands": [brand]}, {"rule": "pin", "item": 100 + row, "position": 1}]
    with pytest.raises(InvalidRelease, match=r"rule 2 \(pin\): a filter leaves its item out"):
        Policy.model_validate({"rules": pinned}).bind(RELEASE)


def test_what_a_release_lacks_is_told_and_does_no_harm():
    rules = [
        {"rule": "boost", "brands": ["nobody"], "items": [100, 7], "by": 1.0},
        {"rule": "pin", "item": 8, "position": 1},
    ]
    policy = Policy.model_validate({"rules": rules})
    assert policy.absent(RELEASE) == [
        "rule 1 (boost): no item has the brand nobody",
        "rule 1 (boost): 1 of 2 items are not in the catalogue",
        "rule 2 (pin): item 8 is not in the catalogue",
    ]
    apply(RELEASE, page_of(RELEASE), *rules)


def test_a_pin_that_got_dearer_than_a_filter_allows_stops_no_refresh():
    row = int(np.flatnonzero(RELEASE.items.prices > 1)[0])
    rules = [{"rule": "filter", "max_price": 0.5}, {"rule": "pin", "item": 100 + row, "position": 1}]
    policy = Policy.model_validate({"rules": rules})
    assert policy.bind(RELEASE)
    assert policy.absent(RELEASE) == ["rule 2 (pin): a filter leaves its item out at today's price"]


def test_a_policy_is_written_as_it_was_read(tmp_path):
    for name, policy in load_policies(SHIPPED).items():
        (tmp_path / f"{name}.toml").write_text(policy.text())
        assert load_policy(tmp_path / f"{name}.toml") == policy
