"""Files of pairs: every form, what is broken in them, and the round trip of our own."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from word_model import material, says

from underhood.core.errors import AnswerError, EmptyPrompt, FileProblem, PairError, UsageError
from underhood.data import Pairs

TEXT = st.text(min_size=1, max_size=8)
ANSWERS = st.lists(st.one_of(TEXT, st.integers(0, 9)), min_size=1, max_size=3)


@st.composite
def any_pairs(draw):
    n = draw(st.integers(1, 4))
    rows = draw(st.lists(st.tuples(TEXT, TEXT, ANSWERS, TEXT), min_size=n, max_size=n))
    known = draw(st.booleans())
    # Not Pairs(...): what runs inside a strategy must not draw random numbers, as beartype does.
    return {
        "clean": ["c" + row[0] for row in rows],
        "contrast": ["x" + row[1] for row in rows],
        "answers": [row[2] for row in rows] if known else None,
        "wrong": [["w" * 9 + row[3]] for row in rows] if known else None,
        "labels": draw(st.one_of(st.none(), st.just(["l"] * n))),
        "position_labels": draw(st.one_of(st.none(), st.lists(TEXT, max_size=3))),
        "word_positions": draw(
            st.one_of(st.none(), st.dictionaries(TEXT, st.integers(), max_size=3))
        ),
    }


@given(any_pairs())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_save_and_load_give_the_same(tmp_path, columns):
    pairs, path = Pairs(**columns), tmp_path / "pairs.json"
    pairs.save(path)
    assert Pairs.load(path) == pairs
    assert not list(tmp_path.glob("*.part"))


def test_saving_where_one_cannot(tmp_path):
    with pytest.raises(UsageError) as error:
        Pairs("a", "b").save(tmp_path / "pairs.csv")
    says(error, "pairs.csv", ".json")
    with pytest.raises(FileProblem) as error:
        Pairs("a", "b").save(tmp_path / "absent" / "pairs.json")
    says(error, "absent", "folder")


def test_auto_circuit_json(tmp_path):
    path = tmp_path / "x.json"
    rows = [
        {"clean": "a", "corrupt": "b", "answers": [" x", " y"], "wrong_answers": [" z"]},
        {"clean": "c", "corrupt": "d", "answers": [" x"], "wrong_answers": []},
    ]
    value = {"prompts": rows, "seq_labels": ["<bos>", "first"], "word_idxs": {"first": 1}}
    path.write_text(json.dumps(value))
    pairs = Pairs.load(path)
    assert pairs.answers == ((" x", " y"), (" x",)) and pairs.wrong == ((" z",), ())
    assert pairs.position_labels == ("<bos>", "first") and pairs.word_positions == {"first": 1}


def test_csv_with_ids(tmp_path):
    path = tmp_path / "ioi.csv"
    path.write_text(
        "clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\r\n"
        '"Then, A and B",Then A and C,other,10,11\r\n'
    )
    pairs = Pairs.load(path)
    assert pairs.clean == ("Then, A and B",)
    assert pairs.answers == ((10,),) and pairs.wrong == ((11,),)


def test_csv_labels_become_answers_on_request(tmp_path):
    path = tmp_path / "years.csv"
    path.write_text("﻿clean,corrupted,label\nfrom 1352 to 13,from 1301 to 13,52\nx 3,x 1,3\n")
    plain = Pairs.load(path)
    assert plain.needs_answers and plain.labels == ("52", "3")
    pairs = Pairs.load(path, greater_than=True)
    assert pairs.answers[0][0] == "53" and pairs.answers[0][-1] == "99"
    assert pairs.wrong[0][0] == "00" and pairs.wrong[0][-1] == "52"
    assert pairs.answers[1][0] == "04" and len(pairs.wrong[1]) == 4


BROKEN = [
    ("a.csv", "clean,label\nx,1\n", FileProblem, ["line 2 of a.csv", "contrast", "corrupted"]),
    ("a.csv", "clean,corrupted\nx,y\nx\n", FileProblem, ["line 3", "fewer cells", "truncated"]),
    ("a.csv", "clean,corrupted\nx,y,z\n", FileProblem, ["line 2", "more cells", "quote"]),
    ("a.csv", 'clean,corrupted\nx,"y\n', FileProblem, ["not CSV", "truncated"]),
    ("a.csv", "clean,corrupted,anwser\nx,y,z\n", FileProblem, ["line 2", "anwser", "answer"]),
    (
        "a.csv",
        "clean,corrupted,correct_idx\nx,y,Z\n",
        FileProblem,
        ["line 2", "correct_idx", "'Z'"],
    ),
    ("a.csv", "clean,corrupted\nx,x\n", PairError, ["line 2 of a.csv", "identical"]),
    ("a.csv", "clean,corrupted\n,x\n", EmptyPrompt, ["line 2 of a.csv", "clean"]),
    ("a.csv", "clean,corrupted\n", PairError, ["0 rows"]),
    ("a.json", "", FileProblem, ["empty"]),
    ("a.json", '{"prompts": [{"clean": "x", ', FileProblem, ["too early", "truncated", "line 1"]),
    ("a.json", '{"prompts": [}]}', FileProblem, ["not JSON", "line 1, column 14"]),
    ("a.json", '{"prompts": 3}', FileProblem, ["prompts", "list"]),
    ("a.json", '{"schema": "pairs/2", "rows": []}', FileProblem, ["pairs/2", "pairs/1", "update"]),
    ("a.json", '{"schema": "pairs/1", "rows": []}', PairError, ["0 rows"]),
    ("a.json", '"text"', FileProblem, ["no pairs", "str", "form"]),
    ("a.json", "[1]", FileProblem, ["row 0 of a.json: 1", "form"]),
    ("a.json", '{"prompts": [{"clean": [1], "corrupt": [2]}]}', FileProblem, ["row 0", "ids"]),
    ("a.json", '{"prompts": [], "seq_labels": 3}', FileProblem, ["seq_labels", "3"]),
    ("a.json", '{"prompts": [], "word_idxs": ["a"]}', FileProblem, ["word_idxs", "a"]),
    (
        "a.json",
        '[{"clean": "x", "contrast": "y", "answers": [1.5]}]',
        AnswerError,
        ["row 0", "1.5"],
    ),
    (
        "a.json",
        '{"clean": "x", "contrast": "y"}\n\n{"clean": "x", "contr',
        FileProblem,
        ["line 3 of a.json", "truncated"],
    ),
    ("a.jsonl", '{"clean": "x", "contrast": "x"}\n', PairError, ["line 1 of a.jsonl", "'x'"]),
]


@pytest.mark.parametrize(("name", "text", "kind", "parts"), BROKEN)
def test_broken_files(tmp_path, name, text, kind, parts):
    (tmp_path / name).write_text(text, newline="")
    with pytest.raises(kind) as error:
        Pairs.load(tmp_path / name)
    says(error, *parts)


@pytest.mark.parametrize("label", ["99", "x", "123", ""])
def test_labels_that_decide_nothing(tmp_path, label):
    (tmp_path / "a.csv").write_text(f"clean,corrupted,label\nx,y,{label}\n")
    with pytest.raises(PairError) as error:
        Pairs.load(tmp_path / "a.csv", greater_than=True)
    says(error, "line 2", repr(label), "98")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileProblem) as error:
        Pairs.load(tmp_path / "absent.json")
    says(error, "absent.json", "does not exist")
    with pytest.raises(OSError) as error:
        Pairs.load(tmp_path)
    says(error, "is a folder")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileProblem) as error:
        Pairs.load(tmp_path / "a.json")
    says(error, "UTF-8", "byte 0")


def test_material_greater_than():
    path = material("data-circuits", "eap_ig_greater_than_data.csv")
    pairs = Pairs.load(path, greater_than=True)
    assert len(pairs) == 1000 and not pairs.needs_answers
    assert pairs.labels is not None and pairs.labels[0] == "52"
    assert all(
        clean[:-2].count(label) for clean, label in zip(pairs.clean, pairs.labels, strict=True)
    )
    assert all(len(a) + len(w) == 100 for a, w in zip(pairs.answers, pairs.wrong, strict=True))


@pytest.mark.parametrize(
    ("name", "n"),
    [("sva_simple_train.json", 480), ("sva_simple_test.json", 120), ("sva_nounpp_test.json", 480)],
)
def test_material_agreement(name, n):
    pairs = Pairs.load(material("data-circuits", name))
    assert len(pairs) == n and pairs.labels is not None
    assert all(label.split("_")[0] in ("singular", "plural") for label in pairs.labels)


def test_material_function_vectors():
    path = material("data-function-vectors", "abstractive__antonym.json")
    rows = json.loads(path.read_text())
    pairs = Pairs.load(path, shots=4, seed=1)
    assert len(pairs) == len(rows) and pairs == Pairs.load(path, shots=4, seed=1)
    assert pairs.answers[0] == (" " + rows[0]["output"],)
    for clean, contrast, row in zip(pairs.clean, pairs.contrast, rows, strict=True):
        assert clean != contrast and clean.count("Q: ") == 5
        assert clean.endswith(f"Q: {row['input']}\nA:")
        assert sorted(clean.split()) == sorted(contrast.split())
    with pytest.raises(FileProblem) as error:
        Pairs.load(material("data-function-vectors", "generate__categories.json"))
    says(error, "animal")


def test_all_material_of_function_vectors():
    for path in sorted(material("data-function-vectors").glob("*tive__*.json")):
        assert len(Pairs.load(path)) == len(json.loads(path.read_text())), path.name
