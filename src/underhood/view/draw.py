"""Which function draws which kind, and which drawings can be read without their numbers beside."""

from collections.abc import Callable
from typing import Any

from underhood.view import (
    draw_card,
    draw_chart,
    draw_graph,
    draw_grid,
    draw_image,
    draw_sides,
    draw_timeline,
    draw_tree,
    draw_words,
)
from underhood.view.markup import Html

DRAW: dict[str, Callable[[Any], Html]] = {
    "sentences": draw_words.sentences,
    "tokens": draw_words.tokens,
    "texts": draw_words.texts,
    "table": draw_words.table,
    "grid": draw_grid.grid,
    "heads": draw_grid.heads,
    "bars": draw_chart.bars,
    "lines": draw_chart.lines,
    "timeline": draw_timeline.timeline,
    "graph": draw_graph.graph,
    "tree": draw_tree.tree,
    "picture": draw_image.picture,
    "feature": draw_card.feature,
    "bench": draw_sides.bench,
    "diff": draw_sides.diff,
}
"""The picture of each kind, as HTML that needs no script. A `group` is drawn by `html` itself."""

READABLE = frozenset({"sentences", "texts", "table", "bars", "group", "tree", "bench"})
"""Kinds whose picture is itself made of text or of a real table."""
