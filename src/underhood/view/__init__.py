"""What a result looks like: Result -> view (a small JSON document) -> HTML, text, picture.

Nothing here knows models or methods. A method builds a view with one of the builders below and puts
it in a `Result` beside its numbers; the report, the notebook and the terminal draw it. A page of
several views is made by `underhood.view.page.page`.

Names are loaded when first used, so that `import underhood.view` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from underhood.view.build import (
        bars,
        grid,
        group,
        heads,
        lines,
        sentences,
        table,
        texts,
        tokens,
    )
    from underhood.view.build_panels import (
        bench,
        diff,
        feature,
        graph,
        picture,
        timeline,
        tree,
    )
    from underhood.view.doc import View
    from underhood.view.of import view_of
    from underhood.view.result import Result

_PLAIN = ("bars", "grid", "group", "heads", "lines", "sentences", "table", "texts", "tokens")
_PANELS = ("bench", "diff", "feature", "graph", "picture", "timeline", "tree")
_HOME = {
    **dict.fromkeys(_PLAIN, "build"),
    **dict.fromkeys(_PANELS, "build_panels"),
    "View": "doc",
    "view_of": "of",
    "Result": "result",
}

__all__ = [
    "Result", "View", "bars", "bench", "diff", "feature", "graph", "grid", "group", "heads",
    "lines", "picture", "sentences", "table", "texts", "timeline", "tokens", "tree", "view_of",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
