"""How a grid of effects is drawn: bars over layers, or a map of layers, units and positions."""

from typing import TYPE_CHECKING, Any

from underhood.data import Metric
from underhood.methods.locate._asked import Asked
from underhood.view import View, bars, grid, group

if TYPE_CHECKING:
    import xarray

__all__ = ["about_ends", "grid_view"]

_OTHER = "random directions of equal length"
_MOST_ROWS = 400


def grid_view(data: "xarray.Dataset", asked: Asked, title: str, *, note: str = "") -> View:
    """The `effect` of a dataset from `_grids.dataset`, with its `control` where there is one.

    Args:
        data: The numbers.
        asked: What the grid is made of.
        title: Of the whole.
        note: A sentence before those that say what 0 and 1 are.
    """
    if "site" not in data.dims:
        return _one(data, str(asked.names[0]), asked, title, note)
    views = [
        _one(data.sel(site=name, drop=True), str(name), asked, title, note)
        for name in data["site"].values
    ]
    return group(views, title=title)


def _one(data: "xarray.Dataset", name: str, asked: Asked, title: str, note: str) -> View:
    title = f"{title}: {name}, {asked.direction}"
    about = " ".join(part for part in (note, about_ends(data, asked)) if part)
    unit = "of the way"
    chance = data.get("control")
    axis = _unit_dim(data)
    sparse = axis is not None and bool(data["effect"].isnull().any()) and asked.chosen is not None
    if len(data["effect"].dims) == 1 or (sparse and "pos" not in data.dims):
        return _bars(data, name, title=title, about=about)
    layout, pick = _layout(data, sparse=sparse)
    shape = (len(layout["rows"]), len(layout["cols"]))
    effect = pick(data["effect"].values).reshape(shape)
    control = None
    if chance is not None:
        control = grid(
            pick(chance.values).reshape(shape), **layout, unit=unit, title=f"Control: {_OTHER}",
            about=f"The strongest of {asked.draws} random changes in each cell.",
        )  # fmt: skip
    best = _strongest(effect)
    return grid(effect, **layout, unit=unit, title=title, about=about, control=control, marks=best)


def _unit_dim(data: "xarray.Dataset") -> str | None:
    return next((str(d) for d in data["effect"].dims if d not in ("site", "layer", "pos")), None)


def _bars(data: "xarray.Dataset", name: str, *, title: str, about: str) -> View:
    """One bar per layer, or per unit that was chosen."""
    import numpy as np

    effect, chance = data["effect"], data.get("control")
    axis = _unit_dim(data)
    if axis is None:
        labels = [f"layer {layer}" for layer in data["layer"].values]
        keep: Any = np.ones(len(labels), dtype=bool)
    else:
        keep = np.isfinite(effect.values)
        spots = zip(*np.nonzero(keep), strict=True)
        layers, units = data["layer"].values, data[axis].values
        labels = [f"{name}.{layers[row]}.{units[col]}" for row, col in spots]
    reach = None
    if chance is not None:
        reach = [(-abs(c), abs(c)) for c in chance.values[keep].tolist()]
    return bars(
        labels, effect.values[keep], unit="of the way", title=title, about=about,
        baseline=reach, baseline_name=_OTHER,
    )  # fmt: skip


def _layout(data: "xarray.Dataset", *, sparse: bool) -> tuple[dict[str, Any], Any]:
    """Rows and columns of the grid with their names; and what takes its values from the data's."""
    import numpy as np

    layers = [str(layer) for layer in data["layer"].values]
    axis = _unit_dim(data)
    units = [str(unit) for unit in data[axis].values] if axis is not None else []
    if "pos" not in data.dims:
        layout = {"rows": layers, "cols": units, "row_name": "layer", "col_name": axis}
        return layout, lambda values: values
    words = [str(word) for word in data["token"].values]
    layout = {"cols": words, "col_name": "pos", "col_at": {"pos": data["pos"].values.tolist()}}
    if axis is None:
        return layout | {"rows": layers, "row_name": "layer"}, lambda values: values
    rows = np.array([f"{layer}.{unit}" for layer in layers for unit in units])
    flat = data["effect"].values.reshape(len(rows), -1)
    keep = np.isfinite(flat).any(1) if sparse else np.ones(len(rows), dtype=bool)
    if keep.sum() > _MOST_ROWS:  # a page of thousands of rows helps nobody: the strongest
        sizes = np.where(keep, np.nan_to_num(np.abs(flat)).max(1), -1)
        keep = sizes >= np.sort(sizes)[-_MOST_ROWS]

    def pick(values: Any) -> Any:
        return values.reshape(len(rows), -1)[keep]

    return layout | {"rows": rows[keep].tolist(), "row_name": axis}, pick


def _strongest(effect: Any) -> list[tuple[int, int]]:
    import numpy as np

    if not np.isfinite(effect).any():
        return []
    row, col = np.unravel_index(np.nanargmax(np.abs(effect)), effect.shape)
    return [(int(row), int(col))]


def about_ends(data: "xarray.Dataset", asked: Asked) -> str:
    """What 0 and 1 are, in the metric's own unit, and what was not run."""
    metric: Metric = asked.metric
    clean, contrast = float(data["clean"].mean()), float(data["contrast"].mean())
    ends = f"{metric.name}: clean {clean:+.3g}, contrast {contrast:+.3g} {metric.unit}"
    if asked.denoises:
        scale = "0 = the contrast run as it is, 1 = the clean run's answer restored"
    else:
        scale = "0 = the clean run as it is, 1 = its answer lost to the contrast's"
    parts = [f"{scale} ({ends})."]
    asked_for = data["rows"].values > 0
    skipped, cells = int((data["skipped"].values & asked_for).sum()), int(asked_for.sum())
    if skipped:
        parts.append(f"{skipped} of {cells} cells hold the same in both runs: exactly 0, not run.")
    known = data["rows"].values[data["effect"].notnull().values]
    if known.size and known.min() < data.sizes["batch"]:
        parts.append("Prompts differ in length; positions count from the first token.")
    return " ".join(parts)
