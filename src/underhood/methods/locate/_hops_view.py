"""How two-stage reasoning looks: what is readable, and what is lost where."""

from typing import TYPE_CHECKING, Any

from underhood.view import View, grid, group, lines, sentences

if TYPE_CHECKING:
    import xarray

__all__ = ["view_of"]

_OTHER = "random directions of equal length"


def view_of(data: "xarray.Dataset", *, hop: int, last: int, threshold: float) -> View:
    """Sentences, the curves of the lens, and a grid of effects with its control per contrast."""
    labels = ["embed", *map(str, data["layer"].values[1:])]
    curves = {
        f"bridge at position {hop}": data["mrr_bridge"].sel(pos=hop),
        f"answer at position {last}": data["mrr_answer"].sel(pos=last),
        "bridges of other rows": data["shuffled_bridge"].sel(pos=hop),
        "answers of other rows": data["shuffled_answer"].sel(pos=last),
    }
    read = lines(
        labels,
        curves,
        x_name="layer",
        y_name="mean reciprocal rank",
        span=(0, 1),
        title="Readable",
        about="1: the lens puts the token first. Other rows' tokens are chance.",
    )
    grids = []
    for part in data["part"].values:
        one = data.sel(part=part)
        about = "Positive: the state there supports the answer."
        share = f"Answer lost: contrast {part}"
        grids.append(
            _grid(one["share"], one["answer_control"], "of the effect", title=share, about=about)
        )
        about = "Positive: the state there supports the bridge. Hatched: later than the reading."
        lost = f"Bridge lost: contrast {part}"
        grids.append(
            _grid(one["bridge_effect"], one["bridge_control"], "nats", title=lost, about=about)
        )
    return group([sentences(_said(data, threshold)), read, *grids], title="Two-stage reasoning")


def _grid(
    effect: "xarray.DataArray", chance: "xarray.DataArray", unit: str, *, title: str, about: str
) -> View:
    layout: dict[str, Any] = {
        "rows": ["embed", *map(str, effect["layer"].values[1:])],
        "cols": effect["token"].values,
        "row_name": "layer",
        "col_name": "pos",
        "col_at": {"pos": effect["pos"].values.tolist()},
        "unit": unit,
    }
    control = None
    if bool(chance.notnull().any()):
        control = grid(chance, **layout, title=f"Control: {_OTHER}")
    return grid(effect, **layout, title=title, about=about, control=control)


def _said(data: "xarray.Dataset", threshold: float) -> list[str]:
    found = []
    for part in data["part"].values:
        one = data.sel(part=part)
        hops = [float(one[name]) for name in ("hop1_layer", "hop2_layer")]
        said = [f"layer {h:.0f}" if h == h else "no layer that this can show" for h in hops]
        found.append(
            f"Contrast {part} ({int(one['rows'])} rows, {float(one['full_answer']):.2f} nats of the"
            f" answer's log-probability): at {threshold:.0%} of the effect, hop 1 is resolved in"
            f" {said[0]}, hop 2 in {said[1]}."
        )
    return found
