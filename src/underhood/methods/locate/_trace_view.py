"""How a commitment looks: the curves, the two pathways, the alignment, and the strongest edges."""

from typing import TYPE_CHECKING, Any

from underhood.view import View, bars, graph, group, lines, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["view_of"]

_SHOWN = 24
_DRAWN = 200  # edges of a picture
_CURVES = {
    "inserted": "wrong run's stream inserted",
    "frozen": "later layers as in the right run",
    "lens_factual": "lens, right run",
    "lens_hallucinating": "lens, wrong run",
    "inserted_control": "random change of equal length",
    "shuffled": "another row's stream inserted",
}


def view_of(data: "xarray.Dataset") -> View:
    """Everything on one page; means over the usable rows."""
    import numpy as np

    usable = data.isel(batch=np.flatnonzero(data["usable"].values))
    labels = ["embed", *map(str, data["layer"].values[1:])]
    curves = lines(
        labels,
        {text: usable[name].mean("batch") for name, text in _CURVES.items()},
        x_name="layer",
        y_name="right minus wrong, logits",
        title="When the wrong answer is settled",
        about="Below zero the wrong answer wins. The last layer of the inserted and frozen curves"
        " is the wrong run itself; only where they first stay below zero tells.",
    )
    views = [sentences(_said(usable, len(data["usable"]))), curves, *_paths(usable)]
    chance = usable["alignment_control"].mean("batch").values
    aligned = usable["alignment"].mean("batch")
    views.append(
        lines(
            labels,
            {f"{run} run": aligned.sel(part=run) for run in data["part"].values}
            | {"random tokens, 95th percentile": chance.max(0)},
            x_name="layer",
            y_name="alignment",
            span=(-1, 1),
            title="Contextual alignment of the concepts",
            about="1: all support goes to the right answer; -1: all to the wrong one.",
        )
    )
    if "edge" in data.dims:
        views += [*_graphs(data), _strongest(data)]
    return group(views, title="Commitment")


def _said(usable: "xarray.Dataset", rows: int) -> list[str]:
    import numpy as np

    found = [f"{usable.sizes['batch']} of {rows} rows have a right and a wrong run."]
    for name, text in (
        ("commitment", "The wrong run's stream suffices"),
        ("association", "The wrong answer is written, and no later layer is needed,"),
        ("commitment_control", "Control: a random change of equal length suffices"),
    ):
        layers = usable[name].values
        known = layers[np.isfinite(layers)]
        where = f"from layer {np.median(known):.0f} on (median)" if known.size else "in no layer"
        found.append(f"{text} {where}, in {known.size} rows.")
    for name in ("contextual", "associative"):
        mean = float(usable[f"coherence_{name}"].mean())
        found.append(f"Coherence of the {name} pathway: {mean:+.2f}.")
    return found


def _paths(usable: "xarray.Dataset") -> list[View]:
    found = []
    for name, part in (("contextual", "attention"), ("associative", "MLP")):
        known = usable.isel(layer=slice(1, None))
        reach = known[f"{name}_control"].mean("batch").values.tolist()
        found.append(
            bars(
                [f"layer {layer}" for layer in known["layer"].values],
                known[name].mean("batch"),
                unit="logits",
                baseline=[(-abs(c), abs(c)) for c in reach],
                baseline_name="random change of equal length",
                title=f"What the {name} pathway does for the right answer",
                about=f"Margin that the right run loses with the wrong run's {part} output.",
            )
        )
    return found


def _graphs(data: "xarray.Dataset") -> list[View]:
    """What supports what in each of the two runs."""
    found = []
    for run in dict.fromkeys(map(str, data["edge_run"].values)):
        part = data.isel(edge=(data["edge_run"] == run).values)
        columns = [
            part[f"edge_{name}"].values.tolist() for name in ("layer", "source", "to", "target")
        ]
        rows = list(zip(*columns, part["weight"].values.tolist(), strict=True))
        rows.sort(key=lambda row: -abs(row[4]))
        nodes: dict[str, dict[str, Any]] = {}
        taken: dict[int, int] = {}  # concepts already placed in a layer
        for row in rows[:_DRAWN]:
            for layer, word in (row[:2], row[2:4]):
                if _node(layer, word) in nodes:
                    continue
                x = taken.setdefault(layer, 0)
                taken[layer] += 1
                nodes[_node(layer, word)] = {
                    "id": _node(layer, word), "label": word, "y": layer, "x": x,
                    "role": "concept", "at": {"layer": int(layer)},
                }  # fmt: skip
        edges = [(_node(*row[:2]), _node(*row[2:4]), row[4]) for row in rows[:_DRAWN]]
        found.append(
            graph(
                list(nodes.values()), edges, unit="logits", total=len(rows),
                x_name="concepts, the most connected at the left",
                title=f"Semantic trace graph of the {run} run",
                about="A line: what the lower concept adds to the logit of the higher one.",
            )
        )  # fmt: skip
    return found


def _node(layer: int, word: str) -> str:
    return f"{word} @ {layer}"


def _strongest(data: "xarray.Dataset") -> View:
    order = abs(data["weight"]).argsort().values[::-1][:_SHOWN]
    rows: list[list[Any]] = []
    for number in order:
        edge = data.isel(edge=int(number))
        rows.append(
            [
                str(edge["edge_run"].item()),
                f"{edge['edge_source'].item()} (layer {edge['edge_layer'].item()})",
                f"{edge['edge_target'].item()} (layer {edge['edge_to'].item()})",
                float(edge["weight"]),
                float(edge["edge_control"]),
            ]
        )
    columns = [
        "run", "concept", "supports",
        {"name": "weight", "unit": "logits", "format": "+.2f"},
        {"name": "random", "unit": "logits", "format": "+.2f"},
    ]  # fmt: skip
    return table(columns, rows, title="Semantic trace graph: the strongest edges")
