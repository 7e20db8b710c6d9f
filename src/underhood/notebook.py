"""A view in a notebook that answers back (extra `notebook`: anywidget).

Every result shows itself in a notebook without this. A `widget` has the elements of
the report besides: hovering, choosing, exporting; and what a person chooses comes back to Python.

    from underhood.notebook import widget
    panel = widget(result)      # the last expression of a cell shows it
    panel.selection             # {"layer": 5, "pos": 3}, after a click on a cell
    panel.selection = {"layer": 6}      # and the other way round

What this does not do: report anything without a running kernel; a saved notebook keeps the static
picture only where the front end stores widgets.
"""

import json
from functools import cache
from importlib import resources
from typing import Any

from underhood.core.errors import UsageError
from underhood.view import view_of
from underhood.view.html import style

__all__ = ["widget"]

# The bundle is an ES module of its own; anywidget wants one with a default export.
_GLUE = """
const source = new Blob([%s], {type: "text/javascript"});
const address = URL.createObjectURL(source);
const uh = await import(address);
URL.revokeObjectURL(address);
uh.define();

const KEYS = ["layer", "pos", "head", "feature"];
const same = (a, b) => KEYS.every((key) => a[key] === b[key]);
/* What stays chosen; what the pointer passes over would flood the kernel. */
const kept = (s) => Object.fromEntries(
  KEYS.filter((key) => s.locked && s[key] !== undefined).map((key) => [key, s[key]]));

function render({model, el}) {
  const host = document.createElement("div");
  host.className = "uh uh-alone";
  const draw = () => host.replaceChildren(uh.element(JSON.parse(model.get("document"))));
  const tell = (name, value) => { model.set(name, value); model.save_changes(); };
  const give = (s) => same(kept(s), model.get("selection")) || tell("selection", kept(s));
  const take = () => {
    const asked = model.get("selection");
    if (same(asked, kept(uh.selection.get()))) return;
    uh.selection.set(KEYS.some((key) => key in asked) ? asked : null, {lock: true});
  };
  host.addEventListener("uh-select", (event) => tell("picked", event.detail));
  const stop = uh.selection.subscribe(give);
  model.on("change:document", draw);
  model.on("change:selection", take);
  draw();
  el.append(host);
  return () => { stop(); model.off("change:document", draw); model.off("change:selection", take); };
}
export default {render};
"""


def widget(thing: Any) -> Any:
    """A widget that shows a view, result, model, run or plan.

    Args:
        thing: What `underhood.view.view_of` can draw.

    Returns:
        An `anywidget.AnyWidget` with the traits `document` (the view as JSON), `selection` (layer,
        position, head, feature; both ways) and `picked` (the last thing clicked on).

    Raises:
        UsageError: anywidget is not installed, or there is no view of this.
    """
    return _widget_class()(document=view_of(thing).to_json())


@cache
def _widget_class() -> Any:
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise UsageError(
            "widgets need anywidget",
            given="it is not installed",
            why="it is an extra: results show themselves in a notebook without it",
            do="pip install 'underhood[notebook]'",
        ) from None

    class ViewWidget(anywidget.AnyWidget):
        """A view, with what a person chose in it."""

        _esm = _module()
        _css = style()
        document = traitlets.Unicode("{}").tag(sync=True)
        selection = traitlets.Dict().tag(sync=True)
        picked = traitlets.Dict().tag(sync=True)

    return ViewWidget


def _module() -> str:
    bundle = resources.files("underhood.view").joinpath("static/underhood.mjs").read_text("utf-8")
    return _GLUE % json.dumps(bundle)
