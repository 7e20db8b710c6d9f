"""Heads squeezed into few dimensions: where their queries, keys and values really vary.

Queries are taken at the last token, keys and values at the key positions, all as the scores use
them (after rotary embedding), centred on their mean over prompts. The leading singular directions
span the subspace; compressing writes `mean + P (h - mean)` back at those positions only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.errors import NotOffered, OutOfRange
from underhood.core.model import Model
from underhood.core.names import head_named, part_name
from underhood.core.ops import Moment, Op, Patch, SwapSubspace, like
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.tokens import Tokens, Where
from underhood.data import EncodedPairs, Metric
from underhood.data.metric import Asked as Read
from underhood.methods.locate._roles import blocks

__all__ = [
    "LOG_ODDS", "PARTS", "Compress", "HeadAt", "Space", "Spaces", "Swap", "check_ranks",
    "compressed", "heads_named", "random_spaces", "recentred", "spaces", "swapped",
]  # fmt: skip

PARTS = ("qk", "ov", "both")


def _log_odds(asked: Read) -> Tensor:
    def mass(ids: Tensor) -> Tensor:
        picked = asked.logits.gather(1, ids.clamp(min=0))
        return picked.masked_fill(ids < 0, -torch.inf).logsumexp(1)

    return mass(asked.answers) - mass(asked.wrong)


LOG_ODDS = Metric(
    "log_odds", _log_odds, "nats",
    "log odds of the answers against the wrong answers, among these candidates only",
    uses_wrong=True, uses_all=False,
)  # fmt: skip
"""Everything restricted to the candidates follows from it: the loss is softplus(-odds), and the
answers outweigh the wrong ones where it is positive."""


class HeadAt(NamedTuple):
    """A query head, and the key/value head that it reads."""

    layer: int
    head: int
    group: int

    def __str__(self) -> str:
        return part_name("head", self.layer, self.head)


class Space(NamedTuple):
    """Mean and directions (rows, strongest first) of one head's queries, keys or values."""

    mean: Float[Tensor, " d_head"]
    basis: Float[Tensor, "d_head d_head"]
    share: Float[Tensor, " d_head"]


Spaces = dict[Site, Space]


@dataclass(frozen=True, eq=False)
class Compress(Op):
    """Keep only what lies in a subspace around a mean, from position `first` on."""

    name: ClassVar[str] = "compress"
    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "r d"]
    first: int

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        mean, basis = like(self.mean, h), like(self.basis, h)
        new = mean + ((h - mean) @ basis.T) @ basis
        late = (moment.positions >= self.first).view(*h.shape[:2], *[1] * (h.ndim - 2))
        return torch.where(late, new, h)


def heads_named(model: Model, names: Sequence[str]) -> list[HeadAt]:
    """Heads written as `head_named` reads them.

    Raises:
        UsageError: Not a head.
        OutOfRange: A layer or head that the model lacks.
        NotOffered: A layer without attention, or whose scores nobody can reach.
    """
    found = []
    for name in names:
        layer, head = head_named(name)
        queries = Site("q_rot", layer, head, stack=model.main)
        keys = Site("k_rot", layer, stack=model.main)
        model.resolve([queries, keys, Site("v", layer, stack=model.main)])
        count, shared = model.size(queries, "head"), model.size(keys, "head")
        if not count or not shared:
            raise NotOffered(
                "nobody knows how many heads this layer has", given=name, do="use another layer"
            )
        found.append(HeadAt(layer, head, head // (count // shared)))
    return list(dict.fromkeys(found))


def _sites(model: Model, head: HeadAt, part: str) -> list[Site]:
    """The sites of one head that belong to a part, each with its unit."""
    names = {"qk": ("q_rot", "k_rot"), "ov": ("v",), "both": ("q_rot", "k_rot", "v")}[part]
    return [
        Site(name, head.layer, head.head if name == "q_rot" else head.group, stack=model.main)
        for name in names
    ]


def _all_sites(model: Model, heads: Iterable[HeadAt], part: str = "both") -> list[Site]:
    return list(dict.fromkeys(site for head in heads for site in _sites(model, head, part)))


def _spots(site: Site, keys: Sequence[int]) -> tuple[Where, int]:
    """Where a site is edited, and the first position there: queries at the end, keys as asked."""
    if site.name == "q_rot":
        return Where(-1), 0
    return (Where(tuple(keys)), 0) if keys else (Where(), 1)


def _chosen(site: Site, tokens: Tokens, keys: Sequence[int]) -> Tensor:
    """The same positions as a mask over aligned columns."""
    lengths = torch.tensor(tokens.lengths)[:, None]
    columns = torch.arange(tokens.ids.shape[1])[None]
    if site.name == "q_rot":
        return columns == lengths - 1
    if not keys:
        return (columns >= 1) & (columns < lengths)
    hit = torch.zeros(len(lengths), columns.shape[1], dtype=torch.bool)
    for key in keys:
        hit |= columns == (key if key >= 0 else lengths + key)
    return hit


def _record(model: Model, tokens: Tokens, sites: Sequence[Site]) -> Run:
    return model.run(tokens, record=list(dict.fromkeys(site.whole for site in sites)))


def _read(run: Run, site: Site) -> Float[Tensor, "batch pos d_head"]:
    return run.aligned(site.whole)[:, :, site.unit]


def _gathered(
    model: Model, pairs: EncodedPairs, sites: Sequence[Site], keys: Sequence[int], size: int | None
) -> dict[Site, Float[Tensor, "n d_head"]]:
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for rows in blocks(pairs, size):
        part = pairs.rows(rows)
        for tokens in (part.clean, part.contrast):
            run = _record(model, tokens, sites)
            for site in sites:
                values = _read(run, site).detach().cpu()
                found[site].append(values[_chosen(site, tokens, keys)].double())
    return {site: torch.cat(parts) for site, parts in found.items()}


def spaces(
    model: Model,
    pairs: EncodedPairs,
    heads: Sequence[HeadAt],
    *,
    keys: Sequence[int],
    batch_size: int | None,
) -> Spaces:
    """Mean and singular directions of every head's queries, keys and values, over both prompts."""
    held = _gathered(model, pairs, _all_sites(model, heads), keys, batch_size)
    found = {}
    for site, values in held.items():
        mean = values.mean(0)
        # All d_head directions, so that what is left out of a subspace is one too.
        power, columns = torch.linalg.eigh((values - mean).T @ (values - mean))
        power = power.flip(0).clamp(min=0)
        basis = columns.T.flip(0).contiguous()
        found[site] = Space(mean, basis, power / power.sum().clamp(min=1e-30))
    return found


def recentred(
    model: Model,
    pairs: EncodedPairs,
    kept: Spaces,
    *,
    keys: Sequence[int],
    batch_size: int | None,
) -> Spaces:
    """The same directions around other prompts' means."""
    held = _gathered(model, pairs, list(kept), keys, batch_size)
    return {site: space._replace(mean=held[site].mean(0)) for site, space in kept.items()}


def random_spaces(kept: Spaces, *, draw: int, seed: int) -> Spaces:
    """The same means with random directions."""
    found = {}
    for number, (site, space) in enumerate(kept.items()):
        make = torch.Generator().manual_seed(hash((seed, draw, number)) % 2**63)
        noise = torch.randn(space.basis.shape, generator=make, dtype=torch.float64)
        found[site] = space._replace(basis=torch.linalg.qr(noise)[0].T.contiguous())
    return found


def compressed(
    model: Model,
    heads: Sequence[HeadAt],
    part: str,
    *,
    rank: int,
    held: Spaces,
    keys: Sequence[int],
) -> Plan:
    """Some heads' queries and keys, or values, squeezed to `rank` dimensions (0: their mean)."""
    edits = []
    for site in _all_sites(model, heads, part):
        space = held[site]
        where, first = _spots(site, keys)
        op = Compress(
            space.mean.float().to(model.device), space.basis[:rank].float().to(model.device), first
        )
        edits.append(Edit(site, op, where))
    return Plan(edits)


class Swap(NamedTuple):
    """What is exchanged: directions `start` to `stop` (None: everything that is there)."""

    heads: tuple[HeadAt, ...]
    part: str
    start: int
    stop: int | None
    held: Spaces


def swapped(
    model: Model, pairs: EncodedPairs, swaps: Sequence[Swap], *, keys: Sequence[int]
) -> list[Plan]:
    """Plans that put the contrast's part of some subspaces into the clean run, row by row."""
    sites = _all_sites(model, [head for swap in swaps for head in swap.heads])
    run = _record(model, pairs.contrast, sites)
    values = {site: _read(run, site) for site in sites}
    plans = []
    for swap in swaps:
        edits = []
        for site in _all_sites(model, swap.heads, swap.part):
            where, _ = _spots(site, keys)
            op: Op = Patch(values[site])
            if swap.stop is not None:
                basis = swap.held[site].basis[swap.start : swap.stop]
                op = SwapSubspace(basis.float().to(model.device), values[site])
            edits.append(Edit(site, op, where))
        plans.append(Plan(edits))
    return plans


def check_ranks(model: Model, heads: Sequence[HeadAt], ranks: Sequence[int], width: int) -> None:
    """Refuse ranks that are no ranks of these heads.

    Raises:
        OutOfRange: Less than 1, or more than a head has dimensions.
    """
    for rank in ranks:
        if not 1 <= rank <= width:
            raise OutOfRange(
                f"a subspace of {', '.join(map(str, heads))} cannot have rank {rank}",
                given=f"ranks={tuple(ranks)}",
                why=f"a head of {model.name} has {width} dimensions",
                do=f"use 1 to {width}",
            )
