"""What a search for subspaces is asked: sites, read-outs, directions, pairs to learn and test."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.errors import (
    NotFinite,
    NotOffered,
    OutOfRange,
    PairError,
    ShapeMismatch,
    UsageError,
)
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.data import Pairs, normalised
from underhood.methods.locate._illusion import orthonormal
from underhood.methods.locate._interchange import Interchange, answered, spots
from underhood.methods.locate._readout import Readout, readout_of

__all__ = [
    "Reader", "check_same", "check_width", "directions_given", "divide",
    "reader_of", "sites_of", "works",
]  # fmt: skip

_VECTORS = ("d_model", "neuron", "d_head", "channel")
_LEAST = 4  # pairs: two to learn from and two to test on


@dataclass(frozen=True, slots=True)
class Reader:
    """A read-out, or why there is none."""

    map: Readout | None
    why: str = ""

    @property
    def name(self) -> str:
        return self.map.name if self.map is not None else f"none: {self.why}"


def reader_of(model: Model, site: Site, named: Sequence[str]) -> Reader:
    try:
        return Reader(readout_of(model, site, named))
    except NotOffered as error:
        if named:
            raise
        return Reader(None, error.what)


def sites_of(
    model: Model, site: str, layers: tuple[int, ...] | None, *, one: bool = False
) -> list[Site]:
    """The concrete sites, checked to hold one vector per position."""
    place = Site.parse(site)
    place = place if place.stack or place.path else replace(place, stack=model.main)
    axes = tuple(a for a in place.kind.axes if place.unit is None or a != place.kind.unit)
    if axes[:-1] != ("batch", "pos") or axes[-1] not in _VECTORS or not place.kind.layered:
        raise UsageError(
            f"{site} holds no single vector per position that could be split into directions",
            given=f"axes {' '.join(axes)}" + ("" if place.kind.layered else ", no layers"),
            why="heads are taken one at a time: z.LAYER.HEAD" if "head" in axes else None,
            do="use a site of the stream (resid_post), mlp_post, mlp_out, or one head's z or q",
        )
    if not place.kind.writable:
        raise UsageError(f"{site} cannot be written", given=site, do="use resid_post or mlp_post")
    found = model.resolve(place)
    if one and len(found) != 1:
        raise UsageError("name one layer", given=site, do=f"e.g. {found[0]}")
    if layers is None:
        return found
    if not place.spreads:
        raise UsageError(
            "the site names a layer already", given=f"{site}, layers={layers}", do="leave one out"
        )
    known = {s.layer: s for s in found}
    for layer in layers:
        if layer not in known:
            raise OutOfRange(
                f"there is no {site} in layer {layer}",
                given=layer,
                do=f"use one of {', '.join(map(str, known))}",
            )
    return [known[layer] for layer in sorted(set(layers))]


def check_width(sites: Sequence[Site], widths: Sequence[int | None], k: int) -> None:
    """Refuse layers of several widths, and subspaces that are no part of the whole."""
    known = sorted({width for width in widths if width is not None})
    if len(known) > 1:
        raise UsageError(
            "these layers differ in width",
            given=", ".join(map(str, sites)),
            why=f"they have {' and '.join(map(str, known))} on their last axis",
            do="take them one by one",
        )
    if known and k >= known[0]:
        raise OutOfRange(
            f"k must be below the site's width, {known[0]}",
            given=f"k={k}",
            why="all dimensions together are the whole activation",
            do="use a smaller k; the whole activation is the part 'full' of every result",
        )


def check_same(work: Interchange, sites: Sequence[Site]) -> None:
    if all(work.same(site) for site in sites):
        raise PairError(
            "both runs hold the same there, so there is nothing to exchange",
            given=", ".join(map(str, sites)),
            why="the place comes before the first token in which the prompts differ",
            do="choose a later layer or another position, e.g. positions='changed'",
        )


def directions_given(directions: Tensor, width: int, site: Site) -> Float[Tensor, "k d"]:
    rows = directions.detach().double().cpu()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ShapeMismatch(
            "the directions do not fit the site",
            given=f"shape {list(directions.shape)}",
            why=f"{site} has {width} on its last axis",
            do=f"give [{width}] or [k, {width}]",
        )
    if not bool(torch.isfinite(rows).all()) or not bool(rows.norm(dim=1).all()):
        raise NotFinite("a direction is zero or not finite", given=str(site), do="leave it out")
    basis = orthonormal(rows / rows.norm(dim=1, keepdim=True))
    if len(basis) >= width:
        raise OutOfRange(
            f"a subspace has fewer than the site's {width} dimensions",
            given=f"{len(basis)} directions",
            do="give fewer",
        )
    return basis


def works(
    model: Model,
    pairs: Pairs,
    sites: Sequence[Site],
    positions: str | int,
    held_out: float,
    seed: int,
    batch_size: int | None,
) -> tuple[Interchange, Interchange, str]:
    """The pairs to learn from and those to test on, run; and where their answers come from."""
    encoded, origin = answered(model, pairs.encode(model))
    places = spots(encoded, pairs, positions)
    learning, testing = divide(pairs, held_out, seed)
    found = []
    for rows in (learning, testing):
        own = None if places is None else [places[row] for row in rows]
        part = encoded.rows(rows)
        found.append(Interchange(model, part, sites, own, batch_size=batch_size))
    normalised(0.0, *(float(end.mean()) for end in (found[1].clean, found[1].contrast)))
    return found[0], found[1], origin


def divide(pairs: Pairs, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to learn from and rows to test on; equal pairs stay together."""
    keys = [tuple(sorted(both)) for both in zip(pairs.clean, pairs.contrast, strict=True)]
    distinct = sorted(set(keys))
    if len(distinct) < _LEAST:
        raise PairError(
            f"a subspace needs {_LEAST} different pairs or more",
            given=f"{len(pairs)} pairs, {len(distinct)} of them different",
            why="it is learned from some and tested on others",
            do="give more pairs, tens at least; to judge one direction use illusion_report",
        )
    random.Random(seed).shuffle(distinct)
    count = min(max(round(held_out * len(distinct)), 2), len(distinct) - 2)
    test = set(distinct[:count])
    return [i for i, key in enumerate(keys) if key not in test], [
        i for i, key in enumerate(keys) if key in test
    ]
