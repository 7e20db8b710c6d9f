"""The kinds that put several things together: graph, tree, picture, feature, timeline, bench, diff.

Each is as small as it can be; the drawings say how many of its parts they show.
"""

import base64
import binascii
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from underhood.view.base import (
    Axis,
    Cleaned,
    Facts,
    Labels,
    Number,
    Numbers,
    Part,
    View,
    same,
)
from underhood.view.clean import clean
from underhood.view.kinds import Grid, Series, Text, Tokens


class Node(Part, frozen=True):
    """One node of a `Graph`.

    Attributes:
        id: unique in the graph, as `a3.h5`.
        label: what is written on it; empty takes the id.
        y: its height, in layers: a head of layer 3 stands at 3, its MLP at 3.5.
        x: where it stands in its row: a position, or a number in some order.
        role: what it is or does, as `head` or `name mover`.
        value: its own number (None: none).
        at: what it is on the shared axes: `{"layer": 3, "head": 5}`.
    """

    id: str
    label: str = ""
    y: float
    x: float
    role: str = ""
    value: Cleaned = None
    at: dict[Axis, int] = {}


class Edges(Part, frozen=True):
    """The edges of a `Graph`, one list per property: fifty thousand must stay small.

    Attributes:
        source: number of the node each edge leaves.
        target: number of the node it enters.
        weight: its weight.
        inside: whether it belongs to the circuit; None: all do.
        label: its name, where source and target do not say it; None: `source -> target`.
    """

    source: list[int]
    target: list[int]
    weight: Numbers
    inside: list[bool] | None = None
    label: Labels | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Edges":
        for name in ("target", "weight", "inside", "label"):
            found = getattr(self, name)
            if found is not None:
                same(f"{name} of the edges", len(found), len(self.source))
        return self


class Supernode(Part, frozen=True):
    """Several nodes of a `Graph` that a reader has put together: drawn as one.

    Attributes:
        name: unique among the groups and the nodes.
        nodes: ids of its members.
    """

    name: str = Field(min_length=1)
    nodes: list[str] = Field(min_length=1)


class Graph(View, frozen=True):
    """A circuit: nodes in rows by layer, edges with weights; positive ones are blue.

    Attributes:
        nodes: in any order.
        edges: between them.
        facts: header numbers, as `{"faithfulness": 0.93}`.
        unit: of the weights.
        value_unit: of the nodes' values.
        total: how many edges the whole graph has, where not all of them are here.
        x_labels: what stands at x = 0, 1, 2, ... (the tokens); None where x is a mere order.
        x_name: what x is.
        y_name: what y is.
        supernodes: groups of nodes, each drawn as one node with its edges summed.
        pins: ids of nodes, and names of groups, that stay in sight however few edges are drawn.
    """

    kind: Literal["graph"] = "graph"
    nodes: list[Node]
    edges: Edges
    facts: Facts = {}
    unit: str = ""
    value_unit: str = ""
    total: int | None = None
    x_labels: Labels | None = None
    x_name: str = ""
    y_name: str = "layer"
    supernodes: list[Supernode] = []
    pins: list[str] = []

    @model_validator(mode="after")
    def _fits(self) -> "Graph":
        same("node ids that differ", len({node.id for node in self.nodes}), len(self.nodes))
        for side in ("source", "target"):
            numbers = getattr(self.edges, side)
            if numbers and (min(numbers) < 0 or max(numbers) >= len(self.nodes)):
                raise ValueError(f"an edge's {side} is none of the {len(self.nodes)} nodes")
        if self.total is not None and self.total < len(self.edges.source):
            raise ValueError(f"total: {self.total} given, {len(self.edges.source)} edges are here")
        self._check_groups()
        return self

    def _check_groups(self) -> None:
        """Refuse groups that share a node or a name, and what names no node."""
        ids = {node.id for node in self.nodes}
        members = [name for group in self.supernodes for name in group.nodes]
        names = [group.name for group in self.supernodes]
        same("nodes in one group only", len(set(members)), len(members))
        same("names that differ", len({*ids, *names}), len(ids) + len(names))
        unknown = [name for name in members if name not in ids]
        unknown += [name for name in self.pins if name not in ids and name not in names]
        if unknown:
            raise ValueError(f"no node of this graph is called {unknown[0]!r}")


class Branch(Part, frozen=True):
    """One module of a `Tree`.

    Attributes:
        name: its name in its parent; `0-7` where it stands for several alike.
        type: its class.
        path: its full name in the model; that of the first of several.
        shapes: the parameters that it holds itself, by name.
        parameters: how many numbers it holds, with everything below it.
        sites: addresses of what can be read and changed there.
        many: how many alike modules it stands for.
        children: the modules in it.
    """

    name: str
    type: str = ""
    path: str = ""
    shapes: dict[str, list[int]] = {}
    parameters: int = 0
    sites: Labels = []
    many: int = 1
    children: "list[Branch]" = []


class Tree(View, frozen=True):
    """The modules of a model, as a tree that can be folded."""

    kind: Literal["tree"] = "tree"
    root: Branch


def _picture(value: str | bytes) -> str:
    """Base64 of a PNG file; bytes are encoded."""
    try:
        raw = value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("the picture is not base64") from None
    # The size stands in the first chunk, which is always IHDR.
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[12:16] != b"IHDR" or len(raw) < 24:
        raise ValueError("the picture is not a PNG file")
    return base64.b64encode(raw).decode("ascii") if isinstance(value, bytes) else value


class Picture(View, frozen=True):
    """An image, and a grid of values laid over it.

    Attributes:
        png: the PNG file in base64.
        grid: one cell per patch, from the upper left corner; None: the image alone.
        alpha: opacity of the grid, 0 to 1.
        alt: what the image shows, in words.
    """

    kind: Literal["picture"] = "picture"
    png: Annotated[str, BeforeValidator(_picture)]
    grid: Grid | None = None
    alpha: float = Field(default=0.6, ge=0, le=1)
    alt: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        head = base64.b64decode(self.png[:32])
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


class Example(Part, frozen=True):
    """A text that a feature acts on: `values` are its activations, `note` how it was picked."""

    tokens: Labels
    values: Numbers
    note: str = ""

    @model_validator(mode="after")
    def _fits(self) -> "Example":
        same("values of an example", len(self.values), len(self.tokens))
        return self


class Histogram(Part, frozen=True):
    """How often values fall between neighbouring `edges`."""

    name: str
    edges: list[float]
    counts: list[float]

    @model_validator(mode="after")
    def _fits(self) -> "Histogram":
        same(f"edges of {self.name}", len(self.edges), len(self.counts) + 1)
        return self


Ranked = Annotated[list[tuple[str, Number]], BeforeValidator(clean)]
"""Names with a number each, the largest first."""


class Feature(View, frozen=True):
    """The card of one feature.

    Attributes:
        examples: top examples, and others by quantile, with activations in context.
        facts: header numbers, as `{"density": 0.002}`.
        histograms: of activations, of logits.
        promoted: tokens that it makes likelier, with their logits.
        suppressed: tokens that it makes less likely.
        neighbours: features of similar direction, with their cosine.
        unit: of the activations.
        at: what it is on the shared axes: `{"layer": 6, "feature": 1204}`.
    """

    kind: Literal["feature"] = "feature"
    examples: list[Example]
    facts: Facts = {}
    histograms: list[Histogram] = []
    promoted: Ranked = []
    suppressed: Ranked = []
    neighbours: Ranked = []
    unit: str = ""
    at: dict[Axis, int] = {}


class Mark(Part, frozen=True):
    """A step worth a vertical line, as an onset."""

    step: float
    label: str


class Timeline(View, frozen=True):
    """Series over steps: of a generation (with its tokens), or of training.

    Attributes:
        steps: the step of each point, rising.
        series: one value per step each.
        tokens: the token of each step; None for training.
        log: a logarithmic axis; step 0 then stands where half the first later step would.
        marks: steps worth a line.
        x_name: what a step is.
        y_name: what the values are, with their unit.
        span: the ends of the y axis; None fits the data.
    """

    kind: Literal["timeline"] = "timeline"
    steps: list[float]
    series: list[Series]
    tokens: Labels | None = None
    log: bool = False
    marks: list[Mark] = []
    x_name: str = "step"
    y_name: str = ""
    span: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Timeline":
        if any(a >= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError("the steps do not rise")
        if self.log and self.steps and self.steps[0] < 0:
            raise ValueError("a logarithmic axis has no negative steps")
        if self.tokens is not None:
            same("tokens", len(self.tokens), len(self.steps))
        for line in self.series:
            line.check(len(self.steps))
        return self


class Arm(Text, frozen=True):
    """One way of running the prompt: its text, how strong the change was, what else it changed.

    Attributes:
        strength: in the bench's unit; None for the unedited arm.
        effects: side effects by name, the same names in each arm.
    """

    strength: Cleaned = None
    effects: Facts = {}


class Bench(View, frozen=True):
    """A steering bench: the same prompt under several changes, the unedited arm first.

    Attributes:
        prompt: what all arms continue.
        arms: the unedited one, then the others.
        unit: of the strengths, as `residual norms`.
        decoding: how tokens were chosen, as `greedy` or `temperature 0.7, seed 0`.
    """

    kind: Literal["bench"] = "bench"
    prompt: str
    arms: list[Arm]
    unit: str = ""
    decoding: str = "greedy"

    @model_validator(mode="after")
    def _fits(self) -> "Bench":
        if self.arms and self.arms[0].strength:
            raise ValueError("the first arm is the unedited one: its strength is None")
        names = {tuple(arm.effects) for arm in self.arms}
        if len(names) > 1:
            raise ValueError("every arm names the same side effects, in the same order")
        return self


_ALONE = {"cell_text": None, "marks": [], "measures": [], "candidates": None}
"""What says nothing of other numbers over the same cells."""

_Side = Annotated[Grid | Tokens, Field(discriminator="kind")]


class Diff(View, frozen=True):
    """Two models or runs over one grid or strip: A, B, and A - B.

    Attributes:
        a: the first; its title names it.
        b: the second, over the same rows and columns or tokens, on the same scale.
        limit: the end of the scale of A - B; None takes the robust limit.
    """

    kind: Literal["diff"] = "diff"
    a: _Side
    b: _Side
    limit: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "Diff":
        for name in ("kind", "rows", "cols", "tokens", "scale", "unit"):
            if getattr(self.a, name, None) != getattr(self.b, name, None):
                raise ValueError(f"A and B differ in their {name}")
        if self.a.values is None or self.b.values is None:
            raise ValueError("A and B need values")
        return self

    @property
    def delta(self) -> Grid | Tokens:
        """A - B: empty where either has no value, on a diverging scale."""
        title = f"{self.a.title or 'A'} − {self.b.title or 'B'}"
        values = _minus(self.a.values or [], self.b.values or [])
        update = {"values": values, "scale": "diverging", "limit": self.limit, "title": title}
        plain = _ALONE if isinstance(self.a, Grid) else {}
        return self.a.model_copy(update=update | plain | {"about": "", "control": None})


def _minus(a: list, b: list) -> list:
    return [
        _minus(x, y) if isinstance(x, list) else None if x is None or y is None else x - y
        for x, y in zip(a, b, strict=True)
    ]
