"""Path patching: what one part tells another, and what the answer makes of it.

A sender's activation is exchanged for that of the other run; the change travels to the receivers'
inputs along the chosen paths, everything else stays as it was; these inputs, and nothing else, are
then written into the base run:

    effect = (base - patched) / (base - other)          noise: base = clean, other = contrast

    paths        attention heads between    MLPs between
    direct       held                       held           the residual stream alone
    mlps         held                       free           Wang et al. 2022
    all          free                       free           all ways to the receiver

What this does not do: several senders at once (effects do not add up); choose receivers by itself.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from underhood.core.errors import OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.provenance import describe
from underhood.core.site import Site, parse_many
from underhood.data import Pairs, metric_named, normalised
from underhood.methods.locate._asked import Found
from underhood.methods.locate._grids import answered, effects, words
from underhood.methods.locate._options import at_least
from underhood.methods.locate._paths import Asked, Cell, Node
from underhood.methods.locate._paths import paths as measured
from underhood.methods.registry import method
from underhood.view import Result, View, bars, grid

if TYPE_CHECKING:
    import xarray

__all__ = ["path_patching"]

_SENDERS = ("embed", "z", "mlp_out")
_RECEIVERS = ("q", "k", "v", "mlp_in", "logits")
_OTHER = "random directions of equal length"
_PROBABILITY = "probability"


@method
def path_patching(
    model: Model,
    pairs: Pairs,
    *,
    receivers: str | tuple[str, ...] = "logits",
    senders: str | tuple[str, ...] = (),
    paths: Literal["direct", "mlps", "all"] = "direct",
    direction: Literal["noise", "denoise"] = "noise",
    metric: str = "logit_diff",
    positions: Literal["all", "each", "last"] = "all",
    receiver_pos: int | None = None,
    arrival: Literal["exact", "linear"] = "exact",
    score: Literal["normalised", "raw", "relative"] = "normalised",
    control: bool = True,
    draws: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """What every head and MLP tells chosen receivers, and the effect of that on the answer.

    Args:
        pairs: Clean and contrast prompts. Without answers: the model's own top tokens.
        receivers: "logits", or inputs of parts: "q.2.1", "k.2.0", "v.2.0" (numbers of k and v count
            key/value heads), "q.2" (all heads of a layer), "mlp_in.3". Several are written at once.
        senders: "z.1.2" (a head), "z.1" (each head of a layer), "z" (each head), "mlp_out.0",
            "mlp_out", "embed". Empty: all of them.
        paths: What a change may pass between sender and receiver. "direct": only the residual
            stream, heads and MLPs hold the base run's values; "mlps": MLPs are free, heads held
            (Wang et al. 2022); "all": nothing is held.
        direction: "noise" carries the contrast's activations into the clean run; "denoise" the
            clean run's into the contrast.
        metric: A name of `underhood.data.METRICS`.
        positions: Where the sender is exchanged: "all" positions at once, "each" by itself, or the
            "last".
        receiver_pos: Where the receivers are written, counted from a prompt's first token, -1 the
            last; None: at all positions.
        arrival: "exact" runs the model; "linear" holds the denominator of the norm in front of the
            receiver (direct paths only): the closed form, a check on how much the norm matters.
        score: What the view shows; all are in the data.
        control: Run the control as well.
        draws: Random directions per sender in the control; the strongest is shown.
        seed: Of these.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Over `node` (named as in circuits: `input`, `a1.h2`, `m1`), then `pos` for "each":
        `effect` (no unit; 1 is the whole way from clean to contrast, positive supports the answer),
        `sem` (its standard error over rows, NaN for one), `raw` (metric lost by the change; for
        "denoise" gained), with `metric="prob"` also `relative` (raw by the base run's probability),
        `control` (`effect` of random directions, the strongest draw), `skipped` (nothing arrives:
        exactly 0), `upstream` (whether the sender comes before a receiver), and with `batch` the
        metric itself, `patched`. Coordinates `site`, `layer`, `head`. Over `batch`: `clean`,
        `contrast`.

    Raises:
        PairError: Pairs that cannot be compared, or whose metric is the same at both ends.
        UsageError: Other senders or receivers; none of the senders before a receiver; a linear
            arrival by other than direct paths; a relative score of another metric than "prob".
        NotOffered: A site that this model lacks; a linear arrival where a norm stands behind heads.

    Cost: 2 forwards to read, then 2 rows (1 where the receiver is the logits) per sender, position
        and pair, times 1 + draws with the control; senders that change nothing, or come after every
        receiver, are not run. The second row starts at the receiver where rows can share. No
        backward.

    Source: Wang et al. 2022, "Interpretability in the wild" (the passes, `paths="mlps"`);
        Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching". `relative` is
        the score of Prakash et al. 2024 (entity tracking) with its sign turned. Ours: the control;
        means over rows before dividing.

    Misleads: a path that carries nothing in one pair of prompts may carry much in another. With
        "all", a sender's effect holds that of everything it passes through. Held parts stand where
        the two runs together never put them. k and v receivers of grouped attention serve several
        query heads. Heads that back each other up show nothing when exchanged one by one.

    Example:
        >>> import underhood as uh
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = path_patching(uh.load(), pair, control=False)
        >>> [str(name) for name in found["node"].values[:3]]
        ['input', 'a0.h0', 'a0.h1']
    """
    _check(paths, arrival, score, metric, draws, batch_size)
    ends = _receivers(model, receivers)
    asked = Asked(
        _senders(model, senders, ends), ends, paths, arrival, direction, metric_named(metric),
        positions, receiver_pos, draws if control else 0, seed, batch_size,
    )  # fmt: skip
    encoded, origin = answered(model, pairs.encode(model), asked.metric, batch_size)
    _check_place(encoded.clean.lengths, receiver_pos)
    found = measured(model, encoded, asked)
    data = _dataset(found, asked, words(encoded, pairs))
    return Result(
        name="path_patching",
        data=data,
        view=_view(data, asked, score),
        provenance=describe(
            model, receivers=[str(r.site) for r in ends], senders=[s.name for s in asked.senders],
            paths=paths, direction=direction, metric=metric, positions=positions,
            receiver_pos=receiver_pos, arrival=arrival, draws=asked.draws, seed=seed,
            rows=len(pairs), answers=origin, how=found.how, passes=found.passes,
        ),
    )  # fmt: skip


def _check(
    paths: str, arrival: str, score: str, metric: str, draws: int, batch_size: int | None
) -> None:
    at_least(1, draws=draws, batch_size=batch_size)
    if arrival == "linear" and paths != "direct":
        raise UsageError(
            "only the residual stream is a straight line",
            given=f"arrival='linear', paths={paths!r}",
            do="paths='direct', or arrival='exact'",
        )
    if score == "relative" and metric_named(metric).unit != _PROBABILITY:
        raise UsageError(
            "a relative score divides by a probability",
            given=f"metric={metric!r}",
            why="a difference of logits may be zero or negative",
            do="metric='prob'",
        )


def _check_place(lengths: list[int], pos: int | None) -> None:
    shortest = min(lengths)
    if pos is not None and not -shortest <= pos < shortest:
        raise OutOfRange(
            f"there is no position {pos} in every prompt",
            given=f"receiver_pos={pos}, prompts of {shortest} tokens and more",
            do=f"use 0 to {shortest - 1}, or -1 for the last token",
        )


# Senders and receivers ---------------------------------------------------------------------------


def _order(model: Model, site: Site) -> int:
    """When a site is written or read: heads of layer l at 2l + 1, its MLP after them or beside."""
    if site.layer is None:
        return 0 if site.name == "embed" else 2 * model.n_layers + 1
    block = model.anatomy.stacks[site.stack].blocks[site.layer]
    late = site.name in ("mlp_out", "mlp_in") and not block.parallel
    return 2 * site.layer + (2 if late else 1)


def _named(model: Model, given: str | tuple[str, ...], known: tuple[str, ...]) -> list[Site]:
    """Concrete sites, all of them of the known names."""
    found: list[Site] = []
    for site in parse_many(given):
        if site.name not in known or (site.unit is not None and site.kind.unit != "head"):
            what = "send" if known == _SENDERS else "receive"
            raise UsageError(
                f"{site} does not {what} along a path",
                given=str(site),
                do=f"name one of {', '.join(known)}, with a layer and a head where it has them",
            )
        stack = "" if site.name == "logits" else site.stack or model.main
        found += model.resolve(replace(site, stack=stack))
    return list(dict.fromkeys(found))


def _receivers(model: Model, given: str | tuple[str, ...]) -> tuple[Node, ...]:
    sites = _named(model, given, _RECEIVERS)
    if len(sites) > 1 and any(site.name == "logits" for site in sites):
        raise UsageError(
            "the logits stand alone as a receiver",
            given=", ".join(map(str, sites)),
            why="what reaches them directly is the answer itself, and is written nowhere",
            do="make two calls",
        )
    return tuple(Node(site, _receiver_name(site), _order(model, site)) for site in sites)


def _receiver_name(site: Site) -> str:
    if site.name == "logits":
        return "logits"
    assert site.layer is not None
    if site.name == "mlp_in":
        return part_name("mlp", site.layer)
    head = "*" if site.unit is None else site.unit
    return f"{part_name('attention', site.layer)}.h{head}<{site.name}>"


def _sender_name(site: Site) -> str:
    if site.layer is None:
        return "input"
    return part_name("head" if site.name == "z" else "mlp", site.layer, site.unit)


def _senders(
    model: Model, given: str | tuple[str, ...], ends: tuple[Node, ...]
) -> tuple[Node, ...]:
    wanted = given or tuple(name for name in _SENDERS if model.offers(_main(model, name)))
    nodes: list[Node] = []
    for site in _named(model, wanted, _SENDERS):
        order = _order(model, site)
        if site.name == "z":
            units = [site.unit] if site.unit is not None else range(model.size(site, "head") or 0)
            mine = [replace(site, unit=unit) for unit in units]
        else:
            mine = [site]
        nodes += [Node(one, _sender_name(one), order) for one in mine]
    nodes.sort(key=lambda node: (node.order, node.site.name != "z", node.site.unit or 0))
    if not any(node.order < end.order for node in nodes for end in ends):
        raise UsageError(
            "no sender comes before a receiver, so there is no path",
            given=f"senders {', '.join(n.name for n in nodes[:8])};"
            f" receivers {', '.join(e.name for e in ends)}",
            why="a part reads what earlier layers wrote; an MLP also its own layer's heads,"
            " where they do not run side by side",
            do="name earlier senders, or later receivers",
        )
    return tuple(nodes)


def _main(model: Model, name: str) -> Site:
    return Site(name, stack=model.main)


# Numbers -----------------------------------------------------------------------------------------


def _dataset(found: Found[Cell], asked: Asked, tokens: list[str]) -> "xarray.Dataset":
    import xarray

    start, end = (found.clean, found.contrast)[:: 1 if asked.direction == "noise" else -1]
    normalised(float(start.mean()), float(end.mean()), float(start.mean()))  # refuses a flat metric
    effect, sem = effects(found.values, start, end)
    here = ~found.values.isnan()
    rows = here.sum(1)
    sign = 1.0 if asked.direction == "noise" else -1.0
    raw = sign * torch.where(here, start - found.values, 0.0).sum(1) / rows + 0.0
    columns = {"effect": effect, "sem": sem, "raw": raw, "skipped": ~found.acted.any(1)}
    if asked.metric.name == "prob":
        columns["relative"] = raw / (torch.where(here, start, 0.0).sum(1) / rows)
    if len(found.control):
        chance = torch.stack([effects(draw, start, end)[0] for draw in found.control])
        columns["control"] = chance.gather(0, chance.abs().argmax(0)[None])[0]
    each = asked.positions == "each"
    shape = (len(asked.senders), -1) if each else (len(asked.senders),)
    dims = ("node", "pos") if each else ("node",)
    variables: dict[str, Any] = {
        name: (dims, column.reshape(shape).numpy()) for name, column in columns.items()
    }
    variables["patched"] = ((*dims, "batch"), found.values.reshape(*shape, len(start)).numpy())
    variables["upstream"] = ("node", [asked.upstream(s) for s in asked.senders])
    variables |= {"clean": ("batch", found.clean.numpy())}
    variables |= {"contrast": ("batch", found.contrast.numpy())}
    sites = [s.site for s in asked.senders]
    coords: dict[str, Any] = {
        "node": [s.name for s in asked.senders],
        "site": ("node", [str(site) for site in sites]),
        "layer": ("node", [-1 if site.layer is None else site.layer for site in sites]),
        "head": ("node", [-1 if site.unit is None else site.unit for site in sites]),
    }
    if each:
        coords |= {"pos": list(range(len(tokens))), "token": ("pos", tokens)}
    attrs = {
        "unit": asked.metric.unit, "metric": asked.metric.name, "direction": asked.direction,
        "paths": asked.paths, "receivers": ", ".join(r.name for r in asked.receivers),
    }  # fmt: skip
    return xarray.Dataset(variables, coords=coords, attrs=attrs)


# The view ----------------------------------------------------------------------------------------

_SHOWN = {"normalised": "effect", "raw": "raw", "relative": "relative"}


def _view(data: "xarray.Dataset", asked: Asked, score: str) -> View:
    import numpy as np

    unit = {"normalised": "of the way", "raw": asked.metric.unit, "relative": "of the probability"}
    names = [_SHOWN[score], *(["control"] if "control" in data and score == "normalised" else [])]
    title = f"Path patching: to {', '.join(r.name for r in asked.receivers)}, {asked.paths}"
    common: dict[str, Any] = {"unit": unit[score], "title": title, "about": _about(data, asked)}
    nodes = [str(name) for name in data["node"].values]
    if "pos" in data.dims:
        layout = {
            "rows": nodes, "cols": [str(w) for w in data["token"].values],
            "row_name": "sender", "col_name": "pos",
        }  # fmt: skip
        tables = [data[name].values for name in names]
    elif any(asked.senders[i].site.unit is not None for i in range(len(nodes))):
        layout, place = _layout(asked)
        tables = []
        for name in names:
            table = np.full((len(layout["rows"]), len(layout["cols"])), np.nan)
            for spot, value in zip(place, data[name].values, strict=True):
                table[spot] = value
            tables.append(table)
    else:
        chance = [(-abs(c), abs(c)) for c in data[names[1]].values] if len(names) > 1 else None
        return bars(nodes, data[names[0]], baseline=chance, baseline_name=_OTHER, **common)
    control = None
    if len(tables) > 1:
        about = f"The strongest of {asked.draws} random changes of each sender."
        control = grid(
            tables[1], **layout, unit=unit[score], title=f"Control: {_OTHER}", about=about
        )
    best = np.unravel_index(np.nanargmax(np.abs(tables[0])), tables[0].shape)
    marks = [(int(best[0]), int(best[1]))]
    return grid(tables[0], **layout, control=control, marks=marks, **common)


def _layout(asked: Asked) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """A grid of layers by heads, MLP and input; and each sender's place in it."""
    sites = [sender.site for sender in asked.senders]
    layers = sorted({s.layer for s in sites if s.layer is not None})
    heads = sorted({s.unit for s in sites if s.unit is not None})
    rest = [n for n in ("mlp_out", "embed") if any(s.name == n for s in sites)]
    cols = [*map(str, heads), *({"mlp_out": "MLP", "embed": "input"}[n] for n in rest)]
    place = []
    for site in sites:
        row = 0 if site.layer is None else layers.index(site.layer)
        unit = site.unit
        place.append((row, heads.index(unit) if unit is not None else
                      len(heads) + rest.index(site.name)))  # fmt: skip
    layout = {"rows": [str(n) for n in layers], "cols": cols, "row_name": "layer"}
    return layout | {"col_name": "head"}, place


def _about(data: "xarray.Dataset", asked: Asked) -> str:
    """What 0 and 1 are, in the metric's own unit, what is held, and what was not run."""
    clean, contrast = float(data["clean"].mean()), float(data["contrast"].mean())
    ends = f"{asked.metric.name}: clean {clean:+.3g}, contrast {contrast:+.3g} {asked.metric.unit}"
    if asked.direction == "noise":
        scale = "0 = the clean run as it is, 1 = its answer lost to the contrast's"
    else:
        scale = "0 = the contrast run as it is, 1 = the clean run's answer restored"
    held = {
        "direct": "Heads and MLPs between are held.",
        "mlps": "Heads between are held, MLPs are free.",
        "all": "Nothing between is held.",
    }
    parts = [f"{scale} ({ends}). {held[asked.paths]}"]
    after = int((~data["upstream"]).sum())
    if after:
        parts.append(f"{after} of {data.sizes['node']} senders come after every receiver: 0.")
    if asked.arrival == "linear":
        parts.append("The norm before the receiver keeps its denominator (closed form).")
    return " ".join(parts)
