"""The numbers of a grid of cells as a dataset: effects, their errors, and the axes.

Shared by what fills such a grid exactly (`activation_patching`) and by what estimates it
(`attribution_patching` and its kin), so that their numbers can be compared cell by cell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.errors import PairError
from underhood.core.model import Model
from underhood.core.sweep import rows_per_pass
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Metric, Pairs, normalised
from underhood.methods.locate._asked import Asked, Found
from underhood.methods.locate._places import Cell

if TYPE_CHECKING:
    import xarray

__all__ = ["answered", "columns_of", "dataset", "effects", "labels_of", "unit_axis", "words"]

_FLAT = 1e-6  # a distance between the two ends that is float noise, relative


def answered(
    model: Model, encoded: EncodedPairs, metric: Metric, batch_size: int | None
) -> tuple[EncodedPairs, str]:
    """Missing answers filled in with what the model says; and where they come from.

    Raises:
        PairError: The model says the same after both prompts.
    """
    answers, wrong = encoded.answers, encoded.wrong
    need = metric.uses_answers and not answers.shape[1]
    need_wrong = metric.uses_wrong and not wrong.shape[1]
    if not need and not need_wrong:
        return encoded, "as given"
    answers = _top(model, encoded.clean, batch_size) if need else answers
    wrong = _top(model, encoded.contrast, batch_size) if need_wrong else wrong
    same = (answers[:, :, None] == wrong[:, None, :]) & (answers >= 0)[:, :, None]
    if bool(same.any()):
        row = int(same.flatten(1).any(1).nonzero()[0])
        raise PairError(
            "the model says the same after both prompts",
            given=f"row {row}: {model.token_text(int(wrong[row, 0]))!r}",
            why="the pair came without answers, so the model's own were to be compared",
            do="give answers and wrong answers, or a contrast that changes what the model says",
        )
    return replace(encoded, answers=answers, wrong=wrong), "the model's own top tokens"


def _top(model: Model, tokens: Tokens, batch_size: int | None) -> Tensor:
    size = batch_size or rows_per_pass(tokens.ids.shape[1])
    parts = [model.run(tokens.rows(b)).last_logits.argmax(-1) for b in tokens.blocks(size)]
    return torch.cat(parts)[:, None]


def effects(
    values: Float[Tensor, "cell batch"],
    start: Float[Tensor, " batch"],
    end: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, " cell"], Float[Tensor, " cell"]]:
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


def columns_of(found: Found[Cell], asked: Asked) -> dict[str, Tensor]:
    """`effect`, `sem`, `raw`, `skipped`, `rows`, and `control` where it was run; one per cell.

    Raises:
        PairError: The metric is the same at both ends.
    """
    ends = (found.contrast, found.clean)
    start, end = ends if asked.denoises else ends[::-1]
    normalised(float(start.mean()), float(end.mean()), float(start.mean()))  # refuses a flat metric
    effect, sem = effects(found.values, start, end)
    rows = (~found.values.isnan()).sum(1)
    raw = asked.sign * (found.values - start).nan_to_num().sum(1) / rows + 0.0
    columns = {
        "effect": effect, "sem": sem, "raw": raw, "skipped": ~found.acted.any(1), "rows": rows,
    }  # fmt: skip
    if len(found.control):
        chance = torch.stack([effects(draw, start, end)[0] for draw in found.control])
        strongest = chance.abs().argmax(0)
        columns["control"] = chance.gather(0, strongest[None])[0]
    return columns


def dataset(
    found: Found[Cell],
    asked: Asked,
    columns: Mapping[str, Tensor],
    words: Sequence[str],
    scalars: Mapping[str, float] | None = None,
) -> "xarray.Dataset":
    """The grid with named axes.

    Args:
        found: Its cells and both ends.
        asked: What it is made of.
        columns: Variables, `[cell]` or `[cell, batch]`.
        words: One label per position.
        scalars: Numbers without axes.
    """
    import numpy as np
    import xarray

    coords = _coords(found.cells, asked)
    sizes = [len(c) for c in coords.values()]
    index = tuple(zip(*(_index(cell, coords) for cell in found.cells), strict=True))

    def spread(column: Tensor) -> Any:
        values = column.numpy()
        empty = np.zeros if values.dtype.kind in "bi" else lambda s: np.full(s, np.nan)
        out = np.asarray(empty((*sizes, *column.shape[1:])), dtype=values.dtype)
        out[tuple(map(list, index)) or ...] = values if index else values[0]
        return out

    dims = tuple(coords)
    variables: dict[str, Any] = {
        name: ((*dims, *("batch",) * (column.ndim - 1)), spread(column))
        for name, column in columns.items()
    }
    variables |= {"clean": ("batch", found.clean.numpy())}
    variables |= {"contrast": ("batch", found.contrast.numpy())}
    variables |= {name: ((), value) for name, value in (scalars or {}).items()}
    more = {"token": ("pos", [words[p] for p in coords["pos"]])} if "pos" in coords else {}
    attrs = {"unit": asked.metric.unit, "metric": asked.metric.name, "direction": asked.direction}
    return xarray.Dataset(variables, coords={**coords, **more}, attrs=attrs)


def unit_axis(cells: Sequence[Cell]) -> str | None:
    """The axis that a grid's units lie on ("head", "neuron", ...), if they are cells."""
    return cells[0].site.kind.unit if cells and cells[0].site.unit is not None else None


def _coords(cells: Sequence[Cell], asked: Asked) -> dict[str, list[Any]]:
    """Labels of the grid's axes, in order."""
    found: dict[str, list[Any]] = {}
    if len(asked.names) > 1:
        found["site"] = [str(name) for name in asked.names]
    found["layer"] = sorted({cell.site.layer for cell in cells if cell.site.layer is not None})
    if (axis := unit_axis(cells)) is not None:
        found[axis] = sorted({c.site.unit for c in cells if c.site.unit is not None})
    if asked.positions not in ("all", "last"):
        found["pos"] = sorted({cell.pos for cell in cells if cell.pos is not None})
    return found


def _index(cell: Cell, coords: Mapping[str, list[Any]]) -> tuple[int, ...]:
    name = str(replace(cell.site, layer=None, unit=None))
    own = {"site": name, "layer": cell.site.layer, "pos": cell.pos}
    return tuple(labels.index(own.get(axis, cell.site.unit)) for axis, labels in coords.items())


def words(encoded: EncodedPairs, pairs: Pairs) -> list[str]:
    """One label per position: the token, or `clean→contrast` where the two prompts differ."""
    columns = encoded.clean.ids.shape[1]
    if pairs.position_labels is not None and len(pairs.position_labels) == columns:
        return list(pairs.position_labels)
    found: list[set[str]] = [set() for _ in range(columns)]
    for clean, contrast in zip(encoded.clean.strings, encoded.contrast.strings, strict=True):
        for pos, (a, b) in enumerate(zip(clean, contrast, strict=True)):
            found[pos].add(a if a == b else f"{a}→{b.strip()}")
    return [s.pop() if len(s) == 1 else str(pos) for pos, s in enumerate(found)]


def labels_of(cells: Sequence[Cell], words: Sequence[str]) -> list[str]:
    """What to call each cell in a table: its site, and its token where it has one."""
    found = []
    for site, pos in cells:
        spot = "" if pos is None else f" at {'the last token' if pos < 0 else repr(words[pos])}"
        found.append(f"{site}{spot}" + (f" ({pos})" if pos is not None and pos >= 0 else ""))
    return found
