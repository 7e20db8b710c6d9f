"""Spans, prompt files and few-shot prompts."""

import doctest
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from word_model import WordModel, calm, material, says

from underhood.core.errors import FileProblem, OutOfRange, UsageError
from underhood.core.tokens import Tokens
from underhood.data import few_shot, last, load_prompts, span, token_positions


def of(*rows: list[str]) -> Tokens:
    width = max(map(len, rows))
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Tokens(mask.long(), mask, tuple(map(tuple, rows)))


EIFFEL = of(["<bos>", "The", " E", "iff", "el", " Tower", " and", " the", " Tower"], ["Hi"])


@pytest.mark.parametrize(
    ("text", "positions"),
    [("Eiffel", [2, 3, 4]), (" Eiffel Tower", [2, 3, 4, 5]), ("iff", [3]), ("fe", [3, 4])],
)
def test_spans(text, positions):
    assert list(span(EIFFEL, 0, text)) == positions


def test_spans_that_occur_twice():
    assert span(EIFFEL, 0, "Tower", occurrence=0) == range(5, 6)
    assert span(EIFFEL, 0, "Tower", occurrence=-1) == range(8, 9)
    with pytest.raises(UsageError) as error:
        span(EIFFEL, 0, "Tower")
    says(error, "2 times", "5 to 5, 8 to 8", "occurrence=0 to 1")
    with pytest.raises(OutOfRange) as error:
        span(EIFFEL, 0, "Tower", occurrence=2)
    says(error, "2 occurrences")


def test_two_hits_in_the_same_tokens_are_one_place():
    assert span(of([" banana", "s"]), 0, "an") == range(0, 1)


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        (lambda: span(EIFFEL, 0, "Louvre"), UsageError, ["'Louvre'", "<bos>|The| E|iff", "case"]),
        (lambda: span(EIFFEL, 2, "Hi"), OutOfRange, ["row 2", "2 prompts", "0 to 1"]),
        (lambda: span(EIFFEL, 0, ""), UsageError, ["''"]),
        (lambda: span(Tokens(EIFFEL.ids, EIFFEL.mask), 0, "a"), UsageError, ["2 rows of ids"]),
        (lambda: token_positions(EIFFEL, 0, "Towers"), UsageError, ["'Towers'", "nearest: Tower"]),
        (lambda: token_positions(EIFFEL, 0, "Eiffel"), UsageError, ["several tokens", "span("]),
        (lambda: last(EIFFEL, 2), OutOfRange, ["row 2", "0 to 1"]),
    ],
)
def test_span_refusals(call, kind, parts):
    with pytest.raises(kind) as error:
        call()
    says(error, *parts)


@calm
@given(st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=6), st.data())
def test_a_span_is_the_tokens_that_share_a_character_with_the_text(pieces, data):
    joined = "".join(pieces)
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    start = data.draw(st.integers(0, len(joined) - 1))
    text = joined[start : data.draw(st.integers(start + 1, len(joined)))]
    places = []
    for at in range(len(joined)):
        place = range(owner[at], owner[min(at + len(text), len(joined)) - 1] + 1)
        if joined.startswith(text, at) and place not in places:
            places.append(place)
    tokens = of(pieces)
    assert [span(tokens, 0, text, occurrence=k) for k in range(len(places))] == places
    if len(places) == 1:
        assert span(tokens, 0, text) == places[0]
    else:
        with pytest.raises(UsageError, match=f"{len(places)} times"):
            span(tokens, 0, text)


def test_positions_of_tokens():
    assert token_positions(EIFFEL, 0, "Tower") == [5, 8]
    assert token_positions(EIFFEL, 0, " Tower", exact=True) == [5, 8]
    with pytest.raises(UsageError):
        token_positions(EIFFEL, 0, "Tower", exact=True)


@pytest.mark.parametrize("left", [False, True])
def test_last_is_the_rows_own(left):
    tokens = WordModel(bos=True, left=left).tokens(["A B C", "A"])
    assert [last(tokens, row) for row in range(2)] == [3, 1]
    assert token_positions(tokens, 1, "A") == [1]


def test_prompts_from_files(tmp_path):
    texts = ["The uncle ", "A B C"]
    (tmp_path / "a.txt").write_text("The uncle \r\n\nA B C\n", newline="")
    (tmp_path / "a.json").write_text(json.dumps(texts))
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": texts[0]}, {"text": texts[1]}]))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, texts)))
    for name in ("a.txt", "a.json", "b.json", "a.jsonl"):
        assert load_prompts(tmp_path / name) == texts, name


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.csv", "x", [".csv", "Pairs.load"]),
        ("a.txt", "\n \n", ["empty"]),
        ("a.json", "[]", ["no prompts", "at least one"]),
        ("a.json", '["x", 3]', ["entry 1 of a.json", "3", "prompt"]),
        ("a.jsonl", '"x"\n{"y": 1}', ["line 2 of a.jsonl", "'y'"]),
        ("a.jsonl", '"x"\n"y', ["line 2 of a.jsonl", "truncated"]),
    ],
)
def test_prompt_files_that_are_broken(tmp_path, name, text, parts):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileProblem) as error:
        load_prompts(tmp_path / name)
    says(error, *parts)


ROWS = [{"input": f"in{i}", "output": f"out{i % 3}"} for i in range(8)]


@calm
@given(st.integers(0, 5), st.integers(0, 50))
def test_few_shot_prompts(n, seed):
    made = few_shot(ROWS, n, seed=seed)
    assert len(made) == len(ROWS) and made == few_shot(ROWS, n, seed=seed)
    assert made.answers[1] == " out1"
    for prompt, row in zip(made.prompts, ROWS, strict=True):
        *examples, question = prompt.split("\n\n")
        assert question == f"Q: {row['input']}\nA:" and len(examples) == n
        assert row["input"] not in "".join(examples)
        known = [f"Q: {r['input']}\nA: {r['output']}" for r in ROWS]
        assert len(set(examples)) == n and set(examples) <= set(known)


@calm
@given(st.integers(2, 5), st.integers(0, 50))
def test_shuffled_prompts_have_the_same_words_and_another_meaning(n, seed):
    plain, mixed = few_shot(ROWS, n, seed=seed), few_shot(ROWS, n, seed=seed, shuffled=True)
    assert plain.answers == mixed.answers
    for a, b in zip(plain.prompts, mixed.prompts, strict=True):
        assert a != b and sorted(a.split()) == sorted(b.split())


def test_templates_may_hold_braces():
    rows = [{"input": "{x}", "output": "{y}"}, {"input": "a", "output": "b"}]
    made = few_shot(rows, 1, template="{{}} {input}->{output}", separator="; ")
    assert made.prompts[1] == "{{}} {x}->{y}; {{}} a->" and made.answers == ("{y}", "b")
    # An input that reads like a field stays what it is.
    rows = [{"input": "{output}", "output": "o"}, {"input": "a", "output": "b"}]
    assert few_shot(rows, 1).prompts[1] == "Q: {output}\nA: o\n\nQ: a\nA:"


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: few_shot(ROWS, 1, template="{input}"), ["'{input}'", "{output}"]),
        (lambda: few_shot(ROWS, 1, template="{input}{output}{output}"), ["only once"]),
        (lambda: few_shot(ROWS, -1), ["n=-1"]),
        (lambda: few_shot(ROWS, 1, shuffled=True), ["n=1", "2 or more"]),
        (lambda: few_shot(ROWS, 8), ["8 rows, 8 examples", "fewer"]),
        (lambda: few_shot([{"input": "a"}], 1), ["row 0", "{'input': 'a'}"]),
        (
            lambda: few_shot([{"input": str(i), "output": "same"} for i in range(9)], 3),
            ["9 rows", "not all equal"],
        ),
    ],
)
def test_few_shot_refusals(call, parts):
    with pytest.raises(UsageError) as error:
        call()
    says(error, *parts)


def test_material_names_are_prompts():
    assert len(load_prompts(material("data-text", "names.txt"))) > 30_000


def test_importing_the_floor_loads_no_heavy_library():
    code = (
        "import sys, underhood.data as d;"
        "assert all(hasattr(d, name) for name in d.__all__);"
        "print(*{'pandas', 'xarray', 'transformers', 'scipy'} & set(sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["metric", "metrics", "pairs", "prompts"])
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"underhood.data.{name}"))
    assert tried and not failed
