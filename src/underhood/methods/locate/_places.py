"""Places and cells: which parts of which activations are exchanged by themselves.

A *place* is one site of one layer, taken whole or unit by unit (heads, neurons, experts, router
logits, single dimensions); a *cell* is a place's unit at one position, at all, or at the last.
Whatever the site's axes, a place reads an activation as `[rows, pos, unit, width]`: a head's
vector, a neuron's one number, what an expert added (zeros where it was not chosen), or the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.run import Run
from underhood.core.site import Site, parse_many
from underhood.core.tokens import Tokens

__all__ = ["MOST_CELLS", "Cell", "Place", "Spots", "Units", "cells_of", "names_of", "places_of"]

MOST_CELLS = 100_000
"""More cells than this are refused: each is a forward of its own."""

Units = Literal["auto", "whole", "each"] | tuple[int, ...]
Spots = Literal["each", "all", "last"] | tuple[int, ...]


class Cell(NamedTuple):
    """What is patched at once: one site of a layer or a unit of it (`site.unit`), and where.

    `pos` is None for all positions and -1 for the last one.
    """

    site: Site
    pos: int | None


@dataclass(frozen=True, slots=True)
class Place:
    """One site of one layer.

    Attributes:
        site: Concrete, without unit.
        units: The units that are cells of their own; None: the site as a whole.
    """

    site: Site
    units: tuple[int, ...] | None

    @property
    def by_slot(self) -> bool:
        """Whether the site holds the chosen experts of each token, in the order of their choice."""
        return "slot" in self.site.kind.axes

    @property
    def sites(self) -> list[Site]:
        """The sites of its cells: the units', or the whole one."""
        if self.units is None:
            return [self.site]
        return [replace(self.site, unit=unit) for unit in self.units]

    @property
    def recorded(self) -> list[Site]:
        """What to record, to read it."""
        return [self.site, *self.sites] if self.by_slot else [self.site]

    def read(self, run: Run) -> Float[Tensor, "rows pos unit width"]:
        """What a run held there, each row in its own positions."""
        if self.by_slot and self.units is not None:
            return torch.stack([run.aligned(site) for site in self.sites], 2)
        return self.split(run.aligned(self.site))

    def split(self, value: Tensor) -> Float[Tensor, "rows pos unit width"]:
        """The site's activation (without slots) in that form."""
        if self.units is None:
            return value.flatten(2)[:, :, None]
        value = value[..., None] if value.ndim == 3 else value
        return value[:, :, list(self.units)]

    def value(self, form: Float[Tensor, "rows pos width"], like: Tensor) -> Tensor:
        """One unit's vectors in the axes that an edit of it sees.

        Args:
            form: Of one unit.
            like: The site's activation in some run, for its axes.
        """
        if self.units is None:
            return form.view(*form.shape[:2], *like.shape[2:])
        if self.by_slot:  # every slot holds it; the edit acts in the expert's own
            return form[:, :, None].expand(-1, -1, like.shape[2], -1)
        return form[..., 0] if like.ndim == 3 else form


def names_of(model: Model, sites: str | tuple[str, ...], units: Units) -> tuple[Site, ...]:
    """The sites without layers, checked: patchable by position in every layer, and of one kind.

    Raises:
        UsageError: Sites without layers or positions, of different axes, or named with a unit.
        NotOffered: A site that this model lacks.
    """
    found = []
    for site in parse_many(sites):
        site = site if site.stack else replace(site, stack=model.main)
        kind = site.kind
        if site.unit is not None or not kind.layered or not kind.writable:
            raise UsageError(
                "this grid is over layers and, where there are any, heads or other units",
                given=str(site),
                why=kind.about,
                do="name a layered site without a unit, e.g. resid_pre, mlp_out or z; choose"
                " neurons and experts with units=",
            )
        whole = units == "whole" or (units == "auto" and kind.unit != "head")
        if kind.axes[1] != "pos" or ("slot" in kind.axes and whole):
            raise UsageError(
                f"{site} has no vector per position that could be exchanged",
                given=f"{site}: axes {' '.join(kind.axes)}",
                do="patch z (what a pattern moves), mlp_out (what the experts add), or single"
                " experts with units=(0, 1)",
            )
        if kind.unit is None and not whole:
            raise UsageError(f"{site} has no units", given=f"units={units!r}", do="units='whole'")
        model.resolve(site)
        found.append(site)
    _check_alike(found, units)
    return tuple(dict.fromkeys(found))


def _check_alike(names: Sequence[Site], units: Units) -> None:
    """Sites of one grid count the same thing."""
    if units == "whole":
        return
    kinds = {s.kind.unit == "head" if units == "auto" else s.kind.unit for s in names}
    if len(kinds) > 1:
        raise UsageError(
            "sites with heads and sites without do not fit into one grid",
            given=", ".join(map(str, names)),
            why="their units are of different kinds",
            do="make two calls",
        )


def places_of(
    model: Model,
    names: Sequence[Site],
    units: Units,
    tokens: Tokens,
    chosen: Mapping[Site, tuple[int, ...]] | None = None,
) -> list[Place]:
    """The places of some sites, layer by layer.

    Args:
        model: The model.
        names: Sites without layers.
        units: "auto" (heads one by one, other sites whole), "whole", "each", or numbers.
        tokens: Prompts; one is run where a site's size is not known without.
        chosen: Per site and layer the units to take instead (of a search); others are left out.

    Raises:
        OutOfRange: A unit that some layer lacks.
    """
    found = []
    for name in names:
        for site in model.resolve(name):
            if chosen is not None:
                found += [Place(site, chosen[site])] if site in chosen else []
                continue
            if units == "whole" or (units == "auto" and site.kind.unit != "head"):
                found.append(Place(site, None))
                continue
            size = _size(model, site, tokens)
            numbers = units if isinstance(units, tuple) else tuple(range(size))
            _check_units(site, numbers, size)
            found.append(Place(site, numbers))
    return found


def _check_units(site: Site, numbers: tuple[int, ...], size: int) -> None:
    if not numbers or len(set(numbers)) < len(numbers):
        raise UsageError(
            "units are one number or more, each once", given=repr(numbers), do="units=(0, 1)"
        )
    for number in numbers:
        if not 0 <= number < size:
            raise OutOfRange(
                f"{site} has no {site.kind.unit} {number}",
                given=f"units={numbers!r}",
                why=f"it has {size}",
                do=f"use 0 to {size - 1}",
            )


def _size(model: Model, site: Site, tokens: Tokens) -> int:
    known = model.size(site, site.kind.unit)
    if known is not None:
        return known
    if site.kind.unit not in site.kind.axes:
        raise NotOffered(
            f"nobody knows how many units {site} has", given=str(site), do="units=(0,)"
        )
    run = model.run(tokens.row(0), record=site)
    return run[site].shape[site.kind.axes.index(site.kind.unit or "")]


def cells_of(places: Sequence[Place], positions: Spots, columns: int) -> list[Cell]:
    """All cells, in order of place, unit, position.

    Args:
        places: The places.
        positions: "each", "all" at once, the "last", or numbers.
        columns: Positions of the longest prompt.

    Raises:
        UsageError: More cells than anybody would wait for.
        OutOfRange: A position that no prompt has.
    """
    spots: Sequence[int | None]
    if isinstance(positions, tuple):
        spots = positions
        for pos in positions:
            if not 0 <= pos < columns:
                raise OutOfRange(
                    f"no prompt has a position {pos}",
                    given=f"positions={positions!r}",
                    do=f"use 0 to {columns - 1}",
                )
    else:
        spots = {"each": range(columns), "all": [None], "last": [-1]}[positions]
    units = sum(1 if place.units is None else len(place.units) for place in places)
    count = units * len(spots)
    if count > MOST_CELLS:
        raise UsageError(
            f"this grid has {count:,} cells",
            given=f"{units:,} units in {len(places)} places, at {len(spots)} positions each",
            why=f"each cell is a forward of its own; more than {MOST_CELLS:,} are refused",
            do="estimate them all in one backward pass with attribution_patching; or patch a few:"
            " units=(3, 17), units='top' with top=20, positions='all' or 'last'",
        )
    return [Cell(site, pos) for place in places for site in place.sites for pos in spots]
