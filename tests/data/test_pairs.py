"""Pairs as text: construction, rows, slices, splits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from word_model import calm, says

from underhood.core.errors import AnswerError, EmptyPrompt, OutOfRange, PairError, UsageError
from underhood.data import Pairs


def many(n: int) -> Pairs:
    return Pairs(
        [f"clean {i}" for i in range(n)],
        [f"contrast {i}" for i in range(n)],
        [f"a{i}" for i in range(n)],
        [f"w{i}" for i in range(n)],
        labels=[str(i) for i in range(n)],
    )


def test_single_strings_and_one_are_the_same_pair():
    assert (
        Pairs("x", "y", "a", "b")
        == Pairs.one("x", "y", "a", "b")
        == Pairs(["x"], ["y"], ["a"], ["b"])
    )
    assert Pairs("x", "y", ["a", "b"], 7).answers == (("a", "b"),)
    assert Pairs("x", "y", [["a", "b"]], 7).wrong == ((7,),)


def test_several_answers_per_row_and_uneven():
    pairs = Pairs(["x", "y"], ["p", "q"], [["a", "b"], "c"], [["d"], []])
    assert pairs.answers == (("a", "b"), ("c",))
    assert pairs.wrong == (("d",), ())


def test_from_rows_reads_every_spelling():
    rows = [
        {"clean": "x", "contrast": "y", "answer": "a", "wrong": "b", "label": 3},
        {"clean": "x", "corrupt": "y", "answers": ["a"], "wrong_answers": ["b"], "label": "3"},
        {"clean": "x", "corrupted": "y", "answers": "a", "wrong": ["b"], "case": "3"},
        {"clean_prefix": "x", "patch_prefix": "y", "clean_answer": "a", "patch_answer": "b"},
    ]
    pairs = Pairs.from_rows(rows)
    assert set(pairs.clean) == {"x"} and set(pairs.contrast) == {"y"}
    assert set(pairs.answers) == {("a",)} and set(pairs.wrong) == {("b",)}
    assert pairs.labels == ("3", "3", "3", "")


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"clean": "x"}, ["row 1", "contrast", "given", "corrupted"]),
        (
            {"clean": "x", "contrast": "y", "anwsers": "z"},
            ["row 1", "anwsers", "answers", "ignore"],
        ),
        ({"clean": "x", "contrast": "y", "corrupt": "z"}, ["row 1", "two columns"]),
        ({"clean": [1, 2], "contrast": "y"}, ["row 1", "[1, 2]", "ids"]),
        ({"clean": "x", "contrast": "x"}, ["row 1", "identical", "'x'"]),
    ],
)
def test_bad_rows_are_named(row, parts):
    with pytest.raises(PairError) as error:
        Pairs.from_rows([{"clean": "a", "contrast": "b"}, row])
    says(error, *[part for part in parts if part != "given"])


def test_ignored_columns_are_left_out():
    row = {"clean": "x", "contrast": "y", "note": "z"}
    assert Pairs.from_rows([row], ignore=["note"]).clean == ("x",)


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (lambda: Pairs(["a", "b"], ["c"]), PairError, ["2 clean", "1 contrast"]),
        (lambda: Pairs(["a", "b"], ["c", "d"], ["x"]), PairError, ["2 prompts", "1 as `answers`"]),
        (lambda: Pairs(["a", "b"], ["c", "d"], "x"), PairError, ["'x'", "each prompt"]),
        (lambda: Pairs(["a"], ["b"], labels=["1", "2"]), PairError, ["1 clean", "2 labels"]),
        (lambda: Pairs(["a", "s"], ["b", "s"]), PairError, ["row 1", "identical", "'s'"]),
        (lambda: Pairs("a", ""), EmptyPrompt, ["contrast", "row 0"]),
        (lambda: Pairs("a", "b", "x", "x"), PairError, ["row 0", "'x'", "remove"]),
        (lambda: Pairs("a", "b", None, "x"), UsageError, ["row 0", "'x'"]),
        (lambda: Pairs("a", "b", [""]), AnswerError, ["row 0", "''"]),
        (lambda: Pairs("a", "b", True), AnswerError, ["row 0", "True"]),
        (lambda: Pairs([], []), PairError, ["0 rows"]),
        (
            lambda: Pairs(["a", "b"], ["c", "d"], [["x"], []]),
            PairError,
            ["row 1", "1 of 2"],
        ),
    ],
)
def test_refusals(make, kind, parts):
    with pytest.raises(kind) as error:
        make()
    says(error, *parts)


def test_answers_can_be_filled_in_later():
    pairs = Pairs(["a", "b"], ["c", "d"], labels=["1", "2"], word_positions={"a": 0})
    assert pairs.needs_answers
    full = pairs.with_answers([3, " x"], [[4, 5], 6])
    assert not full.needs_answers and pairs.needs_answers
    assert full.wrong == ((4, 5), (6,)) and full.labels == ("1", "2")
    assert full.word_positions == {"a": 0}
    assert Pairs.one("a", "b").with_answers(["x", "y"]).answers == (("x", "y"),)


def test_rows_are_pairs_too():
    pairs = many(4)
    assert pairs[1].clean == ("clean 1",) and pairs[-1].labels == ("3",)
    assert pairs[1:3].answers == (("a1",), ("a2",)) and pairs[[3, 0]].wrong == (("w3",), ("w0",))
    assert [row.clean[0] for row in pairs] == list(pairs.clean)
    with pytest.raises(OutOfRange) as error:
        pairs[4]
    says(error, "no row 4", "0 to 3")
    with pytest.raises(IndexError):
        pairs[[0, -5]]


@calm
@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 9))
def test_a_split_is_a_partition_in_order(n, fraction, seed):
    pairs = many(n)
    first, second = pairs.split(fraction, seed)
    assert sorted(first.clean + second.clean) == sorted(pairs.clean)
    assert len(first) == min(max(round(fraction * n), 1), n - 1)
    for part in (first, second):
        assert part.labels is not None
        assert list(map(int, part.labels)) == sorted(map(int, part.labels))
    assert pairs.split(fraction, seed) == (first, second)


def test_splits_that_make_no_sense():
    with pytest.raises(OutOfRange) as error:
        many(3).split(1.0)
    says(error, "1.0", "0.8")
    with pytest.raises(PairError) as error:
        many(1).split(0.5)
    says(error, "1 row")
