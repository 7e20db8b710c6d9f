"""View documents: round trips, what is refused, what is ignored."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from underhood.core.errors import FileProblem, UsageError
from underhood.view import View, bars, grid, group, heads, lines, table, texts, tokens
from underhood.view.clean import clean
from underhood.view.doc import KINDS

NUMBER = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
WORD = st.text(max_size=12)


@st.composite
def some_grid(draw: st.DrawFn) -> View:
    n, m = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    values = draw(st.lists(st.lists(NUMBER, min_size=m, max_size=m), min_size=n, max_size=n))
    return grid(
        values,
        rows=draw(st.lists(WORD, min_size=n, max_size=n)),
        cols=draw(st.lists(WORD, min_size=m, max_size=m)),
        scale=draw(st.sampled_from(["diverging", "sequential", "probability"])),
        title=draw(WORD),
        about=draw(WORD),
    )


@st.composite
def some_list(draw: st.DrawFn) -> View:
    labels = draw(st.lists(WORD, max_size=6))
    n = len(labels)
    numbers = st.lists(NUMBER, min_size=n, max_size=n)
    values = draw(numbers)
    match draw(st.sampled_from(["bars", "tokens", "lines", "texts", "table"])):
        case "bars":
            return bars(labels, values, total=draw(NUMBER), baseline=draw(numbers))
        case "tokens":
            return tokens(labels, values, unit=draw(WORD))
        case "lines":
            band = {"a": (draw(numbers), draw(numbers))}
            return lines(labels, {"a": values, "b": values}, bands=band)
        case "texts":
            return texts([{"label": draw(WORD), "tokens": labels, "values": values}])
    rows = [[a, b, i, True] for i, (a, b) in enumerate(zip(labels, values, strict=True))]
    return table(["a", {"name": "b", "format": "+.2f"}, "i", "yes"], rows)


ANY = st.one_of(some_grid(), some_list())


# beartype picks the items it checks at random, which hypothesis takes for ours.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@given(ANY, ANY, st.booleans())
def test_round_trip(claim: View, control: View, folded: bool) -> None:
    view = group(
        [claim.model_copy(update={"control": control}), control],
        folded=folded,
        provenance={"seed": 3, "loss": float("nan")},
    )
    text = view.to_json()
    back = View.from_json(text)
    assert back == view
    assert back.to_json() == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_every_kind_round_trips(samples: dict[str, View]) -> None:
    assert {view.kind for view in samples.values()} == set(KINDS)
    for view in samples.values():
        assert View.from_json(view.to_json()) == view


def test_non_finite_becomes_none() -> None:
    view = grid(np.array([[np.nan, np.inf, -np.inf, 1.5]]), rows=["a"], cols="wxyz")
    assert view.values == [[None, None, None, 1.5]]
    assert clean({"a": (np.float32(0.1), np.int64(2), float("nan"))}) == {"a": [0.1, 2, None]}


def test_short_floats_are_written_short() -> None:
    values = np.array([0.1, 1e-20, 123456.78, 0.0], dtype=np.float32)
    assert clean(values) == [0.1, 1e-20, 123456.8, 0.0]


def test_unknown_fields_are_ignored() -> None:
    document = grid([[1.0]], rows=["a"], cols=["b"]).to_dict()
    document |= {"schema": "view/1.7", "sparkle": {"very": True}}
    assert View.from_dict(document) == grid([[1.0]], rows=["a"], cols=["b"])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"schema": "view/1", "kind": "gri', "truncated"),
        ('{"schema": "view/2", "kind": "grid"}', "upgrade"),
        ('{"kind": "grid"}', "view/1"),
        ('{"schema": "result/1"}', "not a view"),
        ('{"schema": "view/1", "kind": "gird"}', "grid"),
        ('{"schema": "view/1", "kind": "grid", "rows": ["a"]}', "cols"),
        ('{"schema": "view/1", "kind": "grid", "rows": ["a"], "cols": [], "values": []}', "1 exp"),
        ("[1]", "list"),
        ("[" * 100_000, "truncated"),
    ],
)
def test_bad_files(text: str, part: str) -> None:
    with pytest.raises(FileProblem) as caught:
        View.from_json(text, where="x.json")
    assert part in str(caught.value)
    assert "x.json" in str(caught.value)


def test_shapes_are_checked() -> None:
    with pytest.raises(UsageError, match="do not make a grid"):
        grid(np.zeros((2, 3)), rows="abc", cols="abc")
    with pytest.raises(UsageError, match="matrix"):
        grid(np.zeros(3), rows="abc", cols="abc")
    with pytest.raises(UsageError):
        grid([[0.0]], rows="a", cols="b", marks=[(0, 1)])
    with pytest.raises(UsageError):
        bars("ab", [1.0])
    with pytest.raises(UsageError):
        heads("ab", {"0.0": np.zeros((3, 3))})
    with pytest.raises(UsageError):
        lines("ab", {"a": [1.0]})
    with pytest.raises(UsageError):
        table(["a"], [["x", 1]])
    with pytest.raises(UsageError):
        table([{"name": "a", "format": ".999999f"}], [])


def test_causal_mask_becomes_blank_but_other_zeros_stay() -> None:
    causal = np.array([[1.0, 0.0], [0.0, 1.0]])
    view = heads("ab", {"0.0": causal})
    assert view.heads[0].pattern == [[1.0, None], [0.0, 1.0]]
    both = heads("ab", {"0.0": np.array([[0.9, 0.1], [0.0, 1.0]])})
    assert both.heads[0].pattern == [[0.9, 0.1], [0.0, 1.0]]
