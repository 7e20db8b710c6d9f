"""Massive activations: a few scalars of the residual stream, thousands of times the usual size.

After each block the magnitudes `|h|` over (positions x dimensions) of one text are sorted: top 1 to
3, median, and `top 1 / median`. Two rules call a scalar massive: `|h| >= ratio * median` (free of
scale, for small models) and the published one, `|h| > 100` and `|h| > 1000 * median`. The control
is what the same number of independent normal values would give for `top 1 / median`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Plan
from underhood.core.errors import UsageError
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.methods.read._attention import batches, bos_of, id_rows, site
from underhood.methods.registry import method
from underhood.view import Result, View, group, lines, sentences, table

__all__ = ["gaussian_ratio", "massive_activations"]

PUBLISHED_SIZE, PUBLISHED_RATIO = 100.0, 1000.0
MOST = 1000  # scalars listed; the count is always exact
_MEDIAN_OF_NORMAL = 0.6744897501960817  # of |x|
_EULER = 0.5772156649015329


@dataclass(frozen=True, slots=True)
class _Giant:
    """One massive scalar."""

    layer: int
    prompt: int
    pos: int
    dim: int
    value: float
    median: float
    token: str
    opening: bool


@dataclass(slots=True)
class _Found:
    """Sums over prompts per layer, and the scalars found."""

    top: np.ndarray  # [layer, 3]
    median: np.ndarray
    ratio: np.ndarray
    rest: np.ndarray
    expected: float = 0.0
    giants: list[_Giant] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=int))


@method
def massive_activations(
    model: Model, prompts: list[str], *, ratio: float = 1000.0, edits: Plan | None = None
) -> Result:
    """Giant scalars of the residual stream: in which layers, dimensions, and on which tokens.

    Args:
        prompts: Texts; ten or more for stable means, and the same ones when models are compared.
        ratio: Multiple of the text's median magnitude in that layer from which on a scalar counts.
        edits: A plan in force while reading.

    Returns:
        Over `layer`, means over the texts: `top` (with `rank` 1 to 3) and `median` of the
        magnitudes, `ratio` = top 1 / median, and `ratio_rest`, the same without each text's first
        token (BOS, where the model has one). Control `expected_ratio`: for as many independent
        normal values. Over `node`, the strongest 1,000 scalars: `value` with `layer_of`, `prompt`,
        `pos`, `dim`, `token`, `opening` (the text's first token) and `published` (whether the
        published rule holds too). Attributes: `count` and `count_published`, `first_layer` (-1 if
        none), `dims`, `tokens`.

    Raises:
        NotOffered: The model has no residual stream, or an encoder and a decoder.
        UsageError: No prompts, or a ratio not above 1.

    Cost: one forward.

    Source: Sun et al. 2024 ("Massive Activations in Large Language Models") for the rule with 100
        and 1000; statistics per layer as in "Hidden Dynamics of Massive Activations" (2025). The
        rule free of scale is ours: small models rarely reach 100.

    Misleads: medians near zero (an untrained model with tiny weights) inflate ratios. Sizes are
        not effects: set the scalar to zero or its mean and see. Layers after the first share one
        stream, so one event is listed in every layer that it survives.

    Example:
        >>> import underhood as uh
        >>> result = uh.read.massive_activations(uh.load(), ["The capital of France is"])
        >>> result["top"].dims
        ('layer', 'rank')
    """
    if not ratio > 1:
        raise UsageError("the ratio exceeds 1", given=ratio, do="use e.g. 1000")
    rows = id_rows(model, prompts)
    streams = model.resolve(site(model, "resid_post"))
    layers = [s.layer for s in streams if s.layer is not None]
    size = len(layers)
    found = _Found(np.zeros((size, 3)), np.zeros(size), np.zeros(size), np.zeros(size))
    for chunk, tokens in batches(model, rows):
        run = model.run(tokens, record=streams, edits=edits)
        for row, i in enumerate(chunk):
            strings = tokens.strings[row] if tokens.strings else None
            for at, stream in enumerate(streams):
                h = run[stream][row, : len(rows[i])].detach().float().cpu()
                _add(found, h, (at, layers[at], i), ratio, strings)
                found.expected += gaussian_ratio(h.numel()) / len(streams)
    data = _dataset(found, layers, len(rows), opening_is_bos=_opens_with_bos(model, rows))
    facts = describe(model, prompts=len(prompts), ratio=ratio)
    return Result("massive_activations", data, _view(data, ratio), facts)


def gaussian_ratio(n: int) -> float:
    """Expected largest magnitude of `n` independent normal values over their median magnitude.

    Blom's mean of two quantiles for the expected maximum; within 2 percent from `n` = 30 on.
    """
    quantile = torch.special.ndtri(
        torch.tensor([1 - 1 / (2 * n), 1 - 1 / (2 * n * np.e)], dtype=torch.float64)
    )
    top = (1 - _EULER) * float(quantile[0]) + _EULER * float(quantile[1])
    return top / _MEDIAN_OF_NORMAL


def _opens_with_bos(model: Model, rows: list[list[int]]) -> bool:
    bos = bos_of(model)
    return bos is not None and all(row[0] == bos for row in rows)


def _add(
    found: _Found,
    h: Float[Tensor, "pos d_model"],
    place: tuple[int, int, int],
    ratio: float,
    strings: tuple[str, ...] | None,
) -> None:
    """Count one text in one layer; `place` is (row of the sums, layer, prompt)."""
    at, layer, prompt = place
    size = h.abs()
    flat = size.flatten()
    top = flat.topk(min(3, len(flat))).values.double().numpy()
    median = float(flat.median())
    found.top[at, : len(top)] += top
    found.median[at] += median
    found.ratio[at] += top[0] / median if median > 0 else np.nan
    rest = size[1:].flatten()
    middle = float(rest.median()) if len(rest) else 0.0
    found.rest[at] += float(rest.max()) / middle if middle > 0 else np.nan
    free = (size >= ratio * median) if median > 0 else torch.zeros_like(size, dtype=torch.bool)
    published = (size > PUBLISHED_SIZE) & (size > PUBLISHED_RATIO * median)
    found.counts += np.array([int(free.sum()), int(published.sum())])
    either = free | published
    for pos, dim in _strongest(size, either):
        token = strings[pos] if strings is not None else ""
        giant = _Giant(layer, prompt, pos, dim, float(h[pos, dim]), median, token, pos == 0)
        found.giants.append(giant)


def _strongest(size: Tensor, keep: Tensor) -> list[list[int]]:
    """(position, dimension) of the largest magnitudes among those to keep."""
    order = size[keep].argsort(descending=True)[:MOST]
    return keep.nonzero()[order].tolist()


def _dataset(found: _Found, layers: list[int], count: int, *, opening_is_bos: bool) -> Any:
    import xarray

    giants = sorted(found.giants, key=lambda g: -abs(g.value))[:MOST]
    values = {
        "top": (("layer", "rank"), found.top / count),
        "median": ("layer", found.median / count),
        "ratio": ("layer", found.ratio / count),
        "ratio_rest": ("layer", found.rest / count),
        "expected_ratio": ("layer", np.full(len(layers), found.expected / count)),
        "value": ("node", np.array([g.value for g in giants])),
        "value_over_median": (
            "node",
            np.array([abs(g.value) / g.median if g.median else np.nan for g in giants]),
        ),
    }
    coords = {
        "layer": layers, "rank": [1, 2, 3],
        "layer_of": ("node", np.array([g.layer for g in giants], dtype=int)),
        "prompt": ("node", np.array([g.prompt for g in giants], dtype=int)),
        "pos": ("node", np.array([g.pos for g in giants], dtype=int)),
        "dim": ("node", np.array([g.dim for g in giants], dtype=int)),
        "token": ("node", np.array([g.token for g in giants], dtype=str)),
        "opening": ("node", np.array([g.opening for g in giants], dtype=bool)),
        "published": ("node", np.array([_is_published(g) for g in giants], dtype=bool)),
    }  # fmt: skip
    attrs = {
        "count": int(found.counts[0]),
        "count_published": int(found.counts[1]),
        "first_layer": min((g.layer for g in found.giants), default=-1),
        "dims": sorted({g.dim for g in found.giants}),
        "tokens": sorted({g.token for g in found.giants}),
        "opening_is_bos": int(opening_is_bos),
    }
    return xarray.Dataset(values, coords=coords, attrs=attrs)


def _is_published(giant: _Giant) -> bool:
    return abs(giant.value) > max(PUBLISHED_SIZE, PUBLISHED_RATIO * giant.median)


def _view(data: Any, ratio: float) -> View:
    with np.errstate(divide="ignore"):
        tops = np.log10(data["top"].values)
        median = np.log10(data["median"].values)
    # The size that the largest scalar would have if the stream were normal with this median.
    normal = median + np.log10(data["expected_ratio"].values)
    series = {f"top {rank + 1}": tops[:, rank] for rank in range(3)}
    series |= {"median": median, "top 1 if normal": normal}
    curves = lines(
        data["layer"].values, series, x_name="layer", y_name="log10 |h|",
        title="Largest and median magnitude of the residual stream",
        about="Means over the texts. 'Top 1 if normal' is the control: the largest of as many"
        " independent normal values with the same median.",
    )  # fmt: skip
    views: list[View] = [sentences(_facts(data, ratio)), curves]
    if data.sizes["node"]:
        columns = [
            "layer", "token", "position", "dimension", {"name": "value", "format": "+,.1f"},
            {"name": "over the median", "format": ",.0f"}, "published rule", "prompt",
        ]  # fmt: skip
        names = ("layer_of", "token", "pos", "dim", "value", "value_over_median", "published")
        shown = min(data.sizes["node"], 50)
        rows = [[data[n].values[i].item() for n in (*names, "prompt")] for i in range(shown)]
        views.append(table(columns, rows, title="Massive scalars", about=f"The strongest {shown}."))
    return group(views, title="Massive activations")


def _facts(data: Any, ratio: float) -> list[str]:
    attrs, ratios = data.attrs, data["ratio"].values
    found = []
    if np.isfinite(ratios).any():
        peak = int(np.nanargmax(ratios))
        found.append(
            f"The largest scalar is at most {ratios[peak]:,.1f} times the median (after layer"
            f" {int(data['layer'].values[peak])}; {data['ratio_rest'].values[peak]:,.1f} without"
            f" the first token); as many normal values would give"
            f" {data['expected_ratio'].values[peak]:.1f}."
        )
    if not attrs["count"]:
        found.append(f"No scalar reaches {ratio:,g} times its layer's median.")
    else:
        dims = ", ".join(map(str, attrs["dims"][:8])) + (" ..." if len(attrs["dims"]) > 8 else "")
        tokens = ", ".join(map(repr, attrs["tokens"][:8]))
        opening = int(data["opening"].values.sum())
        first = "BOS" if attrs["opening_is_bos"] else "the first token"
        found.append(
            f"{attrs['count']} scalars reach {ratio:,g} times their layer's median, from layer"
            f" {attrs['first_layer']} on, in dimensions {dims}, on the tokens {tokens};"
            f" {opening} of the {data.sizes['node']} listed are on {first}."
        )
    found.append(
        f"By the published rule (over 100 and over 1,000 times the median):"
        f" {attrs['count_published']}."
    )
    return found
