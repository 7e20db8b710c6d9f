"""Activation patching: what a place holds, put into the other run, and the answer read again.

    denoise: run the contrast, write the clean activation: (patched - contrast) / (clean - contrast)
    noise:   run the clean prompt, write the contrast's:   (clean - patched) / (clean - contrast)

Denoising finds places that suffice to restore the answer, noising places that it needs; where a
model has backups the two disagree. Every number is the effect of a real forward with one edit, not
an estimate, and stands beside a control: at the same cells, changes of the same length in random
directions.

What this does not do: several places at once (effects do not add up), paths between places.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from underhood.core.errors import OutOfRange, PairError, UsageError
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.site import Site, parse_many
from underhood.core.sweep import rows_per_pass
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Metric, Pairs, metric_named, normalised
from underhood.methods.locate._patching import Asked, Cell, Found, patched
from underhood.methods.registry import method
from underhood.view import Result, View, bars, grid, group

if TYPE_CHECKING:
    import xarray

__all__ = ["activation_patching"]

_OTHER = "random directions of equal length"
_FLAT = 1e-6  # a distance between the two ends that is float noise, relative


@method
def activation_patching(
    model: Model,
    pairs: Pairs,
    *,
    sites: str | tuple[str, ...] = "resid_pre",
    direction: Literal["denoise", "noise"] = "denoise",
    metric: str = "logit_diff",
    positions: Literal["each", "all", "last"] = "each",
    value: Literal["resample", "mean", "zero"] = "resample",
    control: bool = True,
    draws: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """The exact effect of every layer and position, or of every head, on the answer.

    Args:
        pairs: Clean and contrast prompts. Without answers: the model's own top token after the
            clean prompt, against its top token after the contrast.
        sites: What to patch in every layer: "resid_pre", "attn_out", "mlp_out", ...; "z" takes
            heads one by one. Several sites need the same axes.
        direction: "denoise" writes the clean activation into the contrast run; "noise" the
            contrast's into the clean run.
        metric: A name of `underhood.data.METRICS`.
        positions: "each" position by itself, "all" at once, or the "last" only.
        value: What noising writes: the contrast run's activation ("resample"), its mean over all
            prompts and tokens except the first ("mean"), or zeros, which no run ever holds.
        control: Run the control as well.
        draws: Random directions per cell in the control; the strongest is shown.
        seed: Of these.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Over `layer`, then `head` for sites with heads, then `pos` for "each" (and first `site`,
        where there are several): `effect` (no unit; 1 is the whole way from contrast to clean,
        positive supports the answer), `sem` (its standard error over rows, NaN for one),
        `control` (of random directions, the strongest draw), `skipped` (nothing was run: both runs
        are equal there, the effect is exactly 0), `rows` (how many rows have the position), and
        with `batch` the metric itself, `patched`. Over `batch`: `clean`, `contrast`, in the
        metric's unit. Positions count from each row's own first token; the effect is the mean
        change over rows by the mean distance between the two ends over the same rows.

    Raises:
        PairError: Pairs that cannot be compared, or whose metric is the same at both ends.
        UsageError: Sites without layers or positions, of different axes, or named with a head.
        NotOffered: A site that this model lacks.

    Cost: 2 forwards to read, then one row per cell and pair, times 1 + draws with the control;
        cells where the two runs agree are not run (all before the first differing token). No
        backward.

    Source: Vig et al. 2020, "Causal mediation analysis"; Meng et al. 2022; names and pitfalls after
        Zhang & Nanda 2023, "Towards best practices of activation patching". Ours: cells with equal
        activations are found by comparing them; the control.

    Misleads: backup parts hide what noising removes, so a needed part may show nothing. Effects of
        single cells do not add up. One pair shows one pair: see `sem`. Zeros and means put the
        model where it never is.

    Example:
        >>> import underhood as uh
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = activation_patching(uh.load(), pair, control=False)
        >>> bool(found["effect"].sel(layer=0, pos=4) > 0.99)
        True
    """
    if direction == "denoise" and value != "resample":
        raise UsageError(
            "denoising writes what the clean run holds, and nothing else",
            given=f"direction='denoise', value={value!r}",
            do=f"ablate the clean run instead: direction='noise', value={value!r}",
        )
    for name, number in (("draws", draws), ("batch_size", batch_size or 1)):
        if number < 1:
            raise OutOfRange(f"{name} must be at least 1", given=number, do="leave it out")
    asked = Asked(
        _names(model, sites), direction, metric_named(metric), positions, value,
        draws if control else 0, seed, batch_size,
    )  # fmt: skip
    encoded, origin = _answered(model, pairs.encode(model), asked)
    found = patched(model, encoded, asked)
    data = _dataset(found, asked, _words(encoded, pairs))
    return Result(
        name="activation_patching",
        data=data,
        view=_view(data, asked),
        provenance=describe(
            model, sites=[str(s) for s in asked.names], direction=direction, metric=metric,
            positions=positions, value=value, draws=asked.draws, seed=seed, rows=len(pairs),
            answers=origin, how=found.how, passes=found.passes,
        ),
    )  # fmt: skip


def _names(model: Model, sites: str | tuple[str, ...]) -> tuple[Site, ...]:
    """The sites, checked: patchable in every layer, and of the same axes."""
    found = []
    for site in parse_many(sites):
        site = site if site.stack else replace(site, stack=model.main)
        kind = site.kind
        if site.unit is not None or not kind.layered or not kind.writable:
            raise UsageError(
                "this grid is over layers and, where there are any, heads",
                given=str(site),
                why=kind.about,
                do="name a layered site without a head, e.g. resid_pre, mlp_out or z",
            )
        if kind.axes[1] != "pos" or "slot" in kind.axes:
            raise UsageError(
                f"{site} has no vector per position that could be exchanged",
                given=f"{site}: axes {' '.join(kind.axes)}",
                do="patch z (what a pattern moves) or mlp_out (what the experts add)",
            )
        model.resolve(site)
        found.append(site)
    if len({site.kind.unit == "head" for site in found}) > 1:
        raise UsageError(
            "sites with heads and sites without do not fit into one grid",
            given=", ".join(map(str, found)),
            do="make two calls",
        )
    return tuple(dict.fromkeys(found))


def _answered(model: Model, encoded: EncodedPairs, asked: Asked) -> tuple[EncodedPairs, str]:
    """Missing answers filled in with what the model says; and where they come from."""
    answers, wrong = encoded.answers, encoded.wrong
    need = asked.metric.uses_answers and not answers.shape[1]
    need_wrong = asked.metric.uses_wrong and not wrong.shape[1]
    if not need and not need_wrong:
        return encoded, "as given"
    answers = _top(model, encoded.clean, asked) if need else answers
    wrong = _top(model, encoded.contrast, asked) if need_wrong else wrong
    same = (answers[:, :, None] == wrong[:, None, :]) & (answers >= 0)[:, :, None]
    if bool(same.any()):
        row = int(same.flatten(1).any(1).nonzero()[0])
        raise PairError(
            "the model says the same after the clean prompt and after the contrast",
            given=f"row {row}: {model.token_text(int(wrong[row, 0]))!r}",
            why="the pair came without answers, so the model's own were to be compared",
            do="give answers and wrong answers, or a contrast that changes what the model says",
        )
    return replace(encoded, answers=answers, wrong=wrong), "the model's own top tokens"


def _top(model: Model, tokens: Tokens, asked: Asked) -> Tensor:
    size = asked.batch_size or rows_per_pass(tokens.ids.shape[1])
    parts = [
        model.run(Tokens(tokens.ids[i : i + size], tokens.mask[i : i + size])).last_logits.argmax(
            -1
        )
        for i in range(0, len(tokens), size)
    ]
    return torch.cat(parts)[:, None]


# Numbers -----------------------------------------------------------------------------------------


def _effects(values: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Per cell the share of the way from `start` to `end`, and its standard error over rows."""
    here = ~values.isnan()
    rows = here.sum(1)
    moved = torch.where(here, values - start, 0.0)
    ways = torch.where(here, end - start, 0.0)
    way = ways.sum(1) / rows
    # Columns that only some rows reach may have no way to go, although all rows together have.
    size = torch.maximum(start.abs().max(), end.abs().max()).clamp(min=1.0)
    way = torch.where(way.abs() > _FLAT * size, way, torch.nan)
    effect = moved.sum(1) / rows / way + 0.0  # no minus before a zero
    rest = moved - effect[:, None] * ways  # of a ratio of two means
    sem = (rest.pow(2).sum(1) / (rows - 1) / rows).sqrt() / way.abs()
    return effect, sem


def _dataset(found: Found, asked: Asked, words: list[str]) -> "xarray.Dataset":
    import numpy as np
    import xarray

    ends = (found.contrast, found.clean)
    start, end = ends if asked.direction == "denoise" else ends[::-1]
    normalised(float(start.mean()), float(end.mean()), float(start.mean()))  # refuses a flat metric
    effect, sem = _effects(found.values, start, end)
    columns: dict[str, Tensor] = {
        "effect": effect, "sem": sem, "skipped": ~found.acted.any(1),
        "rows": (~found.values.isnan()).sum(1),
    }  # fmt: skip
    if len(found.control):
        chance = torch.stack([_effects(draw, start, end)[0] for draw in found.control])
        strongest = chance.abs().argmax(0)
        columns["control"] = chance.gather(0, strongest[None])[0]
    coords = _coords(found.cells, asked)
    sizes = [len(c) for c in coords.values()]
    index = [_index(cell, coords) for cell in found.cells]

    def spread(column: Tensor) -> Any:
        kind = column.numpy().dtype
        empty = np.zeros if kind.kind in "bi" else lambda s: np.full(s, np.nan)
        out = np.asarray(empty((*sizes, *column.shape[1:])), dtype=kind)
        for place, number in zip(index, column.numpy(), strict=True):
            out[place] = number
        return out

    dims = tuple(coords)
    variables: dict[str, Any] = {name: (dims, spread(c)) for name, c in columns.items()}
    variables["patched"] = ((*dims, "batch"), spread(found.values))
    variables |= {"clean": ("batch", found.clean.numpy())}
    variables |= {"contrast": ("batch", found.contrast.numpy())}
    more = {"token": ("pos", words)} if "pos" in coords else {}
    attrs = {"unit": asked.metric.unit, "metric": asked.metric.name, "direction": asked.direction}
    return xarray.Dataset(variables, coords={**coords, **more}, attrs=attrs)


def _coords(cells: list[Cell], asked: Asked) -> dict[str, list[Any]]:
    """Labels of the grid's axes, in order."""
    found: dict[str, list[Any]] = {}
    if len(asked.names) > 1:
        found["site"] = [str(name) for name in asked.names]
    found["layer"] = sorted({cell.site.layer for cell in cells if cell.site.layer is not None})
    if cells[0].site.unit is not None:
        found["head"] = sorted({c.site.unit for c in cells if c.site.unit is not None})
    if asked.positions == "each":
        found["pos"] = sorted({cell.pos for cell in cells if cell.pos is not None})
    return found


def _index(cell: Cell, coords: dict[str, list[Any]]) -> tuple[int, ...]:
    name = str(replace(cell.site, layer=None, unit=None))
    own = {"site": name, "layer": cell.site.layer, "head": cell.site.unit, "pos": cell.pos}
    return tuple(labels.index(own[axis]) for axis, labels in coords.items())


def _words(encoded: EncodedPairs, pairs: Pairs) -> list[str]:
    """One label per position: the token, or `clean→contrast` where the two prompts differ."""
    columns = encoded.clean.ids.shape[1]
    if pairs.position_labels is not None and len(pairs.position_labels) == columns:
        return list(pairs.position_labels)
    found: list[set[str]] = [set() for _ in range(columns)]
    for clean, contrast in zip(encoded.clean.strings, encoded.contrast.strings, strict=True):
        for pos, (a, b) in enumerate(zip(clean, contrast, strict=True)):
            found[pos].add(a if a == b else f"{a}→{b.strip()}")
    return [s.pop() if len(s) == 1 else str(pos) for pos, s in enumerate(found)]


# The view ----------------------------------------------------------------------------------------


def _view(data: "xarray.Dataset", asked: Asked) -> View:
    if "site" not in data.dims:
        return _one(data, str(asked.names[0]), asked)
    views = [_one(data.sel(site=name, drop=True), str(name), asked) for name in data["site"].values]
    return group(views, title="Activation patching")


def _one(data: "xarray.Dataset", name: str, asked: Asked) -> View:
    title = f"Activation patching: {name}, {asked.direction}"
    about = _about(data, asked)
    unit = "of the way"
    rows = [str(layer) for layer in data["layer"].values]
    chance = data.get("control")
    if len(data["effect"].dims) == 1:
        reach = None if chance is None else [(-abs(c), abs(c)) for c in chance.values.tolist()]
        return bars(
            [f"layer {row}" for row in rows], data["effect"], unit=unit, title=title, about=about,
            baseline=reach, baseline_name=_OTHER,
        )  # fmt: skip
    layout = _layout(data, asked)
    shape = (len(layout["rows"]), len(layout["cols"]))
    effect = data["effect"].values.reshape(shape)
    control = None
    if chance is not None:
        control = grid(
            chance.values.reshape(shape), **layout, unit=unit, title=f"Control: {_OTHER}",
            about=f"The strongest of {asked.draws} random changes in each cell.",
        )  # fmt: skip
    best = _strongest(effect)
    return grid(effect, **layout, unit=unit, title=title, about=about, control=control, marks=best)


def _layout(data: "xarray.Dataset", asked: Asked) -> dict[str, Any]:
    """Rows and columns of the grid with their names."""
    layers = [str(layer) for layer in data["layer"].values]
    if "pos" not in data.dims:
        heads = [str(head) for head in data["head"].values]
        return {"rows": layers, "cols": heads, "row_name": "layer", "col_name": "head"}
    words = [str(word) for word in data["token"].values]
    if "head" not in data.dims:
        return {"rows": layers, "cols": words, "row_name": "layer", "col_name": "pos"}
    rows = [f"{layer}.{head}" for layer in layers for head in data["head"].values]
    return {"rows": rows, "cols": words, "row_name": "head", "col_name": "pos"}


def _strongest(effect: Any) -> list[tuple[int, int]]:
    import numpy as np

    if not np.isfinite(effect).any():
        return []
    row, col = np.unravel_index(np.nanargmax(np.abs(effect)), effect.shape)
    return [(int(row), int(col))]


def _about(data: "xarray.Dataset", asked: Asked) -> str:
    """What 0 and 1 are, in the metric's own unit, and what was not run."""
    metric: Metric = asked.metric
    clean, contrast = float(data["clean"].mean()), float(data["contrast"].mean())
    ends = f"{metric.name}: clean {clean:+.3g}, contrast {contrast:+.3g} {metric.unit}"
    if asked.direction == "denoise":
        scale = "0 = the contrast run as it is, 1 = the clean run's answer restored"
    else:
        scale = "0 = the clean run as it is, 1 = its answer lost to the contrast's"
    parts = [f"{scale} ({ends})."]
    skipped, cells = int(data["skipped"].sum()), data["skipped"].size
    if skipped:
        parts.append(f"{skipped} of {cells} cells hold the same in both runs: exactly 0, not run.")
    known = data["rows"].values[data["effect"].notnull().values]
    if known.size and known.min() < data.sizes["batch"]:
        parts.append("Prompts differ in length; positions count from the first token.")
    return " ".join(parts)
