"""Pages: escaped, closed to the outside, complete for those who cannot see colours."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from underhood.core.errors import FileProblem, UsageError
from underhood.view import View, bars, grid, group, heads, lines, sentences, table, texts, tokens
from underhood.view.draw_chart import nice_ticks
from underhood.view.html import render
from underhood.view.markup import Html, tag, visible
from underhood.view.page import Section, page
from underhood.view.rescale import rescaled, share_scale
from underhood.view.upgrade import policy, script

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&"
VOID = {"img", "meta", "br"}


class Strict(HTMLParser):
    """Collects tags, attributes and text; fails when elements are not properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attrs: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attrs += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def evil_views() -> list[View]:
    one = [EVIL]
    common = {"title": EVIL, "about": EVIL, "provenance": {EVIL: EVIL}, "python": EVIL}
    big = np.zeros((1, 700))
    views: list[View] = [
        sentences(one, title=EVIL, about=EVIL),
        tokens(one, [1.0], unit=EVIL, provenance=common["provenance"], python=EVIL),
        tokens(one, title=EVIL),
        grid([[1.0]], rows=one, cols=one, text=[one], row_name=EVIL, col_name=EVIL, unit=EVIL),
        grid(big, rows=one, cols=one * 700, row_name=EVIL, title=EVIL, marks=[(0, 1)], unit=EVIL),
        bars(one, [1.0], unit=EVIL, total=1.0, total_label=EVIL, baseline=[0.1], title=EVIL),
        heads(one, {EVIL: [[1.0]]}, notes={EVIL: EVIL}, title=EVIL),
        lines(one * 2, {EVIL: [1.0, 2.0]}, x_name=EVIL, y_name=EVIL, title=EVIL),
        table([{"name": EVIL, "unit": EVIL}], [one], title=EVIL),
        texts([{"label": EVIL, "note": EVIL, "tokens": one, "values": [0.5]}], title=EVIL),
    ]
    return [*views, group(views, folded=True, title=EVIL, control=views[0])]


def test_nothing_from_outside_becomes_markup() -> None:
    views = evil_views()
    text = page(
        EVIL,
        [Section(id="a", title=EVIL, question=EVIL, number=EVIL, views=views)],
        lead=[EVIL],
        provenance={EVIL: [EVIL]},
        python=EVIL,
    )
    bare = text.replace(script(), "")
    found = Strict(bare)
    scripts = re.findall(r"<script[^>]*>([^<]*)</script>", bare)
    assert len(scripts) == found.tags.count("script") == len(views) + 2
    documents = [json.loads(each) for each in scripts if each]
    assert [View.from_dict(d) for d in documents[:-1]] == views
    assert not [name for name, _ in found.attrs if name.startswith("on")]
    assert all((v or "").startswith("data:image/png") for k, v in found.attrs if k == "src")
    for view in views:
        assert "<script" not in view.html()
        Strict(view.html())


def test_page_is_closed_to_the_outside(sample_page: str) -> None:
    assert sample_page.count(script()) == 1
    page_itself = sample_page.replace(script(), "")
    found = Strict(page_itself)
    policies = [v for k, v in found.attrs if k == "content" and v and "default-src" in v]
    assert policies == [policy()]
    assert "'unsafe-inline'" not in policy().partition("style-src")[0]
    assert sample_page.index("Content-Security-Policy") < sample_page.index("<style")
    assert not re.search(r"https?://", page_itself)
    assert not re.search(r"url\(|@import|<link|<script src|<iframe|srcset", page_itself)
    assert set(re.findall(r'\bsrc="(.{5})', page_itself)) == {"data:"}
    assert all(v and v.startswith("#") for k, v in found.attrs if k == "href")
    assert len(page_itself) < 550_000  # 14,400 numbers of one grid, with all their digits


def test_headings_are_in_order(sample_page: str) -> None:
    page_itself = sample_page.replace(script(), "")
    levels = [int(n) for n in re.findall(r"<h([1-6])", page_itself)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = re.findall(r'\bid="([^"]+)"', page_itself)
    assert len(ids) == len(set(ids))
    for link in re.findall(r'href="#([^"]+)"', page_itself):
        assert link in ids


def test_missing_values_are_hatched_and_said() -> None:
    small = grid([[np.nan, 1.0]], rows=["a"], cols=["b", "c"]).html()
    assert '<td class="uh-none" title="a, b: no value">–</td>' in small
    assert "uh-swatch uh-none" in small
    big = np.zeros((10, 100))
    big[3, 4] = np.nan
    text = grid(big, rows=range(10), cols=range(100)).html()
    assert 'class="uh-plate uh-none"' in text
    assert "no value" in text
    assert "no value" not in grid([[1.0]], rows=["a"], cols=["b"]).html().split("</style>")[1]


def test_signs_and_numbers_are_printed() -> None:
    text = grid([[-1.5, 0.25]], rows=["a"], cols=["b", "c"], unit="logits").html()
    assert "−1.50" in text
    assert "+0.25" in text
    assert "background:#b2182b" in text
    strip = tokens(["a", "b"], [-3.0, 3.0]).html()
    assert "−3.00" in strip
    assert "+3.00" in strip


def test_picture_has_its_table_unless_it_is_huge() -> None:
    text = grid(np.ones((10, 100)), rows=range(10), cols=range(100)).html()
    assert text.count("<td>") == 10 * 101
    huge = grid(np.ones((50, 100)), rows=range(50), cols=range(100)).html()
    assert "<td>" not in huge
    assert "too many for a table" in huge


def test_clipping_is_said() -> None:
    values = np.ones((20, 50))
    values[0, 0] = 70
    text = grid(values, rows=range(20), cols=range(50)).html()
    assert "1 value lies beyond the scale (most extreme: +70.0)" in text


def test_claim_and_control_share_their_scale() -> None:
    control = grid([[0.1]], rows=["a"], cols=["b"])
    claim = grid([[4.0]], rows=["a"], cols=["b"], control=control)
    _, shared = share_scale(claim, control)
    assert getattr(shared, "limit", None) == 4.0
    assert 'class="uh-control"' in claim.html()
    pair = share_scale(bars(["a"], [4.0]), bars(["a"], [-7.0]))
    assert [getattr(view, "span", None) for view in pair] == [(-7.0, 4.0)] * 2
    pair = share_scale(lines("ab", {"s": [0, 1]}), lines("ab", {"s": [5, 9]}))
    assert [getattr(view, "span", None) for view in pair] == [(0.0, 9.0)] * 2


def test_extreme_numbers_are_drawn_in_powers_of_ten() -> None:
    small = grid([[-4.3e-5, 1e-6]], rows=["a"], cols=["b", "c"], unit="nats").html()
    assert "−43.0" in small
    assert "10⁻⁶ nats" in small
    text = bars(["a"], [2.5e7], total=2.5e7, baseline=[[-1e6, 1e6]], unit="n").html()
    assert "+25.0" in text
    assert "10⁶ n" in text
    curve = rescaled(lines("ab", {"s": [None, 3e6]}, y_name="loss"))
    assert getattr(curve, "y_name", "") == "10⁶ loss"
    ordinary = grid([[0.002]], rows=["a"], cols=["b"])
    assert rescaled(ordinary) is ordinary
    for tiny in (5e-324, 1e308):
        Strict(grid([[tiny]], rows=["a"], cols=["b"]).html())
        Strict(lines(["a", "b"], {"s": [0, tiny]}).html())


def test_provenance_is_told_once(samples: dict[str, View]) -> None:
    view = samples["grid"]
    assert "607a30d783df" in render(view)
    assert "607a30d783df" not in render(view, skip=view.provenance)


def test_glyphs() -> None:
    assert visible(" a\n\t") == "·a↵→"
    assert visible("") == "∅"
    assert visible("  ") == "··"
    assert visible("a\u202eb\x1b[0m\x00") == "a⟨U+202E⟩b⟨U+001B⟩[0m⟨U+0000⟩"
    assert visible("👩\u200d🔬") == "👩\u200d🔬"


def test_tag_escapes_all_but_html() -> None:
    made = tag("b", "<i>", Html("<i></i>"), title='"&', hidden=True, lang=None)
    assert made == '<b title="&quot;&amp;" hidden>&lt;i&gt;<i></i></b>'


def test_ticks() -> None:
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-3, 17) == [-5, 0, 5, 10, 15, 20]
    for low, high in [(0.1, 0.1001), (-1e9, 3e9), (5, 5.0000001)]:
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low + 1e-6 * abs(low)
        assert ticks[-1] >= high - 1e-6 * abs(high)
        assert len(ticks) <= 8


def test_empty_views_draw() -> None:
    views: list[View] = [
        sentences([]),
        tokens([], []),
        grid([], rows=[], cols=[]),
        grid([[None] * 700], rows=["a"], cols=range(700)),
        bars([], []),
        heads([], {}),
        heads(["a"], {"0.0": [[1.0]]}),
        lines([], {}),
        lines(["a"], {"s": [None]}),
        lines(["a", "b"], {"s": [2.0, 2.0]}),
        table(["a"], []),
        texts([]),
        group([]),
    ]
    for view in views:
        Strict(view.html())
        assert isinstance(view._repr_mimebundle_()["text/plain"], str)


def test_section_ids() -> None:
    with pytest.raises(UsageError, match="id of its own"):
        page("t", [Section(id="a", title=""), Section(id="a", title="")])
    with pytest.raises(UsageError):
        page("t", [Section(id="A b", title="")])


def test_save_by_suffix(tmp_path: Path, samples: dict[str, View]) -> None:
    view = samples["grid"]
    for suffix, start in {
        "html": b"<!doctype html>",
        "json": b'{\n "schema": "view/1"',
        "png": b"\x89PNG",
        "txt": b"# Effect",
        "csv": b"# Effect",
    }.items():
        path = tmp_path / f"x.{suffix}"
        view.save(path)
        assert path.read_bytes().startswith(start), suffix
    assert View.from_json((tmp_path / "x.json").read_text()) == view
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [
        ".csv",
        ".html",
        ".json",
        ".png",
        ".txt",
    ]
    with pytest.raises(UsageError, match="suffix"):
        view.save(tmp_path / "x.pdf")
    with pytest.raises(UsageError, match="picture"):
        samples["bars"].save(tmp_path / "x.png")
    with pytest.raises(FileProblem):
        view.save(tmp_path / "none" / "x.html")


def test_import_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import underhood.view as v; "
        "print(time.perf_counter() - start); v.grid, v.View, v.Result; "
        "print([m for m in ('torch', 'xarray', 'pandas', 'rich', 'IPython') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.splitlines()
    assert float(seconds) < 0.15
    assert heavy == "[]"
