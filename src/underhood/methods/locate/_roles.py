"""Parts of a model ablated singly and in sets, and what an ability loses: numbers per prompt.

A *part* is a head, a neuron, an MLP or a whole layer; a *cell* is a set of parts ablated together.
What is written there is the ability's own mean (so that nothing of another ability comes in), the
contrast's activation, or zero; the first token keeps its own, because sinks and massive activations
live there and writing a mean over them destroys every model, whatever the part was for.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, Plan, as_plan
from underhood.core.errors import NotOffered
from underhood.core.model import Model
from underhood.core.names import PartKind, part_name
from underhood.core.ops import Moment, Op, Patch, like
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass, sweep
from underhood.core.tokens import Where
from underhood.data import EncodedPairs, Metric, normalised

__all__ = [
    "Asked", "Bench", "Overwrite", "Part", "Permuted", "losses", "matched", "means", "parts_of",
    "permuted", "selectivity",
]  # fmt: skip

_SITES: dict[PartKind, tuple[str, ...]] = {
    "head": ("z",), "neuron": ("mlp_post",), "mlp": ("mlp_out",), "layer": ("attn_out", "mlp_out"),
}  # fmt: skip
Planner = Callable[[EncodedPairs, range], Sequence[Edit | Plan]]
_FULL = 64  # cells of a prompt that make a pass by themselves
SLACK = 0.01  # of the way; keeps the selectivity of parts that do nothing near 0


class Part(NamedTuple):
    """One component: what has to be overwritten to remove it, and which unit of it (if any)."""

    layer: int
    unit: int | None
    sites: tuple[Site, ...]

    def __str__(self) -> str:
        kinds: dict[tuple[str, ...], PartKind] = {sites: kind for kind, sites in _SITES.items()}
        kind = kinds.get(tuple(site.name for site in self.sites), "layer")
        return part_name(kind, self.layer, self.unit)


@dataclass(frozen=True, slots=True)
class Asked:
    """How parts are ablated.

    Attributes:
        metric: What is measured.
        value: "mean", "resample" (the contrast's activation) or "zero".
        positions: "all" (but the first token) or "last".
        batch_size: Rows of one pass; None: the sweep's default.
    """

    metric: Metric
    value: str
    positions: str
    batch_size: int | None


@dataclass(frozen=True, eq=False)
class Overwrite(Op):
    """Write values on some units of a site, from position `first` on.

    Attributes:
        values: One activation `[...]` for all rows and positions, or `[rows, pos, ...]`.
        mask: True on what is written; broadcasts against one activation.
        first: Positions before this one keep what they have.
    """

    name: ClassVar[str] = "overwrite"
    per_row: ClassVar[tuple[str, ...]] = ("values",)
    values: Tensor
    mask: Tensor
    first: int

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        if self.values.ndim == h.ndim:
            new = Patch(self.values).apply(h, moment)
        else:
            new = like(self.values, h).expand_as(h)
        late = (moment.positions >= self.first).view(*h.shape[:2], *[1] * (h.ndim - 2))
        return torch.where(late & self.mask, new, h)


def parts_of(model: Model, kind: PartKind) -> list[Part]:
    """All parts of a kind, by layer.

    Raises:
        NotOffered: The model has none.
    """
    found: list[Part] = []
    for layer in range(model.n_layers):
        sites = tuple(
            site for name in _SITES[kind]
            if model.offers(site := Site(name, layer, stack=model.main))
        )  # fmt: skip
        if not sites:
            continue
        if kind in ("mlp", "layer"):
            found.append(Part(layer, None, sites))
            continue
        count = model.size(sites[0], kind)
        if count is None:
            raise NotOffered(
                f"nobody knows how many {kind}s this layer has",
                given=str(sites[0]),
                do="ablate whole MLPs or layers instead",
            )
        found += [Part(layer, unit, sites) for unit in range(count)]
    if not found:
        wanted = Site(_SITES[kind][0], 0, stack=model.main)
        model.resolve(wanted)  # refuses with the reason
        raise NotOffered(f"this model has no {kind}s", given=repr(model), do="choose other parts")
    return found


def blocks(pairs: EncodedPairs, batch_size: int | None) -> list[range]:
    """Rows that go through together."""
    return pairs.blocks(batch_size or rows_per_pass(pairs.clean.ids.shape[1]))


def means(
    model: Model, pairs: EncodedPairs, sites: Iterable[Site], asked: Asked
) -> dict[Site, Tensor]:
    """Mean activation of each site over the ablated positions of both prompts of all rows.

    The contrasts take part, so that the mean keeps what all prompts of the task share and loses
    what tells one from another.
    """
    names = list(dict.fromkeys(sites))
    sums: dict[Site, Tensor] = {}
    count = 0
    for rows in blocks(pairs, asked.batch_size):
        part = pairs.rows(rows)
        for tokens in (part.clean, part.contrast):
            keep = tokens.mask.cpu() & (tokens.position_ids.cpu() > 0)
            if asked.positions == "last":
                ends = torch.tensor(tokens.lengths)[:, None] - 1
                keep = tokens.mask.cpu() & (tokens.position_ids.cpu() == ends)
            run = model.run(tokens, record=names)
            keep = keep.to(model.device)
            for site in names:
                total = run.aligned(site)[keep].double().sum(0)
                sums[site] = sums[site] + total if site in sums else total
            count += int(keep.sum())
    return {site: (total / max(count, 1)) for site, total in sums.items()}


class Bench:
    """One ability's prompts in a model: the metric's ends, and the metric without some parts.

    Args:
        model: The model.
        pairs: The prompts.
        asked: How parts are ablated.
        means: From `means`; may be empty unless `asked.value` is "mean".
    """

    def __init__(
        self, model: Model, pairs: EncodedPairs, asked: Asked, means: dict[Site, Tensor]
    ) -> None:
        self.model, self.pairs, self.asked, self.means = model, pairs, asked, means
        self.passes, self.how = 0, "nothing to run"
        self._blocks = blocks(pairs, asked.batch_size)
        self._reference: dict[int, Tensor] = {}
        ends = [self._ends(rows) for rows in self._blocks]
        self.clean, self.contrast = (torch.cat(column) for column in zip(*ends, strict=True))

    def _ends(self, rows: range) -> tuple[Tensor, Tensor]:
        part = self.pairs.rows(rows)
        clean, contrast = (self.model.run(t).last_logits for t in (part.clean, part.contrast))
        if self.asked.metric.uses_reference:
            self._reference[rows.start] = clean
        return self.read(clean, rows), self.read(contrast, rows)

    def read(
        self, logits: Tensor, rows: range, metric: Metric | None = None
    ) -> Float[Tensor, " row"]:
        """A metric in float64; `logits` are cell by cell all of these rows."""
        metric = metric or self.asked.metric
        times = len(logits) // len(rows)
        cut = slice(rows.start, rows.stop)
        answers, wrong = (x[cut].repeat(times, 1) for x in (self.pairs.answers, self.pairs.wrong))
        reference = None
        if metric.uses_reference:
            own = self._reference.get(rows.start, logits[: len(rows)])
            reference = own.repeat(times, 1)
        return metric(logits, answers, wrong, reference=reference).double().cpu()

    def unedited(self, metric: Metric) -> Float[Tensor, " batch"]:
        """Another metric of the clean prompts."""
        found = []
        for rows in self._blocks:
            logits = self.model.run(self.pairs.clean.rows(rows)).last_logits
            found.append(self.read(logits, rows, metric))
        return torch.cat(found)

    def without(
        self, cells: Sequence[Sequence[Part]], metric: Metric | None = None
    ) -> Float[Tensor, "cell batch"]:
        """The metric of every row with each set of parts ablated."""
        if self.asked.value != "resample":
            shared = [self._plan(cell, self.means) for cell in cells]
            return self.swept(shared, metric)
        wanted = list(dict.fromkeys(site for cell in cells for part in cell for site in part.sites))
        found = []
        for rows in self._blocks:
            run = self.model.run(self.pairs.contrast.rows(rows), record=wanted)
            source = {site: run.aligned(site) for site in wanted}
            found.append(self._swept(rows, [self._plan(cell, source) for cell in cells], metric))
        return torch.cat(found, 1)

    def swept(
        self, plans: Sequence[Edit | Plan], metric: Metric | None = None
    ) -> Float[Tensor, "cell batch"]:
        """The metric of every row under each plan; plans whose values hold no rows."""
        return torch.cat([self._swept(rows, plans, metric) for rows in self._blocks], 1)

    def swept_by_rows(
        self, plans: Planner, metric: Metric | None = None
    ) -> Float[Tensor, "cell batch"]:
        """The same for plans that hold rows: `plans(part of the pairs, its rows)` makes them."""
        found = [
            self._swept(rows, plans(self.pairs.rows(rows), rows), metric) for rows in self._blocks
        ]
        return torch.cat(found, 1)

    def _swept(
        self, rows: range, plans: Sequence[Edit | Plan], metric: Metric | None
    ) -> Float[Tensor, "cell row"]:
        # Walking prompt by prompt pays where it saves columns and fills passes.
        edits = [edit for plan in plans for edit in as_plan(plan)]
        late = all(edit.where.pos is not None for edit in edits)
        found = sweep(
            self.model, self.pairs.clean.rows(rows), plans,
            lambda logits: self.read(logits, rows, metric), batch_size=self.asked.batch_size,
            share=late and len(plans) >= _FULL,
        )  # fmt: skip
        self.passes, self.how = self.passes + found.passes, found.how
        return found.values

    def _plan(self, cell: Sequence[Part], source: dict[Site, Tensor]) -> Plan:
        """One edit per site: all of the cell's units in it at once."""
        units: dict[Site, list[int | None]] = {}
        for part in cell:
            for site in part.sites:
                units.setdefault(site, []).append(part.unit)
        last = self.asked.positions == "last"
        where, first = (Where(-1), 0) if last else (Where(), 1)
        return Plan(
            Edit(site, Overwrite(*self._written(site, named, source), first), where)
            for site, named in units.items()
        )

    def _written(
        self, site: Site, units: Sequence[int | None], source: dict[Site, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What is written on a site, and where in it."""
        device = self.model.device
        zero = torch.zeros((), device=device)
        values = zero if self.asked.value == "zero" else source[site].to(device)
        if units[0] is None:
            return values, torch.ones((), dtype=torch.bool, device=device)
        mask = torch.zeros(self.model.size(site, site.kind.unit) or 0, dtype=torch.bool)
        mask[[unit for unit in units if unit is not None]] = True
        mask = mask.to(device)
        return values, mask[:, None] if site.kind.unit == "head" else mask


# Numbers -----------------------------------------------------------------------------------------


def losses(
    values: Float[Tensor, "cell batch"], bench: Bench
) -> tuple[Float[Tensor, "cell batch"], Float[Tensor, " cell"], Float[Tensor, " cell"]]:
    """What is lost, as a share of the mean way from clean to contrast.

    Returns:
        Per row (their mean is the effect), the effect, and its standard error over rows (of a ratio
        of two means; NaN for one row).

    Raises:
        PairError: The metric is the same at both ends.
    """
    ways = bench.clean - bench.contrast
    way = ways.mean()
    normalised(0.0, float(bench.clean.mean()), float(bench.contrast.mean()))  # refuses a flat one
    rows = (bench.clean - values) / way
    effect = rows.mean(1)
    rest = rows - effect[:, None] * ways / way
    count = values.shape[1]
    sem = (rest.pow(2).sum(1) / (count - 1) / count).sqrt() if count > 1 else effect * torch.nan
    return rows, effect + 0.0, sem


def selectivity(first: Tensor, second: Tensor) -> Tensor:
    """`(a - b) / (|a| + |b| + 0.01)`: 1 serves the first ability only, -1 the second only."""
    return (first - second) / (first.abs() + second.abs() + SLACK)


class Permuted(NamedTuple):
    """How often permuted labels give as large a difference of effects.

    Attributes:
        p: For a part by itself.
        p_all: For the largest among all parts (holds for all of them together).
        limit: The 95th percentile of the largest absolute difference.
    """

    p: Float[Tensor, " cell"]
    p_all: Float[Tensor, " cell"]
    limit: float


def permuted(
    first: Float[Tensor, "cell a"], second: Float[Tensor, "cell b"], *, times: int, seed: int
) -> Permuted:
    """Test each part's difference of mean losses against labels that are dealt out anew.

    Args:
        first: Loss of each row of the first ability.
        second: Of the second.
        times: Permutations.
        seed: Of these.
    """
    rows = torch.cat([first, second], 1)
    count = first.shape[1]
    make = torch.Generator().manual_seed(seed)
    weights = torch.full((times, rows.shape[1]), -1.0 / second.shape[1], dtype=rows.dtype)
    for draw in weights:
        draw[torch.randperm(rows.shape[1], generator=make)[:count]] = 1.0 / count
    chance = (rows @ weights.T).abs()  # [cell, times]
    seen = (first.mean(1) - second.mean(1)).abs()
    # A draw that deals the labels out as they were must count as equally large, rounding or not.
    seen = seen * (1 - 1e-9)
    top = chance.amax(0)
    p = (1 + (chance >= seen[:, None]).double().sum(1)) / (1 + times)
    p_all = (1 + (top[None] >= seen[:, None]).double().sum(1)) / (1 + times)
    return Permuted(p, p_all, float(top.quantile(0.95)))


def matched(
    parts: Sequence[Part], chosen: Sequence[int], *, draws: int, seed: int
) -> tuple[list[list[int]], int]:
    """Random sets as large as the chosen one, from the same layers; they may overlap with it.

    Layers that are chosen whole have nothing else to offer: their share comes from any other layer.

    Returns:
        Different sets, none of them the chosen one, as many as were found up to `draws`; and how
        many parts of each had to come from other layers.
    """
    rng = random.Random(seed)
    layers: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        layers.setdefault(part.layer, []).append(index)
    counts = Counter(parts[index].layer for index in chosen)
    whole = [layer for layer, count in counts.items() if count == len(layers[layer])]
    away = sum(counts[layer] for layer in whole)
    elsewhere = [i for layer, held in layers.items() if layer not in whole for i in held]
    if not chosen or len(elsewhere) < len(chosen):
        return [], 0
    found: set[tuple[int, ...]] = set()
    for _ in range(draws * 20):
        taken: list[int] = []
        for layer, count in counts.items():
            taken += rng.sample(layers[layer], count) if layer not in whole else []
        taken += rng.sample([i for i in elsewhere if i not in taken], away)
        found.add(tuple(sorted(taken)))
        found.discard(tuple(sorted(chosen)))
        if len(found) == draws:
            break
    return [list(one) for one in sorted(found)], away
