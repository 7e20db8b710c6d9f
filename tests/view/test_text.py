"""Views in a terminal and as tab-separated values."""

import csv
import io

from rich.console import Console

from underhood.view import View, bars, grid, sentences, tokens
from underhood.view.flat import flatten, to_csv
from underhood.view.text import to_plain, to_string, to_text


def test_every_kind_prints(samples: dict[str, View]) -> None:
    for view in samples.values():
        text = to_string(view)
        assert view.title in text
        assert max(map(len, text.splitlines())) <= 100


def test_terminal_cannot_be_driven() -> None:
    evil = "\x1b]0;owned\x07[bold red]x[/bold red]"
    views: list[View] = [
        tokens([evil], [1.0]),
        sentences([evil], title=evil, about=evil),
        grid([[1.0]], rows=[evil], cols=[evil]),
        bars([evil], [1.0]),
    ]
    for view in views:
        out = io.StringIO()
        Console(file=out, width=300, color_system=None).print(to_text(view))
        for text in (out.getvalue(), to_plain(view)):
            assert "\x1b" not in text
            assert "\x07" not in text
            assert "[bold red]" in text, "markup in data is text"


def test_wide_grids_name_their_strongest_cells(samples: dict[str, View]) -> None:
    text = to_string(samples["wide"])
    assert "+30.00" in text
    assert "the 12 strongest of 14400 cells" in text


def test_plain_is_rectangular(samples: dict[str, View]) -> None:
    for view in samples.values():
        for block in to_plain(view).strip("\n").split("\n\n"):
            lines = [line for line in block.split("\n") if not line.startswith("# ")]
            assert len({line.count("\t") for line in lines}) == 1, view


def test_csv_keeps_numbers_exact() -> None:
    view = bars(["a,b", "\n"], [0.1 + 0.2, None], unit="logits", total=-1.0)
    rows = list(csv.reader(io.StringIO(to_csv(view))))
    assert rows == [
        ["label", "logits"],
        ["a,b", "0.30000000000000004"],
        ["\n", ""],
        ["sum", "-1.0"],
    ]


def test_flat_tables_are_rectangular(samples: dict[str, View]) -> None:
    for view in samples.values():
        for table in flatten(view):
            assert all(len(row) == len(table.header) for row in table.rows)
