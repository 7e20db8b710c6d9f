"""The view of `circuit_overlap`: sentences, the overlap between chance and ceiling, the matrix."""

from typing import TYPE_CHECKING, Any

import numpy as np

from underhood.view import View, bars, grid, group, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["overlap_view"]

_HEADS = 30
_DONE = 0.99  # accuracy from which on a repair has nothing to repair


def overlap_view(data: "xarray.Dataset") -> View:
    """Everything, claim and control side by side."""
    first, second = _tasks(data)
    views: list[View] = [
        sentences(_statements(data), title="Shared parts"),
        _overlap(data),
        _matrix(data),
        _use(data),
    ]
    if bool(data["rows"].any()):
        views.append(_repair(data))
    return group(views, title=f"Circuits of {first} and {second}")


def _tasks(data: "xarray.Dataset") -> tuple[str, str]:
    first, second = (str(name) for name in data["task"].values)
    return first, second


def _percent(share: Any) -> str:
    value = float(share)
    return "none" if value != value else f"{round(value, 2) + 0.0:.0%}"


# Sentences ---------------------------------------------------------------------------------------


def _statements(data: "xarray.Dataset") -> list[str]:
    parts = ["heads", "edges"] if int(data["total"].sel(part="heads")) else ["nodes", "edges"]
    found = [_shared(data, part) for part in parts]
    found += [_kept(data, row) for row in (0, 1)]
    ceiling = data["pearson_within"].values
    found.append(
        f"Edge scores of the two tasks correlate with r = {float(data['pearson']):+.2f} (one in"
        f" twenty permutations reaches {float(data['pearson_chance']):.2f}"
        + ("" if np.isnan(ceiling).any() else
           f"; two halves of one task's prompts {ceiling[0]:+.2f} and {ceiling[1]:+.2f}") + ")."
    )  # fmt: skip
    found += [_repair_said(data, row) for row in (0, 1)]
    return [*found, _judged(data)]


def _shared(data: "xarray.Dataset", part: str) -> str:
    first, second = _tasks(data)
    at = data.sel(part=part)
    size, recall = at["size"].values, at["recall"].values
    within = at["iou_within"].values
    either = int(size.sum()) - int(at["shared"])
    ceiling = (
        "" if np.isnan(within).any() else
        f"; two circuits of one task, from different prompts: {_percent(within[0])} and"
        f" {_percent(within[1])}"
    )  # fmt: skip
    return (
        f"{first} and {second} share {int(at['shared'])} of the {either} {part} in either circuit"
        f" ({_percent(at['iou'])}; random circuits of the same sizes:"
        f" {_percent(at['iou_random'].mean())}{ceiling}): {_percent(recall[0])} of {first}'s"
        f" {int(size[0])} and {_percent(recall[1])} of {second}'s {int(size[1])}"
        f" (hypergeometric p = {float(at['p']):.2g})."
    )


def _kept(data: "xarray.Dataset", row: int) -> str:
    names = _tasks(data)
    f, chance = data["f"].values[row], data["f_random"].values[row]
    return (
        f"The circuit of {names[row]} keeps {_percent(f[row])} of {names[row]} and"
        f" {_percent(f[1 - row])} of {names[1 - row]}; random circuits of its size"
        f" {_percent(chance[row].mean())} and {_percent(chance[1 - row].mean())}."
    )


def _repair_said(data: "xarray.Dataset", row: int) -> str:
    names = _tasks(data)
    at = data.isel(task=row)
    heads = [str(n) for n in data["node"].values[at["pushed"].values]]
    if not heads:
        return (
            f"{names[row]} under-uses no head of {names[1 - row]}'s circuit: no repair was tried."
        )
    listed = ", ".join(heads)
    if not int(at["rows"]):
        return (
            f"No prompt of {names[row]} holds the words that {listed} would be made to look at: no"
            ' repair was tried (push="scale" needs none).'
        )
    how = {
        "wrong": "made to look at the wrong options", "answer": "made to look at the answer",
        "scale": "made stronger",
    }[data.attrs["push"]]  # fmt: skip
    random, metric = at["random_after"].values, data.attrs["metric"]
    text = (
        f"Repair: with {listed} {how}, {names[row]} goes from {float(at['before']):+.2f} to"
        f" {float(at['after']):+.2f} in {metric} and from {_percent(at['accuracy'])} to"
        f" {_percent(at['accuracy_after'])} in accuracy"
    )
    drawn = int((~np.isnan(random)).sum())
    if not drawn:
        return f"{text} (no other heads to compare with)."
    high = float(np.nanmax(random))
    text += (
        f" ({drawn} random sets of heads: {float(np.nanmean(random)):+.2f}, at most {high:+.2f},"
        f" and {_percent(np.nanmean(at['random_accuracy'].values))})"
    )
    if float(at["after"]) > max(high, float(at["before"])):
        return f"{text}: it helps."
    full = float(at["accuracy"]) > _DONE
    return f"{text}: {'there was nothing to gain' if full else 'no more than chance'}."


def _judged(data: "xarray.Dataset") -> str:
    first, second = data.attrs["prompts"]
    if all(data.attrs["apart"]):
        return f"Judged on {first} and {second} prompts that took no part in choosing the circuits."
    return "Chosen and judged on the same prompts where a task has fewer than four of them."


# Pictures ----------------------------------------------------------------------------------------


def _overlap(data: "xarray.Dataset") -> View:
    first, second = _tasks(data)
    parts = [str(p) for p in data["part"].values]
    rows: list[list[Any]] = []
    for part in parts:
        at = data.sel(part=part)
        size, recall, within = at["size"].values, at["recall"].values, at["iou_within"].values
        rows.append([
            part, int(size[0]), int(size[1]), int(at["shared"]), float(at["iou"]),
            float(at["iou_random"].mean()), float(at["iou_random"].max()), float(within[0]),
            float(within[1]), float(recall[0]), float(recall[1]), float(at["smaller"]),
            float(at["p"]),
        ])  # fmt: skip
    share = {"format": ".0%"}
    columns: list[Any] = [
        "part", first, second, "shared", {"name": "of either (IoU)", **share},
        {"name": "random circuits", **share}, {"name": "their most", **share},
        {"name": f"{first} twice", **share}, {"name": f"{second} twice", **share},
        {"name": f"of {first}", **share}, {"name": f"of {second}", **share},
        {"name": "of the smaller", **share}, {"name": "p", "format": ".2e"},
    ]  # fmt: skip
    return table(
        columns, rows, title="What the circuits share",
        about="Random circuits: connected ones of the same sizes. Twice: two circuits of one task"
        " from different halves of its prompts, the most that can be hoped for.",
    )  # fmt: skip


def _matrix(data: "xarray.Dataset") -> View:
    names = _tasks(data)
    labels = {"rows": [f"of {n}" for n in names], "cols": names,
              "row_name": "circuit", "col_name": "task", "limit": 1.0}  # fmt: skip
    control = grid(
        data["f_random"].mean("draw").values, **labels,
        title=f"Control: {data.sizes['draw']} random circuits of the same sizes",
    )  # fmt: skip
    return grid(
        data["f"].values, **labels, title="What each circuit keeps of each task", control=control,
        about="1: as the whole model; 0: as with every edge cut.",
    )  # fmt: skip


def _use(data: "xarray.Dataset") -> View:
    """Heads by their part in both tasks."""
    first, second = _tasks(data)
    use = data["use"].values
    order = [i for i in np.argsort(-use.max(0), kind="stable")[:_HEADS] if use[:, i].max() > 0]
    rows = [
        [str(data["node"].values[i]), float(use[0, i]), float(use[1, i]),
         bool(data["pushed"].values[0, i]), bool(data["pushed"].values[1, i])]
        for i in order
    ]  # fmt: skip
    share = {"format": ".1%"}
    columns: list[Any] = [
        "head", {"name": first, **share}, {"name": second, **share},
        f"pushed in {first}", f"pushed in {second}",
    ]  # fmt: skip
    return table(
        columns, rows, title=f"Heads by their share of the work ({len(rows)} largest)",
        about="Sizes of the sums of their edges' scores, all heads together 100%.",
    )  # fmt: skip


def _repair(data: "xarray.Dataset") -> View:
    views: list[View] = []
    for row, name in enumerate(_tasks(data)):
        at = data.isel(task=row)
        if not int(at["rows"]):
            continue
        random, before = at["random_after"].values, (float(at["before"]),) * 2
        none = bool(np.isnan(random).all())
        span = (None, None) if none else (float(np.nanmin(random)), float(np.nanmax(random)))
        views.append(
            bars(
                ["as it is", "heads pushed"],
                [float(at["before"]), float(at["after"])],
                unit=data.attrs["unit"],
                baseline=[before, span],
                baseline_name="random heads of the same layers",
                title=f"Repair of {name}",
                about=_about(at),
            )  # fmt: skip
        )
    return group(views, title="Repair")


def _about(at: "xarray.Dataset") -> str:
    text = (
        f"Accuracy {_percent(at['accuracy'])} before, {_percent(at['accuracy_after'])} after, on"
        f" {int(at['rows'])} prompt{'s' * (int(at['rows']) != 1)}."
    )
    if float(at["movers"]) == float(at["movers"]):
        random = at["random_movers"].values
        chance = "" if np.isnan(random).all() else f" (random heads: {np.nanmean(random):.2f})"
        text += (
            f" Later heads that both circuits have attend {float(at['movers']):.2f} to the answer"
            f" before, {float(at['movers_after']):.2f} after{chance}."
        )
    return text
