"""Redundancy: nodes that stand in for each other, which ablating one at a time underrates.

    E(S)           (clean - without all of S) / (clean - contrast)     1: all that the contrast does
    interaction    E(S) - sum of E of its members alone                0: they do not meet
    extra          how much more each member does, at least, once the others are gone

A backup shows nothing while the part that it backs up works, and that part shows little because
there is a backup. Parts in series are the opposite (interaction below 0): the second ablation finds
nothing left to break. The search goes on from the strongest nodes, and by groups through those that
show nothing alone (`_stand_ins`); what it finds is measured again on other prompts, beside random
sets of as many nodes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.wiring import Wiring
from underhood.core.errors import OutOfRange
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.data import Pairs, metric_named
from underhood.methods.locate._cuts import Cuts, Set, nodes_of
from underhood.methods.locate._options import Cut, at_least, below_one
from underhood.methods.locate._redundancy_view import redundancy_view
from underhood.methods.locate._stand_ins import Rule, Search, extra, interaction, random_sets
from underhood.methods.registry import method
from underhood.view import Result

if TYPE_CHECKING:
    import xarray

__all__ = ["redundancy"]

_ENOUGH = 4  # prompts from which on some are held out
_MEASURED = 8  # sets that are measured in the end, or `top` if that is more
_RESAMPLES = 1000


@method
def redundancy(
    model: Model,
    pairs: Pairs,
    *,
    nodes: Literal["heads", "mlps", "all"] = "heads",
    top: int = 8,
    threshold: float = 0.1,
    largest: int = 4,
    metric: str = "logit_diff",
    ablation: Cut = "resample",
    draws: int = 20,
    held_out: float = 0.5,
    batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """Nodes that stand in for each other: what sets do that their members alone do not.

    Args:
        pairs: Clean and contrast prompts of equal length, with answers.
        nodes: What is ablated: attention "heads", "mlps", or "all" (mixers without heads as well).
        top: How many of the strongest nodes (and of the sets found) to go on from. In the end as
            many sets are measured, and at least 8.
        threshold: Least `extra` that counts while searching, as a share of what the contrast
            changes.
        largest: Nodes of a set at most.
        metric: What is measured (see `uh.data.METRICS`).
        ablation: What an ablated node writes: what it writes in the contrast, a mean, or nothing.
        draws: Random sets of equal size beside each set that was found.
        held_out: Share of the prompts that measure what the others found; with fewer than four
            prompts all do both, and the result says so.
        batch_size: Rows of one pass; nothing depends on it.
        seed: Of the split, the groups, and the random sets.

    Returns:
        Over `node` (names): `single`, E of each node alone. Over `part` (the strongest nodes) and
        `node`: `conditional`, what the node does once the part is gone (NaN: itself). Over
        `circuit` (the sets found; names joined by +) and measured on held-out prompts: `size`,
        `alone` (sum of the members' own E), `joint`, `interaction` with `interaction_low` and
        `interaction_high` (95 percent over prompts, NaN for one), `extra`, `held` (both above all
        random sets); with `node` `member` and `own` (E alone, NaN for others); with `draw`
        `control_interaction` and `control_extra` of random sets. Scalars: `quiet` nodes do less
        than the threshold alone, `quiet_sum` added up, `quiet_joint` together; `diffuse` groups do
        more together without a small set that does. All as shares of what the contrast changes.

    Raises:
        PairError: The contrast gives the same metric, or prompts that cannot be compared.
        NotOffered: No such nodes, or a stream that is not a sum of what parts write.
        OutOfRange: A number outside its range.
        ShapeMismatch: "mean-position" with prompts of different length.

    Cost: forwards only, one row per set and prompt: n nodes, top * n pairs and as many for each
        further size that is found; 1 + top groups and 8 halves, and about k log2(n) for each set
        of k that only a group shows; then (1 + 2k)(1 + draws) for each set measured.

    Source: backup heads: Wang et al. 2022 (IOI), self-repair: McGrath et al. 2023. Ours: the
        search (group testing with halving), `extra`, and the controls.

    Misleads: any bend in the metric is an interaction: many parts that each add a little show
        slightly more together than alone (see the random sets). Sets of more than `largest` nodes,
        and sets that only some prompts use, are missed. Groups are taken apart as if ablating more
        never helped; where it does, sets stay hidden. Random sets leave out what the search found.
        Interactions depend on the ablation: under "zero" parts break that never stood in for
        anything.

    Example:
        >>> from underhood.organisms import wired
        >>> organism = wired("backup")  # a head, and one that rests while the other works
        >>> found = redundancy(organism.model, organism.pairs(n=8))
        >>> [str(name) for name in found["circuit"].values], bool(found["held"].all())
        (['a0.h0+a1.h3'], True)
        >>> import underhood as uh
        >>> pairs = uh.Pairs.one("the capital of France is", "the capital of Japan is",
        ...                      "Paris", "Tokyo")
        >>> redundancy(uh.load(), pairs, top=2, draws=2)["single"].dims
        ('node',)
    """
    _check(top, threshold, largest, draws, held_out)
    measure = metric_named(metric)
    wiring = Wiring(model)
    chosen = nodes_of(wiring, nodes)
    find, test = _split(pairs, held_out, seed)
    cuts = Cuts(wiring, find.encode(model), measure, ablation, batch_size)
    search = Search(cuts, chosen, Rule(top, threshold, largest, seed=seed))
    found = search.run()
    apart = test is not find
    tested = Cuts(wiring, test.encode(model), measure, ablation, batch_size) if apart else cuts
    measured = _measured(
        tested, chosen, found[: max(top, _MEASURED)], found, draws=draws, seed=seed
    )
    data = _data(search, measured)
    data.attrs |= {
        "nodes": nodes, "threshold": threshold, "largest": largest, "flagged": len(found),
        "prompts": [len(find), len(test)], "apart": apart,
    }  # fmt: skip
    return Result(
        name="redundancy",
        data=data,
        view=redundancy_view(data),
        provenance=describe(
            model, pairs=len(pairs), nodes=nodes, top=top, threshold=threshold, largest=largest,
            metric=metric, ablation=ablation, draws=draws, held_out=held_out if apart else 0,
            seed=seed, sets=cuts.sets + tested.sets * apart,
            passes=cuts.passes + tested.passes * apart, how=cuts.how,
        ),
    )  # fmt: skip


def _check(top: int, threshold: float, largest: int, draws: int, held_out: float) -> None:
    at_least(1, top=top, draws=draws)
    at_least(2, largest=largest)
    below_one(held_out=held_out)
    if not 0 < threshold < 1:
        raise OutOfRange(
            "threshold must be between 0 and 1", given=threshold, do="e.g. threshold=0.1"
        )


def _split(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Prompts to find sets on, and prompts to measure them on."""
    if len(pairs) < _ENOUGH or not 0 < round(share * len(pairs)) < len(pairs):
        return pairs, pairs
    return pairs.split(1 - share, seed)


# Measuring ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Measured:
    """The sets, on the prompts that measure; controls are `[set, draw]`, NaN where none exist."""

    sets: list[Set]
    own: list[Tensor]
    joint: Tensor
    interaction: Tensor
    interval: Tensor
    extra: Tensor
    control: Tensor
    control_extra: Tensor

    @property
    def held(self) -> Tensor:
        """Which sets do more than every random one; without random sets nothing is shown."""
        known = ~torch.isnan(self.control).all(1)
        above = self.interaction > self.control.nan_to_num(-torch.inf).amax(1)
        return known & above & (self.extra > self.control_extra.nan_to_num(-torch.inf).amax(1))


def _measured(
    cuts: Cuts, nodes: tuple[int, ...], sets: list[Set], avoid: list[Set], *, draws: int, seed: int
) -> _Measured:
    size = (len(sets), draws)
    control = torch.full((2, *size), torch.nan, dtype=torch.float64)
    drawn = {
        k: random_sets(nodes, k, avoid, draws=draws, seed=seed + k) for k in {len(s) for s in sets}
    }
    everything = [*sets, *(s for some in drawn.values() for s in some)]
    # One sweep for all that the numbers below are made of.
    cuts.lost([*everything, *(part for s in everything for n in s for part in ([n], s - {n}))])
    for row, s in enumerate(sets):
        others = drawn[len(s)]
        control[0, row, : len(others)] = interaction(cuts, others)
        control[1, row, : len(others)] = extra(cuts, others)
    return _Measured(
        sets, [cuts.lost([[n] for n in sorted(s)]) for s in sets], cuts.lost(sets),
        interaction(cuts, sets), _interval(cuts, sets, seed), extra(cuts, sets),
        control[0], control[1],
    )  # fmt: skip


def _interval(cuts: Cuts, sets: list[Set], seed: int) -> Float[Tensor, "set 2"]:
    """95 percent intervals of the interaction: prompts drawn with replacement."""
    n = len(cuts.pairs)
    if n < 2 or not sets:
        return torch.full((len(sets), 2), torch.nan, dtype=torch.float64)
    each = torch.stack([
        cuts.drops([s])[0] - cuts.drops([[n] for n in s]).sum(0) for s in sets
    ])  # fmt: skip
    index = torch.randint(n, (_RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    drawn = each[:, index].mean(2) / cuts.gap[index].mean(1)
    return torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=1).T


# What is handed out ------------------------------------------------------------------------------


def _data(search: Search, measured: _Measured) -> "xarray.Dataset":
    import xarray

    names = search.cuts.wiring.graph.sources
    sets, place = measured.sets, {node: i for i, node in enumerate(search.nodes)}
    own = torch.full((len(sets), len(place)), torch.nan, dtype=torch.float64)
    for row, (s, values) in enumerate(zip(sets, measured.own, strict=True)):
        own[row, [place[n] for n in sorted(s)]] = values
    quiet = search.cuts.lost([search.quiet])
    data: dict[str, Any] = {
        "single": ("node", [search.single[n] for n in search.nodes]),
        "conditional": (("part", "node"), search.conditional().numpy()),
        "size": ("circuit", [len(s) for s in sets]),
        "alone": ("circuit", [float(values.sum()) for values in measured.own]),
        "joint": ("circuit", measured.joint.numpy()),
        "interaction": ("circuit", measured.interaction.numpy()),
        "interaction_low": ("circuit", measured.interval[:, 0].numpy()),
        "interaction_high": ("circuit", measured.interval[:, 1].numpy()),
        "extra": ("circuit", measured.extra.numpy()),
        "held": ("circuit", measured.held.numpy()),
        "member": (("circuit", "node"), ~own.isnan().numpy()),
        "own": (("circuit", "node"), own.numpy()),
        "control_interaction": (("circuit", "draw"), measured.control.numpy()),
        "control_extra": (("circuit", "draw"), measured.control_extra.numpy()),
        "quiet": ((), len(search.quiet)),
        "quiet_sum": ((), sum(search.single[n] for n in search.quiet)),
        "quiet_joint": ((), float(quiet[0])),
        "diffuse": ((), search.diffuse),
    }  # fmt: skip
    coords = {
        "node": [names[n] for n in search.nodes],
        "part": [names[n] for n in search.bases],
        "circuit": ["+".join(names[n] for n in sorted(s)) for s in sets],
    }
    return xarray.Dataset(data, coords=coords)
