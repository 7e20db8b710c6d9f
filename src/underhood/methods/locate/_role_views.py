"""The view of component_roles: sentences, both losses side by side, the circuits and the table."""

from typing import TYPE_CHECKING, Any

from underhood.core.names import part_name
from underhood.view import View, bars, grid, group, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["roles_view"]

_SHOWN = 16


def roles_view(data: "xarray.Dataset", abilities: tuple[str, str], size: int) -> View:
    """Everything, claim and control side by side."""
    views = [sentences(_sentences(data, abilities)), _table(data, abilities)]
    if "loss" in data:
        views += [_losses(data, ability) for ability in abilities]
        views.append(_selectivity(data, abilities))
    views.append(_members(data, abilities, size))
    return group(views, title=f"{abilities[0]} against {abilities[1]}")


def _parts(data: "xarray.Dataset") -> list[tuple[str, dict[str, int]]]:
    """Every part with its name and its place in the data."""
    kind = data.attrs["components"]
    layers = data["layer"].values.tolist()
    if kind not in ("head", "neuron"):
        return [(part_name(kind, n), {"layer": i}) for i, n in enumerate(layers)]
    return [
        (part_name(kind, n, unit), {"layer": i, kind: unit})
        for i, n in enumerate(layers)
        for unit in data[kind].values.tolist()
    ]


def _sentences(data: "xarray.Dataset", abilities: tuple[str, str]) -> list[str]:
    found = []
    for i, name in enumerate(abilities):
        other = abilities[1 - i]
        count = int((data["circuit"] == i).sum())
        if not count:
            found.append(f"No part serves {name} and not {other}: nothing to test.")
            continue
        mine, cross = (float(data["joint"][i, j]) for j in (i, 1 - i))
        text = (
            f"Without the {count if count > 1 else 'one'} part{'s' * (count > 1)} of {name},"
            f" held-out prompts of {name} lose {mine:+.2f} of the way"
            f" and those of {other} {cross:+.2f}"
        )
        if data.attrs["sets"][i]:
            random = [float(data["random"][i, j]) for j in (i, 1 - i)]
            text += f" (random sets of equal size: {random[0]:+.2f} and {random[1]:+.2f})"
        found.append(text + ".")
    if "found_by_chance" in data:
        seen = int((data["q"] <= data.attrs["alpha"]).sum())
        chance = float(data["found_by_chance"])
        found.append(
            f"{seen} neurons differ between the abilities (permuted labels: {chance:.1f})."
        )
    return found


def _table(data: "xarray.Dataset", abilities: tuple[str, str]) -> View:
    rows: list[list[Any]] = []
    for i, circuit in enumerate(abilities):
        for j, task in enumerate(abilities):

            def at(name: str, i: int = i, j: int = j) -> float:
                return float(data[name][i, j])

            rows.append([
                f"of {circuit}", task, at("joint"), at("joint_sem"), at("random"),
                at("random_high"), at("joint_p"), float(data["clean_accuracy"][j]), at("accuracy"),
                at("random_accuracy"),
            ])  # fmt: skip
    columns = [
        "parts ablated", "prompts of", {"name": "loss", "format": "+.2f"},
        {"name": "± over rows", "format": ".2f"}, {"name": "random sets", "format": "+.2f"},
        {"name": "their 95th percentile", "format": "+.2f"}, {"name": "p", "format": ".2f"},
        {"name": "accuracy before", "format": ".0%"}, {"name": "after", "format": ".0%"},
        {"name": "after random", "format": ".0%"},
    ]  # fmt: skip
    away, sets = data.attrs["away"], data.attrs["sets"]
    about = (
        "Loss: 0 = nothing lost, 1 = the whole way from the clean to the contrast run. On prompts"
        f" that had no part in the choice. Random sets ({sets[0]} and {sets[1]}): as many other"
        " parts from the same layers"
    )
    about += f"; {away[0]} and {away[1]} of each from other layers." if any(away) else "."
    return table(columns, rows, title="Circuits ablated as wholes, held-out prompts", about=about)


def _losses(data: "xarray.Dataset", ability: str) -> View:
    values = data["loss"].sel(task=ability)
    title = f"What {ability} loses without each part"
    limit = float(data["chance_limit"])
    about = (
        "1 = the whole way from the clean to the contrast run; positive: the part supports the"
        f" answer. Permuted labels: differences between the abilities up to {limit:.2f}."
    )
    rows = [str(n) for n in data["layer"].values]
    if values.ndim == 1:
        return bars(
            [f"layer {row}" for row in rows], values, unit="of the way", title=title, about=about
        )
    cols = [str(n) for n in data[data.attrs["components"]].values]
    return grid(
        values, rows=rows, cols=cols, row_name="layer", col_name=data.attrs["components"],
        unit="of the way", title=title, about=about,
    )  # fmt: skip


def _selectivity(data: "xarray.Dataset", abilities: tuple[str, str]) -> View:
    values, member = data["selectivity"], data["circuit"].values
    title = f"Selectivity: +1 {abilities[0]} only, -1 {abilities[1]} only"
    about = (
        "Outlined: the circuits. Where both losses are small the number is noise; see p in the"
        " table of parts."
    )
    rows = [str(n) for n in data["layer"].values]
    if values.ndim == 1:
        return bars([f"layer {r}" for r in rows], values, title=title, about=about, span=(-1, 1))
    cols = [str(n) for n in data[data.attrs["components"]].values]
    marks = [(int(r), int(c)) for r, c in zip(*(member >= 0).nonzero(), strict=True)]
    return grid(
        values, rows=rows, cols=cols, row_name="layer", col_name=data.attrs["components"],
        limit=1.0, marks=marks, title=title, about=about,
    )  # fmt: skip


def _members(data: "xarray.Dataset", abilities: tuple[str, str], size: int) -> View:
    """The parts of both circuits, then the largest others."""
    neurons = "difference" in data
    size_of = abs(data["t"]) if neurons else abs(data["loss"]).max("task")
    listed = sorted(
        _parts(data),
        key=lambda p: (int(data["circuit"].isel(p[1])) < 0, -float(size_of.isel(p[1]))),
    )[: max(_SHOWN, 2 * min(size, _SHOWN))]
    names = {0: abilities[0], 1: abilities[1], -1: ""}
    rows: list[list[Any]] = []
    for name, place in listed:
        one = data.isel(place)
        numbers = [float(one[n]) for n in (("difference", "t", "q") if neurons else ())]
        if not neurons:
            numbers = [*one["loss"].values.tolist(), float(one["selectivity"])]
            numbers += [float(one["p"]), float(one["p_all"])]
        rows.append([name, *numbers, names[int(one["circuit"])]])
    heads = ("difference", "t", "q") if neurons else (*abilities, "selectivity", "p", "p of all")
    columns: list[Any] = ["part"]
    signed = {"difference", "t", "selectivity", *abilities}
    columns += [{"name": n, "format": "+.3f" if n in signed else ".3f"} for n in heads]
    about = (
        "Mean activation in the first ability minus in the second; q: share of false finds."
        if neurons
        else "Loss in each ability, one part ablated. p: permuted ability labels, for the part"
        " alone and for the largest of all parts."
    )
    return table([*columns, "circuit of"], rows, title="Parts", about=about)
