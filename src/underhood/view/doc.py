"""A view: what a result looks like, as a small typed JSON document (`view/1`).

A method returns numbers; a *view* says how to show them: which kind of picture, its labels, its
colour scale, one or two sentences on how to read it, and the control that belongs beside the claim.
The report, the notebook, the terminal and the workbench all draw the same document, and a saved one
can be drawn again later without the model.

The kinds are told apart by the field `kind`. Plain ones (module `kinds`): `sentences tokens grid
bars heads lines table texts`; put together (module `panels`): `graph tree picture feature timeline
bench diff`; and `group`, several views under one title. A lens grid and a patch heat map are both a
`grid`; statistics and probes are `bars` and `lines`. Numbers are plain floats, with None where
there is none: NaN and infinities become None on the way in, so a view is always valid JSON. Use the
builders (`underhood.view.grid`, ...) rather than the classes: they take arrays and refuse wrong
shapes with a reason.

The file carries `"schema": "view/1"`. Fields that this version does not know are ignored; a file of
a newer schema, or a truncated one, is a `FileProblem`. Files of this schema open for ever.
"""

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic import ValidationError as _Invalid

from underhood.core.errors import FileProblem, nearest
from underhood.view.base import SCHEMA, AnyView, Axis, Number, Part, Places, View
from underhood.view.kinds import (
    Bars,
    Candidates,
    Cell,
    Column,
    Grid,
    Head,
    Heads,
    Lines,
    Measure,
    Sentences,
    Series,
    Table,
    Text,
    Texts,
    Tokens,
)
from underhood.view.panels import (
    Arm,
    Bench,
    Branch,
    Diff,
    Edges,
    Example,
    Feature,
    Graph,
    Histogram,
    Mark,
    Node,
    Picture,
    Supernode,
    Timeline,
    Tree,
)
from underhood.view.schema import check_schema, first_reason

__all__ = [
    "CLASSES", "EVERY", "KINDS", "SCHEMA", "AnyView", "Arm", "Axis", "Bars", "Bench", "Branch",
    "Candidates", "Cell", "Column", "Diff", "Edges", "Example", "Feature", "Graph", "Grid",
    "Group", "Head", "Heads", "Histogram", "Lines", "Mark", "Measure", "Node", "Number", "Part",
    "Picture", "Places", "Sentences", "Series", "Supernode", "Table", "Text", "Texts",
    "Timeline", "Tokens", "Tree", "View", "json_schema", "read",
]  # fmt: skip


class Group(View, frozen=True):
    """Views under one title; `folded` ones are closed until the reader opens them."""

    kind: Literal["group"] = "group"
    views: list[AnyView]
    folded: bool = False


EVERY = Annotated[
    Sentences | Tokens | Grid | Bars | Heads | Lines | Table | Texts | Graph | Tree | Picture
    | Feature | Timeline | Bench | Diff | Group,
    Field(discriminator="kind"),
]  # fmt: skip
"""A view of any kind, for pydantic."""

CLASSES: dict[str, type[View]] = {
    cls.model_fields["kind"].default: cls
    for cls in (Sentences, Tokens, Grid, Bars, Heads, Lines, Table, Texts, Graph, Tree, Picture,
                Feature, Timeline, Bench, Diff, Group)
}  # fmt: skip
KINDS: tuple[str, ...] = tuple(CLASSES)


@cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(EVERY)


def read(document: Any, where: str) -> View:
    """The view in a parsed document; see `View.from_dict`."""
    if not isinstance(document, dict):
        raise FileProblem(
            "this is not a view document",
            given=f"{where}: {type(document).__name__}",
            do="save one with View.save('x.json')",
        )
    check_schema(document.get("schema"), SCHEMA, where)
    kind = document.get("kind")
    if kind not in KINDS:
        raise FileProblem(
            f"no view has the kind {kind!r}",
            given=where,
            why=f"the kinds are {', '.join(KINDS)}",
            do=f"nearest: {nearest(str(kind), KINDS)}",
        )
    try:
        return _adapter().validate_python(document)
    except _Invalid as problem:
        raise FileProblem(
            "the fields of this view do not fit its kind",
            given=where,
            why=first_reason(problem),
            do="write the file again with View.save",
        ) from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `view/1`: what a reader in another language checks."""
    schema = _adapter().json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA,
        "description": "A view of underhood. The outermost document also has the field schema.",
        **schema,
    }
