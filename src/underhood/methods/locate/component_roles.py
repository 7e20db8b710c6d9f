"""Component roles: which parts serve one ability and not another, and whether that can be shown.

    loss(part, ability) = (clean - without the part) / (clean - contrast)
    selectivity(part)   = (loss in the first - loss in the second) / (sum of their sizes + 0.01)

Parts that one ability needs and the other does not make that ability's circuit. Whether the choice
means something is asked on other prompts: each circuit is ablated as a whole in both abilities,
beside random sets of as many parts from the same layers. A table with a strong diagonal, well
above its control, is the claim; anything else is not.

What this does not do: find parts that matter only together, or say what a part does.
"""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from underhood.core.errors import OutOfRange, PairError, UsageError
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.data import Metric, Pairs, metric_named
from underhood.data.metric import Asked as Read
from underhood.methods.locate._role_views import roles_view
from underhood.methods.locate._roles import (
    Asked,
    Bench,
    Part,
    Permuted,
    losses,
    matched,
    means,
    parts_of,
    permuted,
    selectivity,
)
from underhood.methods.locate._welch import Active, active, compared
from underhood.methods.registry import method
from underhood.view import Result

if TYPE_CHECKING:
    import xarray

__all__ = ["component_roles"]

_MOST = 64  # parts of a circuit when nobody says how many
_DEALS = 20  # permutations of the labels for neurons


def _top1(asked: Read) -> Tensor:
    hits = asked.logits.argmax(1, keepdim=True) == asked.answers
    return hits.any(1).to(asked.logits.dtype)


ACCURACY = Metric("accuracy", _top1, "share", "whether the top token is one of the answers")


@method
def component_roles(
    model: Model,
    pairs: Pairs,
    *,
    other: Pairs,
    components: Literal["head", "layer", "mlp", "neuron"] = "head",
    abilities: tuple[str, str] = ("first", "second"),
    metric: str = "logit_diff",
    value: Literal["mean", "resample", "zero"] = "mean",
    positions: Literal["all", "last"] = "all",
    size: int | None = None,
    threshold: float = 0.5,
    alpha: float = 0.05,
    held_out: float = 0.5,
    draws: int = 20,
    permutations: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """Which heads, layers or neurons serve one ability and not another; tested on held-out prompts.

    Args:
        pairs: Prompts of the first ability (clean, contrast, answers, wrong).
        other: Prompts of the second, of like form and length. On the command line a file:
            `--set other=FILE`.
        components: What is ablated one by one. Neurons are too many: they are compared by their
            mean activation instead, and only the chosen ones are ablated, together.
        abilities: What to call the two.
        metric: A name of `underhood.data.METRICS`.
        value: What an ablation writes: the mean over the ability's own prompts, the contrast's
            activation ("resample"), or zeros, which no run ever holds.
        positions: "all" but the first token, or the "last" only.
        size: Parts of a circuit at most; default one in eight of all parts, at most 64.
        threshold: Least selectivity of a circuit's parts (of either sign).
        alpha: Largest p of a circuit's parts (neurons: largest share of false finds).
        held_out: Share of the prompts that choose the parts; the rest test them.
        draws: Random sets of parts beside each circuit.
        permutations: Permutations of the ability labels (20 for neurons).
        seed: Of split, random sets and permutations.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Over `layer`, and `head` or `neuron`: `selectivity` (-1 to 1), `p` (permuted labels, the
        part alone), `p_all` (the largest of all parts), `circuit` (0 the first's, 1 the second's,
        -1 none), and with `task` first `loss` (1: the whole way from clean to contrast; positive:
        the part supports the answer) and `sem` (over rows). Neurons have `difference`, `t` and `q`
        instead. On held-out rows over `part` (whose circuit is ablated) and `task`: `joint` (loss),
        `joint_sem`, `random`, `random_low`, `random_high` (5th and 95th percentile of the random
        sets), `joint_p`, `accuracy`, `random_accuracy`; over `task` `clean_accuracy`. NaN where a
        circuit is empty.

    Raises:
        PairError: Rows without answers, too few rows, or a metric that is the same at both ends.
        OutOfRange: A share, level or count outside its range.
        NotOffered: Parts that this model lacks.

    Cost: four forwards per row to read, one row per part and row of the choosing half (none for
        neurons), then per circuit 2 * (1 + draws) sets on the testing half of both abilities. No
        backward.

    Source: "Disentangling Recall and Reasoning in Transformer Models" (selectivity by ablation and
        patching, neurons by activation). Ours, where the text at hand is silent: the formula of the
        selectivity, its thresholds, the scale (clean to contrast, so that any metric will do;
        the paper: relative to the clean metric), the first token left alone, labels permuted,
        p-values of the joint ablation.

    Misleads: two sets that differ in words or length differ in their parts for that reason alone,
        neurons above all. Redundant parts show no loss one by one. A selectivity of two small
        losses is noise: see `p`. Losses do not add up.

    Example:
        >>> import underhood as uh
        >>> from underhood.organisms import organism
        >>> first, other = (organism("town").pairs(t, 8) for t in ("capitals", "agreement"))
        >>> found = component_roles(
        ...     uh.load(), first, other=other, components="layer", draws=2
        ... )
        >>> found["joint"].dims
        ('part', 'task')
    """
    _check(
        abilities, threshold=(threshold, 0, 1), alpha=(alpha, 0, 1), draws=(draws, 1, 10_000),
        permutations=(permutations, 1, 1_000_000), size=(size or 1, 1, 1_000_000),
    )  # fmt: skip
    parts = parts_of(model, components)
    asked = Asked(metric_named(metric), value, positions, batch_size)
    halves = [_halves(p, held_out, seed) for p in (pairs, other)]
    choose, test = ([half[i] for half in halves] for i in (0, 1))
    sites = list(dict.fromkeys(site for part in parts for site in part.sites))
    own = [means(model, p.encode(model), sites, asked) if value == "mean" else {} for p in choose]
    rule = _Rule(min(size or min(ceil(len(parts) / 8), _MOST), len(parts)), threshold, alpha)
    benches = [Bench(model, p.encode(model), asked, m) for p, m in zip(choose, own, strict=True)]
    if components == "neuron":
        found: _Singles | Active = compared(
            *(active(model, b.pairs, sites, asked) for b in benches),
            limit=alpha, times=min(permutations, _DEALS), seed=seed,
        )  # fmt: skip
        circuits = rule.of_neurons(found)
    else:
        found = _singles(parts, benches, permutations, seed)
        circuits = rule.of_parts(found)
    tests = [Bench(model, p.encode(model), asked, m) for p, m in zip(test, own, strict=True)]
    joint = _joint(parts, circuits, tests, draws=draws, seed=seed)
    data = _dataset(parts, found, circuits, joint, abilities, components)
    data.attrs |= {
        "unit": "of the way", "metric": metric, "components": components,
        "rows": [len(p) for p in test], "alpha": alpha, "away": joint.away, "sets": joint.sets,
    }  # fmt: skip
    return Result(
        name="component_roles",
        data=data,
        view=roles_view(data, abilities, rule.size),
        provenance=describe(
            model, components=components, abilities=list(abilities), metric=metric, value=value,
            positions=positions, size=rule.size, threshold=threshold, alpha=alpha,
            chosen_on=[len(p) for p in choose], tested_on=[len(p) for p in test],
            draws=draws, permutations=permutations, seed=seed, how=tests[0].how,
            passes=sum(b.passes for b in (*benches, *tests)),
        ),
    )  # fmt: skip


def _check(abilities: tuple[str, str], **numbers: tuple[int | float, int, int]) -> None:
    """Refuse names that are one name, and numbers out of their range."""
    if len(set(abilities)) != 2:
        raise UsageError("two abilities, two names", given=repr(abilities), do="name them apart")
    for name, (number, low, high) in numbers.items():
        if not low <= number <= high:
            raise OutOfRange(f"{name} is out of range", given=number, do=f"use {low} to {high}")


def _halves(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Rows that choose, and rows that test."""
    if len(pairs) < 4:
        raise PairError(
            "too few rows to choose on some and test on others",
            given=f"{len(pairs)} rows",
            do="give at least 4 of each ability, better 50",
        )
    chosen, tested = pairs.split(share, seed)
    if min(len(chosen), len(tested)) < 2:
        raise PairError(
            "a half of one row has no spread",
            given=f"{len(chosen)} rows to choose, {len(tested)} to test",
            do="give more rows, or held_out=0.5",
        )
    return chosen, tested


# Choosing ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Singles:
    """Every part ablated by itself: `loss` and `sem` are `[task, part]`."""

    loss: Tensor
    sem: Tensor
    selectivity: Tensor
    test: Permuted


def _singles(parts: list[Part], benches: list[Bench], times: int, seed: int) -> _Singles:
    found = [losses(bench.without([[part] for part in parts]), bench) for bench in benches]
    rows, loss, sem = zip(*found, strict=True)
    test = permuted(rows[0], rows[1], times=times, seed=seed)
    return _Singles(torch.stack(loss), torch.stack(sem), selectivity(loss[0], loss[1]), test)


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which parts make a circuit."""

    size: int
    threshold: float
    alpha: float

    def of_parts(self, found: _Singles) -> list[list[int]]:
        """The largest losses among selective parts, for each ability."""
        circuits = []
        for task, sign in enumerate((1, -1)):
            fits = (
                (sign * found.selectivity > self.threshold)
                & (found.loss[task] > 0)
                & (found.test.p <= self.alpha)
            )
            circuits.append(self._largest(found.loss[task], fits))
        return circuits

    def of_neurons(self, found: Active) -> list[list[int]]:
        """The clearest differences of activation, for each ability."""
        return [
            self._largest(sign * found.t, (found.q <= self.alpha) & (sign * found.t > 0))
            for sign in (1, -1)
        ]

    def _largest(self, scores: Tensor, fits: Tensor) -> list[int]:
        order = torch.where(fits, scores, -torch.inf).argsort(descending=True, stable=True)
        return [int(i) for i in order[: min(self.size, int(fits.sum()))]]


# Testing -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Joint:
    """Circuits ablated as wholes in held-out rows; all `[circuit, task]`, NaN where empty.

    `away` counts the control's parts that had to come from other layers, `sets` the random sets.
    """

    table: dict[str, Tensor]
    clean: Tensor
    away: list[int]
    sets: list[int]


_COLUMNS = (
    "joint", "joint_sem", "random", "random_low", "random_high", "joint_p", "accuracy",
    "random_accuracy",
)  # fmt: skip


def _joint(
    parts: list[Part], circuits: list[list[int]], tests: list[Bench], *, draws: int, seed: int
) -> _Joint:
    table = {n: torch.full((2, 2), torch.nan, dtype=torch.float64) for n in _COLUMNS}
    away, sets = [0, 0], [0, 0]
    for number, circuit in enumerate(circuits):
        if not circuit:
            continue
        drawn, away[number] = matched(parts, circuit, draws=draws, seed=seed + number)
        sets[number] = len(drawn)
        cells = [[parts[i] for i in chosen] for chosen in (circuit, *drawn)]
        for task, bench in enumerate(tests):
            _, loss, sem = losses(bench.without(cells), bench)
            right = bench.without(cells, ACCURACY).mean(1)
            row = {"joint": loss[0], "joint_sem": sem[0], "accuracy": right[0]}
            if drawn:
                chance = loss[1:]
                larger = (chance >= loss[0]).sum()
                row |= {
                    "random": chance.mean(), "random_low": chance.quantile(0.05),
                    "random_high": chance.quantile(0.95), "random_accuracy": right[1:].mean(),
                    "joint_p": (1 + larger) / (1 + len(drawn)),
                }  # fmt: skip
            for name, number_ in row.items():
                table[name][number, task] = number_
    clean = torch.stack([_clean_accuracy(bench) for bench in tests])
    return _Joint(table, clean, away, sets)


def _clean_accuracy(bench: Bench) -> Tensor:
    return bench.unedited(ACCURACY).mean()


# What is handed out ------------------------------------------------------------------------------


def _dataset(
    parts: list[Part],
    found: _Singles | Active,
    circuits: list[list[int]],
    joint: _Joint,
    abilities: tuple[str, str],
    components: str,
) -> "xarray.Dataset":
    import numpy as np
    import xarray

    member = torch.full((len(parts),), -1, dtype=torch.int64)
    for number, circuit in enumerate(circuits):
        member[circuit] = number
    if isinstance(found, Active):
        columns = {"difference": found.difference, "t": found.t, "q": found.q}
        extra = {"found_by_chance": found.by_chance}
    else:
        columns = {
            "selectivity": found.selectivity, "p": found.test.p, "p_all": found.test.p_all,
            "loss": found.loss, "sem": found.sem,
        }  # fmt: skip
        extra = {"chance_limit": found.test.limit}
    layers = sorted({part.layer for part in parts})
    coords: dict[str, Any] = {"layer": layers}
    if parts[0].unit is not None:
        coords[components] = list(range(1 + max(part.unit or 0 for part in parts)))
    place = tuple(np.array([layers.index(part.layer) for part in parts])[None])
    if parts[0].unit is not None:
        place = (*place, np.array([part.unit for part in parts]))
    dims, sizes = tuple(coords), tuple(len(c) for c in coords.values())
    variables: dict[str, Any] = {}
    for name, column in (columns | {"circuit": member}).items():
        lead = column.shape[:-1]
        empty = np.full((*lead, *sizes), -1 if name == "circuit" else np.nan)
        empty[(..., *place)] = column.numpy()
        out = empty.astype(int) if name == "circuit" else empty
        variables[name] = (("task",) * len(lead) + dims, out)
    variables |= {name: (("part", "task"), t.numpy()) for name, t in joint.table.items()}
    variables |= {"clean_accuracy": ("task", joint.clean.numpy())} | extra
    names = list(abilities)
    return xarray.Dataset(variables, coords={**coords, "task": names, "part": names})
