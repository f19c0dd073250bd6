"""Words that are understood: analysis, spelling, the lexicon, queries, and the kernels against a plain reference."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from trirank_backend.errors import InvalidRelease
from trirank_backend.features.batch import Lines
from trirank_backend.features.table import DENSE, DENSE_AT, WORDS, WORDS_TABLE
from trirank_backend.features.word_kernels import Scratch, understood
from trirank_backend.words.analysis import NUMBER, Analyser, is_unit
from trirank_backend.words.lexicon import (
    DIM,
    FULL,
    Lessons,
    Lexicon,
    QueryWords,
    load_lessons,
    load_lexicon,
    no_lexicon,
    save_arrays,
)
from trirank_backend.words.queries import QueryReader, unit
from trirank_backend.words.spelling import Speller

ENGLISH, ANY = Analyser("english"), Analyser("any")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("running shoes", "Run shoe"),
        ("2 in. x 1-1/2 ft.", '2" x 1.5 foot'),
        ("2x4 lumber", "2 x 4 lumber"),
        ("12by16 cap", "12 x 16 caps"),
        ("5,000 BTU", "5000 btu"),
        ("8 ft x 10 ft rug", "8 ft. by 10 ft rugs"),
        ('42"x36" panel', '42" x 36" panel'),
        ("007", "7"),
        ("1,5 l", "1.5 liter"),
        (".50 in", "1/2 inch"),
        ("¾ in", "3/4 inches"),
        ("K&#39;NEX", "K'NEX"),
        ("ﬁne", "fine"),
    ],
)
def test_ways_to_write_the_same_are_the_same_words(one, other):
    assert ENGLISH.words(one) == ENGLISH.words(other) != []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("part 1234567", "part 1234571"),
        ("4006381333931", "4006381333948"),
        ("2 in", "2 ft"),
        ("3 in", "4 in"),
        ("1/2 in", "1-1/2 in"),
        ("hammer", "hamster"),
    ],
)
def test_what_differs_stays_different(one, other):
    assert ENGLISH.words(one) != ENGLISH.words(other)


def test_a_unit_is_one_behind_a_number_alone():
    assert ENGLISH.words("a lamp in 2 in") == ["a", "lamp", "in", "#2", "inch"]
    assert is_unit("inch")
    assert not is_unit("in")


def test_scripts_that_part_no_words_become_pairs_of_letters():
    assert ANY.words("男士跑步鞋 42码") == ["男士", "士跑", "跑步", "步鞋", "#42", "码"]
    assert ANY.words("靴") == ["靴"]
    assert ANY.words("iPhone 手机壳") == ["iphone", "手机", "机壳"]


def test_german_is_stemmed_as_german():
    german = Analyser("german")
    assert german.words("Gartenschläuche") == german.words("gartenschlauch")
    assert german.words("rote Schuhe") == german.words("roter Schuh")


@pytest.mark.parametrize(
    ("title", "head"),
    [
        ("Delta Single Handle Faucet in Chrome", ["delta", "singl", "handl", "faucet"]),
        ("Kohler Toilet with Seat", ["kohler", "toilet"]),
        ("GE Water Filter for Refrigerator", ["ge", "water", "filter"]),
        ("Steel Wedge Anchor (25-Pack)", ["steel", "wedg", "anchor"]),
        ("Plain hammer", ["plain", "hammer"]),
    ],
)
def test_the_head_of_a_title_is_what_it_names(title, head):
    assert ENGLISH.words(title)[: ENGLISH.head(title)] == head


def test_any_text_can_be_analysed():
    for text in ("", " ", "\0", "x" * 100_000, "1" * 5_000, "1/0 in", "🦊", "ﷺ", "9,9,9,9", "½", "'", '"', "\ud800"):
        assert all(isinstance(word, str) and word for word in ENGLISH.words(text))


SPELLER = Speller(
    {
        "lawnmower": 9,
        "garden": 40,
        "hose": 50,
        "refrigerator": 30,
        "patio": 10,
        "door": 90,
        "garten": 30,
        "schlauch": 25,
        "hamilton": 50,
        "hampton": 3,
    },
    {"garden hose": 12, "patio door": 8, "lawn mower": 2},
)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("refridgerator", "refrigerator"),
        ("padio door", "patio door"),
        ("gardenhose 50 ft", "garden hose 50 ft"),
        ("lawn mower", "lawnmower"),
        ("gartenschlauch", "garten schlauch"),
        ("hose", "hose"),
        ("hamptn kettle", "hampton kettle"),
        ("hampton kettle", "hampton kettle"),
        ("xyzzyq", "xyzzyq"),
        ("door 2x4", "door 2x4"),
        ("", ""),
    ],
)
def test_queries_are_written_as_titles_are(typed, meant):
    assert SPELLER.mended(typed) == meant


def test_a_speller_reads_what_it_wrote(tmp_path):
    SPELLER.save(tmp_path)
    assert Speller.load(tmp_path).mended("refridgerator") == "refrigerator"
    (tmp_path / "spelling.json").write_text("[]")
    with pytest.raises(InvalidRelease, match="assemble again"):
        Speller.load(tmp_path)


VOCABULARY = ["hose", "#50", "foot", "garden", "reel", "green", "hoses"]
"""Numbers 1 to 7."""


def lexicon(rng: np.random.Generator) -> Lexicon:
    words, items = len(VOCABULARY), 4
    near = [(1, 7, 200, 180), (1, 5, 0, 120), (4, 6, 60, 90)]
    starts = np.searchsorted([pair[0] for pair in near], np.arange(words + 2)).astype(np.int64)
    titles = np.zeros((items + 1, 24), np.int32)
    titles[0, :5] = [4, 1, 2, 3, 6]
    titles[1, :4] = [5, 7, 4, 1]
    titles[2, :3] = [6, 3, 2]
    trigrams = np.zeros((items + 1, 64), np.int32)
    trigrams[:3, :4] = [[3, 9, 11, 4], [3, 8, 2, 1], [5, 6, 7, 9]]
    rarity = np.concatenate([[0], rng.uniform(0.5, 4, words)]).astype(np.float32)
    return Lexicon(
        titles=titles, heads=np.array([2, 2, 1, 0, 0], np.int32), trigrams=trigrams,
        vectors=rng.integers(-90, 90, (items + 1, DIM)).astype(np.int8), rarity=rarity,
        kinds=np.array([0, 0, 1, 2, 0, 0, 0, 0], np.int8),
        trigram_rarity=rng.uniform(0, 3, (1 << 15) + 1).astype(np.float32),
        word_vectors=unit(rng.normal(size=(words + 1, DIM)).astype(np.float32)),
        near_starts=starts, near_words=np.array([pair[1] for pair in near], np.int32),
        near_letters=np.array([pair[2] for pair in near], np.uint8),
        near_meaning=np.array([pair[3] for pair in near], np.uint8),
        mean_length=np.array([4], np.float32), encoded=np.zeros((items + 1, 0), np.int8),
    )  # fmt: skip


def lessons(rng: np.random.Generator) -> Lessons:
    words = len(VOCABULARY)
    told, pairs = [(1, 5, 100), (4, 5, 40)], [(1, 1, 0.5), (1, 5, -0.25), (6, 3, 1.0)]
    return Lessons(
        told_starts=np.searchsorted([p[0] for p in told], np.arange(words + 2)).astype(np.int64),
        told_words=np.array([p[1] for p in told], np.int32), told=np.array([p[2] for p in told], np.uint8),
        pair_starts=np.searchsorted([p[0] for p in pairs], np.arange(words + 2)).astype(np.int64),
        pair_words=np.array([p[1] for p in pairs], np.int32),
        pair_weights=np.array([p[2] for p in pairs], np.float32),
        missing=rng.normal(size=words + 1).astype(np.float32), head=rng.normal(size=words + 1).astype(np.float32),
        extra=rng.normal(size=words + 1).astype(np.float32),
        queries=unit(rng.normal(size=(3, DIM)).astype(np.float32)),
        lifts=rng.normal(size=(3, DIM)).astype(np.float32), masses=rng.normal(size=(3, DIM)).astype(np.float32),
        intent_classes=np.array([31, 35], np.int32), intent_prior=np.log([0.25, 0.75]).astype(np.float32),
        intent_sizes=np.log([14, 20]).astype(np.float32),
        intent_starts=np.array([0, 0, 1, 1, 1, 3, 3, 3, 3], np.int64), intent_places=np.array([0, 0, 1], np.int32),
        intent_weights=np.array([2.0, 1.0, 0.5], np.float32), intent_temperature=np.array([2.0], np.float32),
    )  # fmt: skip


def lines_of(rows, understood_words) -> Lines:
    count = len(rows)
    return Lines(
        starts=np.array([0, count]), rows=np.array(rows, np.int32), scores=np.full(count, np.nan, np.float32),
        query=np.zeros((1, 4), np.int32), words=np.zeros((1, 8, 8), np.uint64), timestamps=np.zeros(1, np.int64),
        anonymous=np.zeros(1, bool), history_rows=np.full((1, 2), -1, np.int32),
        history_behaviours=np.zeros((1, 2), np.int32), history_timestamps=np.zeros((1, 2), np.int64),
        understood=understood_words,
    )  # fmt: skip


def reference(lex: Lexicon, les: Lessons, read: QueryWords, row: int) -> dict[str, float]:
    """All columns of WORDS_TABLE in plain Python, slowly, and written apart from the kernel."""
    query = [int(word) for word in read.ids[0] if word]
    title = [int(word) for word in lex.titles[row] if word]
    if not query or not title:
        return dict.fromkeys(WORDS, 0.0)
    rarity, head = lex.rarity, title[: lex.heads[row]]
    total = sum(rarity[w] for w in query)
    numbers = [at for at, w in enumerate(query) if lex.kinds[w] == 1]
    plain = [at for at, w in enumerate(query) if lex.kinds[w] == 0]
    last = plain[-1] if plain else None

    def lists(starts, words, values, word):
        span = range(starts[word], starts[word + 1])
        return {int(words[at]): float(values[at]) for at in span}

    def best(word, starts, words, values):
        known = lists(starts, words, values, word) | {word: FULL}
        return max(known.get(other, 0) for other in title) / FULL

    letters = [best(w, lex.near_starts, lex.near_words, lex.near_letters) for w in query]
    meaning = [best(w, lex.near_starts, lex.near_words, lex.near_meaning) for w in query]
    told = [best(w, les.told_starts, les.told_words, les.told) for w in query]
    either = [max(pair) for pair in zip(letters, meaning, strict=True)]
    there = [w in title for w in query]

    def mean(values):
        return sum(v * rarity[w] for v, w in zip(values, query, strict=True)) / total

    neighbours = [(a, b) for a, b in pairwise(title)]
    asked = list(pairwise(query))
    pairs = sum(neighbours.count(pair) for pair in asked)
    measured = sum(neighbours.count(pair) for pair in asked if lex.kinds[pair[0]] == 1)
    places = [title.index(w) for w in query if w in title]
    length_norm = 1.5 * (1 - 0.75 + 0.75 * len(title) / 4)
    spots = range(max(len(head) - 2, 0), len(head))
    lesson = [les.missing[w] for w in query if w not in title]
    for spot, word in enumerate(title):
        if word not in query:
            lesson.append(les.extra[word])
            if spot in spots:
                lesson.append(les.head[word])
        if spot in spots and last is not None:
            lesson.append(lists(les.pair_starts, les.pair_words, les.pair_weights, query[last]).get(word, 0.0))

    def near_head(word):
        known = lists(lex.near_starts, lex.near_words, lex.near_meaning, word) | {word: FULL}
        return max((known.get(title[spot], 0) for spot in spots), default=0) / FULL

    vector = lex.vectors[row].astype(np.float64) / 127
    wanted = {int(gram) for gram in read.trigrams[0] if gram}
    grams = [int(gram) for gram in lex.trigrams[row] if gram]
    return {
        "word_bm25": sum(
            rarity[w] * title.count(w) * 2.5 / (title.count(w) + length_norm) for w in query if w in title
        ),
        "word_coverage": mean(there), "word_share": np.mean(there), "word_last": 0.5 if last is None else there[last],
        "word_numbers": np.mean([there[at] for at in numbers]) if numbers else 0.5,
        "word_measures": measured / len(numbers) if numbers else 0.5,
        "word_pairs": pairs / max(len(query) - 1, 1),
        "word_span": len(places) / (max(places) - min(places) + 1) if places else 0,
        "title_word_coverage": sum(rarity[w] for w in title if w in query) / sum(rarity[w] for w in title),
        "title_start": title[0] in query,
        "head_coverage": np.mean([w in title and title.index(w) < len(head) for w in query]),
        "head_found": bool(head) and head[-1] in query,
        "head_last": bool(head) and last is not None and head[-1] == query[last],
        "letters_mean": mean(letters), "letters_least": min(letters),
        "letters_last": 0.5 if last is None else letters[last],
        "meaning_mean": mean(meaning), "meaning_least": min(meaning),
        "meaning_last": 0.5 if last is None else meaning[last],
        "likeness_mean": mean(either), "likeness_least": min(either),
        "head_meaning": max(near_head(w) for w in query), "told_mean": mean(told), "told_least": min(told),
        "vector_cosine": vector @ read.vectors[0, 0], "neighbours_lift": vector @ read.vectors[0, 1],
        "neighbours_mass": vector @ read.vectors[0, 2],
        "trigram_bm25": sum(lex.trigram_rarity[gram] for gram in grams if gram in wanted) / (1 + len(grams) / 64),
        "lesson": sum(lesson) / math.sqrt(max(len(lesson), 1)),
        "query_words": math.log1p(len(query)), "query_rarity": total / len(query), "query_unknown": read.unknown[0],
        "encoder_cosine": 0.0, "query_intent": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_kernels_give_what_plain_python_gives(seed):
    rng = np.random.default_rng(seed)
    lex, les = lexicon(rng), lessons(rng)
    read = QueryWords.none(1)
    own = rng.choice(np.arange(1, 8), int(rng.integers(0, 6)), replace=seed % 3 == 0)
    read.ids[0, : len(own)] = own
    read.unknown[0] = rng.random()
    read.trigrams[0, :3] = rng.choice(np.arange(1, 12), 3, replace=False)
    read.vectors[:] = rng.normal(size=read.vectors.shape)
    rows = [0, 1, -1, 2, 3]
    dense, scratch = np.zeros((len(rows), len(DENSE + WORDS)), np.float32), Scratch.of(len(VOCABULARY))
    understood(lex, les, lines_of(rows, read), 0, 0, len(rows), scratch, dense)
    for at, row in enumerate(rows):
        expected = dict.fromkeys(WORDS, 0.0) if row < 0 else reference(lex, les, read, row)
        for name, value in expected.items():
            assert dense[at, getattr(DENSE_AT, name)] == pytest.approx(float(value), abs=1e-4), (name, row)
    assert not any(part.any() for part in scratch)  # what one line leaves would be the next one's


def test_the_reference_knows_every_column():
    rng = np.random.default_rng(0)
    read = QueryWords.none(1)
    read.ids[0, 0] = 1
    assert set(reference(lexicon(rng), lessons(rng), read, 0)) == {feature.name for feature in WORDS_TABLE}


def reader() -> QueryReader:
    rng = np.random.default_rng(1)
    return QueryReader(VOCABULARY, "english", SPELLER, lexicon(rng), lessons(rng))


def test_a_query_is_read_as_numbers_and_what_nobody_knows_is_told():
    found = reader().read(["gardenhose 50 ft zzzz", "", "of the", "zzzz"])
    assert found.ids[0, :5].tolist() == [4, 1, 2, 3, 0]
    assert found.unknown[0] == pytest.approx(0.2)
    assert not found.ids[1:].any()
    assert found.unknown[3] == 1
    assert found.vectors[0].any()
    assert not found.vectors[1].any()


def test_a_hostile_query_is_read_in_no_time_and_does_no_harm():
    found = reader().read(["x" * 100_000, "hose " * 50_000, "\0", "🦊" * 999, "1" * 9_999])
    assert found.ids[1, 0] == 1
    assert np.isfinite(found.vectors).all()


@pytest.mark.parametrize(
    "broken",
    [
        {"titles": np.full((5, 24), 99, np.int32)}, {"near_words": np.array([1, 2, 99], np.int32)},
        {"near_starts": np.zeros(9, np.int64)}, {"vectors": np.zeros((5, 3), np.int8)},
        {"rarity": np.zeros(3, np.float32)}, {"heads": np.zeros(5, np.float32)},
    ],
)  # fmt: skip
def test_a_damaged_lexicon_is_refused(broken, tmp_path):
    whole = lexicon(np.random.default_rng(0))
    save_arrays(whole, tmp_path)
    assert len(load_lexicon(tmp_path, 4).titles) == 5
    save_arrays(whole._replace(**broken), tmp_path)
    with pytest.raises(InvalidRelease, match="assemble again"):
        load_lexicon(tmp_path, 4)


@pytest.mark.parametrize(
    "broken", [{"told_words": np.array([99, 1], np.int32)}, {"missing": np.zeros(2, np.float32)},
               {"lifts": np.zeros((1, DIM), np.float32)}],
)  # fmt: skip
def test_damaged_lessons_are_refused(broken, tmp_path):
    whole = lessons(np.random.default_rng(0))
    save_arrays(whole, tmp_path)
    assert len(load_lessons(tmp_path, 7).missing) == 8
    save_arrays(whole._replace(**broken), tmp_path)
    with pytest.raises(InvalidRelease, match="assemble again"):
        load_lessons(tmp_path, 7)


def test_without_words_there_is_nothing():
    empty = no_lexicon(3)
    dense = np.zeros((2, len(DENSE)), np.float32)
    understood(empty, Lessons.none(0), lines_of([0, 1], QueryWords.none(1)), 0, 0, 2, Scratch.of(0), dense)
    assert not dense.any()


def test_numbers_are_told_from_words():
    assert [word for word in ENGLISH.words("2x4 board") if word.startswith(NUMBER)] == ["#2", "#4"]
