"""The view of `redundancy`: sentences, the sets beside random ones, and what each node gains."""

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from underhood.view import View, bars, grid, group, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["redundancy_view"]

_SAID = 5  # sets that get a sentence
_COLUMNS = 60  # nodes of the grid


def redundancy_view(data: "xarray.Dataset") -> View:
    """Everything, claim and control side by side."""
    views: list[View] = [sentences(_statements(data), title="Who stands in for whom")]
    if data.sizes["circuit"]:
        views += [_bars(data), _table(data)]
    views.append(_gains(data))
    return group(views, title="Redundancy")


# Sentences ---------------------------------------------------------------------------------------


def _statements(data: "xarray.Dataset") -> list[str]:
    held = [row for row in range(data.sizes["circuit"]) if bool(data["held"][row])]
    cliques, rest = _cliques(data, held)
    found = [_clique_said(data, rows) for rows in cliques] + [_said(data, row) for row in rest]
    if len(found) > _SAID:
        found = [*found[:_SAID], f"{len(found) - _SAID} more sets are in the table."]
    if not found:
        found = [_nothing(data)]
    weak = data.sizes["circuit"] - len(held)
    if weak:
        found.append(
            f"{weak} of {data.sizes['circuit']} sets that the search flagged do no more than random"
            " sets of their size."
        )
    if int(data["diffuse"]):
        found.append(
            f"In {int(data['diffuse'])} groups many {_kind(data)} do more together than alone, and"
            f" no set of at most {data.attrs['largest']} does half of it."
        )
    return [*found, _prompts(data)]


def _members(data: "xarray.Dataset", row: int) -> list[str]:
    return str(data["circuit"].values[row]).split("+")


def _own(data: "xarray.Dataset", row: int, names: list[str]) -> list[float]:
    return [float(data["own"][row].sel(node=name)) for name in names]


def _said(data: "xarray.Dataset", row: int) -> str:
    names = _members(data, row)
    alone = [f"{value + 0.0:.2f}" for value in np.round(_own(data, row, names), 2)]
    joint, more = float(data["joint"][row]), float(data["interaction"][row])
    strong = more > joint / 2  # else most of what they do shows alone
    return (
        f"{_and(names)} {'' if strong else 'in part '}back each other up: alone {_and(alone)},"
        f" together {joint:.2f} of what the contrast changes ({_random(data, [row])})."
    )


def _clique_said(data: "xarray.Dataset", rows: list[int]) -> str:
    """Nodes of which any two do it."""
    rows_of = {name: row for row in rows for name in _members(data, row)}
    names = sorted(rows_of)
    own = [_own(data, rows_of[name], [name])[0] for name in names]
    alone = [f"{value + 0.0:.2f}" for value in np.round(own, 2)]
    joint = [float(data["joint"][row]) for row in rows]
    low, high = f"{min(joint):.2f}", f"{max(joint):.2f}"
    span = low if low == high else f"{low} to {high}"
    return (
        f"{_and(names)} stand in for one another: alone {_and(alone)}, any two together {span} of"
        f" what the contrast changes ({_random(data, rows)})."
    )


def _cliques(data: "xarray.Dataset", held: list[int]) -> tuple[list[list[int]], list[int]]:
    """Groups of three and more nodes of which all pairs are held, and the rows of no such group."""
    pairs = {frozenset(_members(data, row)): row for row in held if int(data["size"][row]) == 2}
    groups: list[set[str]] = []
    for a, b in (sorted(pair) for pair in pairs):
        grown = {a, b}
        for name in sorted({n for pair in pairs for n in pair}):
            if all(frozenset((name, other)) in pairs for other in grown - {name}):
                grown.add(name)
        if len(grown) > 2 and grown not in groups:
            groups.append(grown)
    rows = [[pairs[frozenset(p)] for p in combinations(sorted(g), 2)] for g in groups]
    used = {row for some in rows for row in some}
    return rows, [row for row in held if row not in used]


def _random(data: "xarray.Dataset", rows: list[int]) -> str:
    chance = data["control_interaction"].values[rows]
    count = int((~np.isnan(chance[0])).sum())
    size = {2: "pairs"}.get(int(data["size"][rows[0]]), "sets of as many")
    return f"{count} random {size}: at most {np.nanmax(chance):+.2f} more together than alone"


def _nothing(data: "xarray.Dataset") -> str:
    gain, base, node = _largest_gain(data)
    kind, quiet = _kind(data), int(data["quiet"])
    if data.sizes["circuit"]:
        text = f"No set of {kind} does more, beyond random sets, than its members alone"
    else:
        text = f"No {kind} stand in for each other"
    if base:
        text += (
            f": with one of the {data.sizes['part']} strongest ablated, no other does more than"
            f" {gain:+.2f} more than alone"
            + (f" ({node} without {base}; " if gain > 0.005 else " (")
            + f"what counts: {data.attrs['threshold']:.2f})"
        )
    if quiet > 1:
        text += (
            f"; the {quiet} that show nothing alone do {float(data['quiet_joint']) + 0.0:.2f}"
            f" together ({float(data['quiet_sum']) + 0.0:.2f} added up)"
        )
    return text + "."


def _largest_gain(data: "xarray.Dataset") -> tuple[float, str, str]:
    gain = _gain(data)
    if np.isnan(gain).all():
        return 0.0, "", ""
    row, column = np.unravel_index(int(np.nanargmax(gain)), gain.shape)
    return (
        float(gain[row, column]),
        str(data["part"].values[row]),
        str(data["node"].values[column]),
    )


def _gain(data: "xarray.Dataset") -> np.ndarray:
    """For a strong node and any other: what the lesser of the two does more without the other."""
    own, bases = data["single"].values, data["single"].sel(node=data["part"]).values[:, None]
    joint = data["conditional"].values + bases
    return np.minimum(joint - bases - own.clip(min=0), joint - own - bases.clip(min=0))


def _prompts(data: "xarray.Dataset") -> str:
    found, tested = data.attrs["prompts"]
    if data.attrs["apart"]:
        return f"Sets were found on {found} prompts and measured on {tested} others."
    prompts = "prompt" if found == 1 else f"{found} prompts"
    return f"Found and measured on the same {prompts}: on others it may be less."


def _kind(data: "xarray.Dataset") -> str:
    return {"heads": "heads", "mlps": "MLPs"}.get(data.attrs["nodes"], "nodes")


def _and(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


# Pictures ----------------------------------------------------------------------------------------


def _bars(data: "xarray.Dataset") -> View:
    chance = data["control_interaction"].values
    span = [
        (float(np.nanmin(row)), float(np.nanmax(row))) if not np.isnan(row).all() else (None, None)
        for row in chance
    ]
    return bars(
        data["circuit"].values.tolist(), data["interaction"].values, unit="of the way",
        baseline=span, baseline_name="random sets of equal size",
        title="Together, less the sum alone",
        about="1: all that the contrast changes. Above 0: the parts stand in for each other; below"
        " 0: they work in series, and the second has nothing left to break.",
    )  # fmt: skip


def _table(data: "xarray.Dataset") -> View:
    rows: list[list[Any]] = []
    for row in range(data.sizes["circuit"]):
        names = _members(data, row)
        alone = ", ".join(f"{v + 0.0:.2f}" for v in np.round(_own(data, row, names), 2))
        chance = data["control_interaction"].values[row]
        most = None if np.isnan(chance).all() else float(np.nanmax(chance))
        numbers = [
            float(data[name][row])
            for name in (
                "alone", "joint", "interaction", "interaction_low", "interaction_high", "extra",
            )
        ]  # fmt: skip
        rows.append([" ".join(names), alone, *numbers, most, bool(data["held"][row])])
    share = {"format": ".2f"}
    signed = {"format": "+.2f"}
    columns: list[Any] = [
        "set", "each alone", {"name": "added up", **share}, {"name": "together", **share},
        {"name": "more together", **signed}, {"name": "95% from", **signed},
        {"name": "to", **signed}, {"name": "each gains at least", **signed},
        {"name": "most of random sets", **signed}, "above all random sets",
    ]  # fmt: skip
    return table(
        columns, rows, title="The sets found",
        about="Shares of what the contrast changes. Each gains: how much more a member does once"
        " the others are gone, the least of them.",
    )  # fmt: skip


def _gains(data: "xarray.Dataset") -> View:
    gain = _gain(data)
    order = np.arange(gain.shape[1])
    if len(order) > _COLUMNS:
        best = np.nan_to_num(gain, nan=-np.inf).max(0)
        order = np.sort(np.argsort(-best, kind="stable")[:_COLUMNS])
    return grid(
        gain[:, order], rows=data["part"].values, cols=data["node"].values[order],
        row_name="strong", col_name="node", unit="of the way",
        title="How much more two nodes do once the other is gone",
        about="The lesser of the two; one is among the strongest. Above 0: they back each other up."
        " Below 0: they work in series, and the second has nothing left to break. On the prompts"
        " that the sets were found on."
        + (f" The {_COLUMNS} nodes with the largest gains." if len(order) < gain.shape[1] else ""),
    )  # fmt: skip
