"""Words of a command line become a method's arguments, by the types in its signature."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import Tensor

from underhood.cli.arguments import Given, data_arguments, read_options, type_name
from underhood.cli.render import one_line
from underhood.core.errors import FileProblem, UsageError
from underhood.core.model import Model
from underhood.data import Pairs
from underhood.methods.registry import Method


def method(function: Callable[..., Any]) -> Method:
    return Method("some_method", "read", function)


def options(
    model: Model,
    *,
    n: int = 3,
    rate: float | None = None,
    how: Literal["all", "last"] = "all",
    deep: bool = False,
    layers: tuple[int, ...] | None = None,
    names: Sequence[str] = (),
    either: Literal["none", "some"] | None = None,
    vector: Tensor | None = None,
) -> None: ...


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n=4", 4),
        ("rate=1e-3", 1e-3),
        ("rate=none", None),
        ("how=last", "last"),
        ("deep=true", True),
        ("deep=no", False),
        ("layers=1", (1,)),
        ("layers=1,2", (1, 2)),
        ("layers=[1, 2]", (1, 2)),
        ("layers=null", None),
        ("names=a, b", ["a", "b"]),
        ("names=a=b", ["a=b"]),
        ("either=some", "some"),
    ],
)
def test_options_are_read_as_their_types(text: str, value: object) -> None:
    found = list(read_options(method(options), [text]).values())[0]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n=1.5", "of type int"),
        ("how=first", "all | last"),
        ("layers=a", "tuple[int, ...] | none"),
        ("rat=1", "nearest: rate"),
        ("n", "NAME=VALUE"),
        ("vector=1", "call the method from Python"),
    ],
)
def test_values_of_another_type_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_options(method(options), [text])
    assert said in str(caught.value)


def test_one_prompt_comes_from_a_flag_or_a_file(tmp_path: Path) -> None:
    def reads_one(model: Model, prompt: str) -> None: ...

    (tmp_path / "one.txt").write_text("hello\n")
    (tmp_path / "two.txt").write_text("hello\nthere\n")
    assert data_arguments(method(reads_one), Given(["hi"])) == {"prompt": "hi"}
    found = data_arguments(method(reads_one), Given(file=tmp_path / "one.txt"))
    assert found == {"prompt": "hello"}
    with pytest.raises(UsageError, match="reads one prompt"):
        data_arguments(method(reads_one), Given(file=tmp_path / "two.txt"))
    with pytest.raises(FileProblem):
        data_arguments(method(reads_one), Given(file=tmp_path / "three.txt"))


@pytest.mark.parametrize("annotation", [list[str], Sequence[str], str | list[str]])
def test_several_prompts_come_from_flags_and_a_file(annotation: Any, tmp_path: Path) -> None:
    def reads_many(model: Model, prompts: list[str]) -> None: ...

    reads_many.__annotations__["prompts"] = annotation
    (tmp_path / "more.txt").write_text("c\nd\n")
    given = Given(["a", "b"], file=tmp_path / "more.txt")
    assert data_arguments(method(reads_many), given) == {"prompts": ["a", "b", "c", "d"]}
    with pytest.raises(UsageError, match="needs 'prompts'"):
        data_arguments(method(reads_many), Given())


def reads_pairs(model: Model, pairs: Pairs) -> None: ...


def test_pairs_come_from_flags_or_a_file(tmp_path: Path) -> None:
    one = data_arguments(method(reads_pairs), Given(["a b"], ["a c"], ["x"], ["y"]))["pairs"]
    assert one == Pairs.one("a b", "a c", "x", "y")
    two = Given(["a b", "d e"], ["a c", "d f"], ["x", "z"])
    found = data_arguments(method(reads_pairs), two)["pairs"]
    assert found == Pairs(["a b", "d e"], ["a c", "d f"], ["x", "z"])
    one.save(tmp_path / "pairs.json")
    file = Given(file=tmp_path / "pairs.json")
    assert data_arguments(method(reads_pairs), file)["pairs"] == one
    with pytest.raises(UsageError, match="from a file, or from"):
        data_arguments(method(reads_pairs), Given(answers=["x"], file=tmp_path / "pairs.json"))
    with pytest.raises(UsageError, match="needs 'pairs'") as caught:
        data_arguments(method(reads_pairs), Given(["a b"]))
    assert caught.value.given == "--prompt"


def test_a_second_model_and_what_only_python_can_give() -> None:
    def compares(model: Model, other: Model, prompt: str) -> None: ...

    def needs_numbers(model: Model, vector: Tensor) -> None: ...

    def may_read(model: Model, pairs: Pairs | None = None) -> None: ...

    second = object()
    found = data_arguments(method(compares), Given(["a"], other=lambda: second))
    assert found == {"other": second, "prompt": "a"}
    with pytest.raises(UsageError, match="needs 'other'"):
        data_arguments(method(compares), Given(["a"]))
    with pytest.raises(UsageError, match="command line cannot give"):
        data_arguments(method(needs_numbers), Given())
    assert data_arguments(method(may_read), Given()) == {}


@pytest.mark.parametrize(
    "given",
    [
        Given(["a"], ["b"]),
        Given(["a"], answers=["x"]),
        Given(["a"], wrong=["x"]),
        Given(["a"], other=lambda: None),
    ],
)
def test_nothing_typed_is_dropped(given: Given) -> None:
    def reads_one(model: Model, prompt: str) -> None: ...

    with pytest.raises(UsageError, match="has no use for --"):
        data_arguments(method(reads_one), given)


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int | None, "int | none"),
        (Literal["a", "b"], "a | b"),
        (tuple[int, ...], "tuple[int, ...]"),
        (list[str], "list[str]"),
        (Pairs, "Pairs"),
    ],
)
def test_types_are_named_as_people_write_them(annotation: Any, name: str) -> None:
    assert type_name(annotation) == name


def test_control_characters_are_written_out() -> None:
    assert one_line("a\tb\n\x1b[31mred\u202e") == "a\\tb\\n\\x1b[31mred\\u202e"
    assert one_line("cafés [bold]") == "cafés [bold]"


def reads_two(
    model: Model, pairs: Pairs, *, other: Pairs, third: Pairs | None = None, n: int = 1
) -> None:
    """Two sets.

    Args:
        other: Prompts of the second ability.
    """


def test_a_second_set_of_pairs_is_a_file(tmp_path: Path) -> None:
    pairs = Pairs(["a b", "d e"], ["a c", "d f"], ["x", "z"])
    pairs.save(tmp_path / "pairs.json")
    found = read_options(method(reads_two), [f"other={tmp_path / 'pairs.json'}"])
    assert found == {"other": pairs}
    both = [f"other={tmp_path / 'pairs.json'}", "third=none", "n=2"]
    assert read_options(method(reads_two), both) == {"other": pairs, "third": None, "n": 2}
    # The data are still read by themselves: the option does not stand in for them.
    with pytest.raises(UsageError, match="needs 'pairs'"):
        data_arguments(method(reads_two), Given())
    with pytest.raises(FileProblem):
        read_options(method(reads_two), [f"other={tmp_path / 'none.json'}"])


def test_an_option_without_default_is_asked_for() -> None:
    with pytest.raises(UsageError, match="needs the option 'other'") as caught:
        read_options(method(reads_two), ["n=2"])
    assert caught.value.do == "give it: --set other=FILE"
    assert "second ability" in str(caught.value)
