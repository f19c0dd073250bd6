"""Recipes: every key known, every value in range, every shipped one sound."""

from __future__ import annotations

import pytest
from trirank_build.errors import BadRecipe
from trirank_build.recipe import RECIPES, load_recipe


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_shipped_recipes_load_by_name(name):
    assert load_recipe(name).name == name


BAD = {
    "unknown key": ('name = "x"\ncolour = 1', r"colour: unknown key \(known: name, seed, features"),
    "unknown key in a section": (
        'name = "x"\n[training]\nlr = 1',
        r"training\.lr: unknown key \(known: epochs, patience",
    ),
    "no name": ("seed = 1", "name: Field required"),
    "a bad name": ('name = "My Recipe"', "name: .*'My Recipe'"),
    "not a number": ('name = "x"\n[training]\nepochs = "many"', r"training\.epochs: .*'many'"),
    "zero epochs": (
        'name = "x"\n[training]\nepochs = 0\nstart = "nothing"',
        'start = "nothing" and no pre-training leave nothing to learn',
    ),
    "counted choices": (
        'name = "x"\n[features]\ntransitions = true',
        'transitions goes with training.requests = "held_out"',
    ),
    "refit of logged requests": (
        'name = "x"\n[training]\nrefit = true',
        'refit goes with training.requests = "held_out"',
    ),
    "negative rate": ('name = "x"\n[training]\nlearning_rate = -1.0', r"learning_rate: .*greater than 0"),
    "heads": ('name = "x"\n[model]\ndim = 30\nheads = 4', "heads = 4 does not divide dim = 30"),
    "policies": ('name = "x"\n[policies.home]', "policies: unknown key"),
    "a biased classifier": (
        'name = "x"\n[training]\nposition_bias = 1.0\nobjective = "pointwise"',
        "goes with objective",
    ),
    "a bias to be tuned": (
        'name = "x"\n[tuning.space]\n"training.position_bias" = [0.0, 1.0]',
        "position_bias cannot be tuned",
    ),
    "not TOML": ("name = ", "no valid TOML"),
    "binary": ("\udcff\udcfe", "no valid TOML"),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD.keys())
def test_bad_recipes_name_the_key_and_the_value(tmp_path, text, words):
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadRecipe, match=words):
        load_recipe(str(path))


def test_several_faults_are_told_at_once(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\na = 1\nb = 2')
    with pytest.raises(BadRecipe, match="a: unknown key.*b: unknown key"):
        load_recipe(str(path))


def test_no_such_recipe():
    with pytest.raises(BadRecipe, match="shipped recipes.*shop"):
        load_recipe("nowhere.toml")
