"""Pairs as tokens: what encode proves, and how it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from word_model import WordModel, calm, says

from underhood.core.errors import AnswerError, EmptyPrompt, PairError, ShapeMismatch
from underhood.core.tokens import Tokens
from underhood.data import Pairs, Reads


def test_the_fake_is_a_reads():
    assert isinstance(WordModel(), Reads)
    assert not isinstance(object(), Reads)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_positions_are_the_rows_own(bos, left):
    model = WordModel(bos=bos, left=left)
    pairs = Pairs(["the uncle near", "the"], ["the uncles near", "uncle"], [" is", " has"])
    encoded = pairs.encode(model)
    assert len(encoded) == 2
    assert encoded.first_difference == [1 + bos, bos]
    assert encoded.clean.lengths == encoded.contrast.lengths == [3 + bos, 1 + bos]


def test_answers_are_padded_with_minus_one():
    model = WordModel()
    pairs = Pairs(["A B", "A B"], ["A C", "A D"], [[" A", " B"], [" C"]], [[], [" D", 5]])
    encoded = pairs.encode(model)
    a, b, c, d = (model.token_id(text) for text in (" A", " B", " C", " D"))
    assert encoded.answers.tolist() == [[a, b], [c, -1]]
    assert encoded.wrong.tolist() == [[-1, -1], [d, 5]]
    assert encoded.to("cpu").answers.tolist() == encoded.answers.tolist()


def test_unknown_answers_have_no_columns():
    encoded = Pairs("A B", "A C").encode(WordModel())
    assert encoded.answers.shape == encoded.wrong.shape == (1, 0)


def test_unequal_lengths_show_both_prompts_aligned():
    pairs = Pairs(["A B", "the uncle near dogs"], ["A C", "the aunts near dogs"], [" is", " is"])
    with pytest.raises(PairError) as error:
        pairs.encode(WordModel())
    says(error, "row 1", "4 and 9 tokens", "position 1", "usable")
    lines = str(error.value).splitlines()
    clean, contrast, mark = (
        next(s for s in lines if word in s) for word in (" clean  ", "contrast |", "^")
    )
    assert "|the| uncle| near|" in clean
    assert contrast.index("|the|") == clean.index("|the|")
    assert mark.index("^") == clean.index(" uncle") and "|a" in contrast


def test_a_long_common_beginning_is_cut():
    words = " ".join(["A"] * 20)
    with pytest.raises(PairError) as error:
        Pairs(words, words + " B", " is").encode(WordModel())
    says(error, "20 and 21 tokens", "…| A| A", "| A| B|\n", "position 20")


def test_identical_as_tokens():
    class Blind(WordModel):
        def _pieces(self, text: str) -> list[str]:
            return super()._pieces(text.lower())

    with pytest.raises(PairError) as error:
        Pairs("The uncle", "the uncle", " is").encode(Blind())
    says(error, "row 0", "identical as tokens", "same ids")


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (" Paris", ["row 0", "' Paris'", "'P' | 'a'", "6 tokens", "usable"]),
        ("<bos>x", ["row 0", "tokens"]),
        (" 99", ["' 99'", "3 tokens"]),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_answers_of_several_tokens_show_their_pieces(answer, parts, bos):
    with pytest.raises(AnswerError) as error:
        Pairs("A B", "A C", answer).encode(WordModel(bos=bos))
    says(error, *parts)


def test_a_missing_space_is_suggested():
    model = WordModel()
    del model.ids["Mary"]
    with pytest.raises(AnswerError) as error:
        Pairs("A B", "A C", "Mary").encode(model)
    says(error, "'M' | 'a' | 'r' | 'y' (4 tokens)", "use ' Mary', which is one token")


@pytest.mark.parametrize("answer", [9999, -1])
def test_ids_outside_the_vocabulary(answer):
    with pytest.raises(AnswerError) as error:
        Pairs("A B", "A C", answer).encode(WordModel())
    says(error, str(answer), "row 0", "as text")


def test_answer_and_wrong_answer_of_one_token():
    model = WordModel()
    with pytest.raises(PairError) as error:
        Pairs("A B", "A C", " B", model.token_id(" B")).encode(model)
    says(error, "row 0", "same token", "' B'")


def test_prompts_without_tokens():
    class Deaf(WordModel):
        def tokens(self, prompts):
            tokens = super().tokens(prompts)
            return Tokens(tokens.ids, torch.zeros_like(tokens.mask), tokens.strings)

    with pytest.raises(EmptyPrompt) as error:
        Pairs("A B", "A C").encode(Deaf())
    says(error, "row 0", "no tokens")


def test_a_tokenizer_that_loses_rows():
    class Lossy(WordModel):
        def tokens(self, prompts):
            return super().tokens(prompts).row(0)

    with pytest.raises(ShapeMismatch) as error:
        Pairs(["A B", "A"], ["A C", "B"]).encode(Lossy())
    says(error, "2 prompts, 1 rows")


def test_usable_keeps_what_encode_accepts():
    pairs = Pairs(["A B", "A", "A B"], ["A C", "aunt", "A D"], [" C", " C", " Paris"])
    assert pairs.usable(WordModel()).clean == ("A B",)
    with pytest.raises(PairError) as error:
        pairs[1].usable(WordModel())
    says(error, "1 rows", "row 0 have 1 and 4 tokens", "encode")


ROW = st.lists(st.sampled_from(["A", "B", "C", "D", "is", "are"]), min_size=1, max_size=6)


@calm
@given(st.lists(ROW, min_size=1, max_size=5), st.data())
def test_first_difference_is_where_the_rows_part(rows, data):
    changed, expected = [], []
    for row in rows:
        at = data.draw(st.integers(0, len(row) - 1))
        changed.append([*row[:at], "Mary", *row[at + 1 :]])
        expected.append(at)
    pairs = Pairs([" ".join(row) for row in rows], [" ".join(row) for row in changed])
    model = WordModel(bos=data.draw(st.booleans()), left=data.draw(st.booleans()))
    encoded = pairs.encode(model)
    assert encoded.first_difference == [at + model.bos for at in expected]
    for i, at in enumerate(encoded.first_difference):
        a, b = encoded.clean.row(i).ids[0], encoded.contrast.row(i).ids[0]
        assert torch.equal(a[:at], b[:at]) and a[at] != b[at]
