"""Builders of the kinds that put several things together; see `build` for what they share."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat, Unpack

import numpy as np

from underhood.core.errors import UsageError
from underhood.view import files, png
from underhood.view.build import Common, Numbers, ends, listed_series, make
from underhood.view.clean import clean
from underhood.view.doc import (
    Arm,
    Axis,
    Bench,
    Branch,
    Diff,
    Edges,
    Example,
    Feature,
    Graph,
    Grid,
    Histogram,
    Mark,
    Node,
    Picture,
    Series,
    Timeline,
    Tokens,
    Tree,
)

Facts = Mapping[str, SupportsFloat | None]
"""A few numbers by name."""


def graph(
    nodes: Iterable[Node | Mapping[str, Any]],
    edges: Iterable[Sequence[Any]] | Edges,
    *,
    facts: Facts | None = None,
    unit: str = "",
    value_unit: str = "",
    total: int | None = None,
    x_labels: Iterable[str] | None = None,
    x_name: str = "",
    y_name: str = "layer",
    supernodes: Mapping[str, Iterable[str]] | None = None,
    pins: Iterable[str] = (),
    **common: Unpack[Common],
) -> Graph:
    """A circuit: nodes in rows by layer, edges with weights.

    Args:
        nodes: `Node`s or mappings with `id`, `y` (its layer), `x` (its position or order), and
            optionally `label`, `role`, `value` and `at` (`{"layer": 3, "head": 5}`).
        edges: `(source id, target id, weight)`, then optionally whether it belongs to the circuit,
            and its own name; or `Edges`.
        facts: header numbers, as `{"faithfulness": 0.93}`.
        unit: of the weights.
        value_unit: of the nodes' values.
        total: how many edges the whole graph has, where not all are given.
        x_labels: the tokens that stand at x = 0, 1, 2, ...
        x_name: what x is.
        y_name: what y is.
        supernodes: groups of nodes, each drawn as one: the ids of its members by its name.
        pins: ids of nodes, and names of groups, that stay in sight however few edges are drawn.
        **common: see `Common`.

    Raises:
        UsageError: an edge ends at no node, two nodes share an id, or a group does not fit.
    """
    listed = [node if isinstance(node, Node) else dict(node) for node in nodes]
    if not isinstance(edges, Edges):
        ids = [node.id if isinstance(node, Node) else node.get("id") for node in listed]
        edges = _columns(edges, {str(name): i for i, name in enumerate(ids)})
    return make(
        Graph,
        common,
        nodes=listed,
        edges=edges,
        facts=dict(facts or {}),
        unit=unit,
        value_unit=value_unit,
        total=total,
        x_labels=None if x_labels is None else list(x_labels),
        x_name=x_name,
        y_name=y_name,
        supernodes=[{"name": name, "nodes": list(ids)} for name, ids in (supernodes or {}).items()],
        pins=list(pins),
    )


def _columns(edges: Iterable[Sequence[Any]], numbers: Mapping[str, int]) -> Edges:
    rows = list(edges)
    for row in rows:
        for name in row[:2]:
            if name not in numbers:
                raise UsageError(
                    "an edge ends at no node of this graph", given=f"{row[0]} -> {row[1]}",
                    why=f"there is no node {name!r}", do="give its node too",
                )  # fmt: skip
    width = max((len(row) for row in rows), default=3)
    inside = [len(row) < 4 or bool(row[3]) for row in rows]
    return Edges(
        source=[numbers[row[0]] for row in rows],
        target=[numbers[row[1]] for row in rows],
        weight=clean([row[2] for row in rows]),
        inside=None if all(inside) else inside,
        label=[_edge_name(row) for row in rows] if width > 4 else None,
    )


def _edge_name(row: Sequence[Any]) -> str:
    return str(row[4]) if len(row) > 4 else f"{row[0]} -> {row[1]}"


def tree(root: Branch | Mapping[str, Any], **common: Unpack[Common]) -> Tree:
    """A module tree.

    Args:
        root: a `Branch`, or a mapping with `name` and optionally `type`, `path`, `shapes`,
            `parameters`, `sites`, `many` and `children`. `view_of(model)` makes it of a model.
        **common: see `Common`.
    """
    return make(Tree, common, root=root if isinstance(root, Branch) else dict(root))


def picture(
    image: bytes | Path | Numbers,
    grid: Grid | None = None,
    *,
    alpha: SupportsFloat = 0.6,
    alt: str = "",
    **common: Unpack[Common],
) -> Picture:
    """An image, and a grid of values over it.

    Args:
        image: the bytes of a PNG file, its path, or pixels `[height, width, 3]`, 0 to 255.
        grid: one cell per patch, from the upper left corner.
        alpha: opacity of the grid.
        alt: what the image shows, for those who cannot see it.
        **common: see `Common`.

    Raises:
        UsageError: not a PNG file, or pixels of another shape.
        FileProblem: the file cannot be read.
    """
    if isinstance(image, Path):
        raw: bytes = files.read(image)
    elif isinstance(image, bytes):
        raw = image
    else:
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise UsageError(
                "these are not the pixels of an image", given=f"shape {pixels.shape}",
                do="pass [height, width, 3], 0 to 255",
            )  # fmt: skip
        raw = png.encode_rgb(pixels.clip(0, 255).astype(np.uint8))
    return make(Picture, common, png=raw, grid=grid, alpha=float(alpha), alt=alt)


def feature(
    examples: Iterable[Example | Mapping[str, Any]],
    *,
    facts: Facts | None = None,
    histograms: Iterable[Histogram | Mapping[str, Any]] = (),
    promoted: Iterable[tuple[str, SupportsFloat]] = (),
    suppressed: Iterable[tuple[str, SupportsFloat]] = (),
    neighbours: Iterable[tuple[str, SupportsFloat]] = (),
    unit: str = "",
    at: Mapping[Axis, int] | None = None,
    **common: Unpack[Common],
) -> Feature:
    """The card of one feature.

    Args:
        examples: `Example`s or mappings with `tokens`, `values` (activations) and `note`.
        facts: header numbers, as `{"density": 0.002}`.
        histograms: `Histogram`s or mappings with `name`, `edges` and `counts`.
        promoted: tokens that it makes likelier, with their logits, the largest first.
        suppressed: tokens that it makes less likely, the most negative first.
        neighbours: similar features with their cosine.
        unit: of the activations.
        at: `{"layer": 6, "feature": 1204}`.
        **common: see `Common`.
    """
    return make(
        Feature,
        common,
        examples=list(examples),
        facts=dict(facts or {}),
        histograms=list(histograms),
        promoted=[(str(name), float(value)) for name, value in promoted],
        suppressed=[(str(name), float(value)) for name, value in suppressed],
        neighbours=[(str(name), float(value)) for name, value in neighbours],
        unit=unit,
        at=dict(at or {}),
    )


def timeline(
    steps: Numbers | range,
    series: Mapping[str, Numbers] | Sequence[Series],
    *,
    tokens: Iterable[str] | None = None,
    log: bool = False,
    marks: Mapping[str, SupportsFloat] | None = None,
    bands: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    x_name: str = "step",
    y_name: str = "",
    span: tuple[SupportsFloat, SupportsFloat] | None = None,
    **common: Unpack[Common],
) -> Timeline:
    """Series over steps of a generation or of training.

    Args:
        steps: `[step]`, rising.
        series: per name, `[step]`; missing values break the line.
        tokens: the token of each step.
        log: a logarithmic axis.
        marks: steps worth a vertical line, by label, as `{"onset": 1000}`.
        bands: per name, (low, high), each `[step]`: a shaded interval around the line.
        x_name: what a step is.
        y_name: what the values are, with their unit.
        span: the ends of the y axis; None fits the data.
        **common: see `Common`.
    """
    return make(
        Timeline,
        common,
        steps=clean(steps),
        series=listed_series(series, bands),
        tokens=None if tokens is None else list(tokens),
        log=log,
        marks=[Mark(label=name, step=float(step)) for name, step in (marks or {}).items()],
        x_name=x_name,
        y_name=y_name,
        span=ends(span),
    )


def bench(
    prompt: str,
    arms: Iterable[Arm | Mapping[str, Any]],
    *,
    unit: str = "",
    decoding: str = "greedy",
    **common: Unpack[Common],
) -> Bench:
    """A steering bench.

    Args:
        prompt: what all arms continue.
        arms: the unedited one first: `Arm`s or mappings with `label`, `tokens`, and optionally
            `values` (probabilities), `strength`, `effects` (side effects by name) and `note`.
        unit: of the strengths, as `residual norms`.
        decoding: how tokens were chosen.
        **common: see `Common`.
    """
    listed = [arm if isinstance(arm, Arm) else dict(arm) for arm in arms]
    return make(Bench, common, prompt=prompt, arms=listed, unit=unit, decoding=decoding)


def diff(
    a: Grid | Tokens, b: Grid | Tokens, *, limit: SupportsFloat | None = None,
    **common: Unpack[Common],
) -> Diff:  # fmt: skip
    """Two models or runs over one grid or strip, and A - B.

    Args:
        a: the first; its title names it.
        b: the second, over the same rows and columns or tokens, in the same unit and scale.
        limit: the end of the scale of A - B; None takes the robust limit.
        **common: see `Common`.

    Raises:
        UsageError: they differ in what they are over, or have no values.
    """
    return make(Diff, common, a=a, b=b, limit=None if limit is None else float(limit))
