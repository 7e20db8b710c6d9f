"""Relevance patching (RelP): attribution patching with relevance in place of the gradient.

    score = (a(clean) - a(contrast)) . R,   R from one backward pass by relevance rules

The rules (`core.relevance`) hold constant what a straight line through the gradient gets wrong:
what norms divide by, by how much an activation multiplies, half of a gated product for each factor.

Two rule sets are in the world. The paper describes LN, identity and half. Its public quick start
loads a model and then switches the rules on; but the model chose its activation functions when it
was built, so the identity rule never runs: what it computes is LN and half. Both are here, and LN
alone, which is what the quick start comes to in a model without gates (GPT-2).

    rules="paper"        ln + identity + half
    rules="quick_start"  ln + half
    rules="ln"           ln: with gates it counts each gated product twice

What this does not do: find out where it is wrong. Verification by exact patching does, and shows
the same number for plain attribution patching beside it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.relevance import relevance_rules
from underhood.data import Pairs
from underhood.methods.locate._asked import Asked
from underhood.methods.locate._estimates import (
    How,
    differentiable,
    estimate_columns,
    estimated,
    runs_at,
)
from underhood.methods.locate._grid_views import grid_view
from underhood.methods.locate._grids import answered, columns_of, dataset, labels_of, words
from underhood.methods.locate._missed import run_sets
from underhood.methods.locate._options import at_least
from underhood.methods.locate._patching import ExactPatching
from underhood.methods.locate._places import names_of
from underhood.methods.locate._verify import Verified, _agreement
from underhood.methods.locate._verify import verify as check
from underhood.methods.registry import method
from underhood.view import Result, View, group, sentences, table

__all__ = ["RULE_SETS", "relevance_patching"]

RULE_SETS = {
    "paper": ("ln", "identity", "half"),
    "quick_start": ("ln", "half"),
    "ln": ("ln",),
}
"""Rules of `core.relevance` by the name of the set."""

_SHOWN = 12
_EQUAL = 5e-4  # correlations that print alike


@method
def relevance_patching(
    model: Model,
    pairs: Pairs,
    *,
    sites: str | tuple[str, ...] = "mlp_out",
    units: Literal["auto", "whole", "each"] | tuple[int, ...] = "auto",
    rules: Literal["paper", "quick_start", "ln"] = "paper",
    fixed_patterns: bool = False,
    grad_at: Literal["base", "clean", "corrupt", "both"] = "base",
    direction: Literal["denoise", "noise"] = "denoise",
    metric: str = "logit_diff",
    positions: Literal["each", "all", "last"] | tuple[int, ...] = "each",
    verify: int = 20,
    tail: int = 20,
    subsets: int = 0,
    theta: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """The effect of every patch at once, estimated from relevance and checked beside gradients.

    Args:
        pairs: Clean and contrast prompts. Without answers: the model's own top token after the
            clean prompt, against its top token after the contrast.
        sites: Where, in every layer: "mlp_out", "attn_out", "resid_pre", "z" (heads), ... Several
            sites need the same axes.
        units: What is a cell of its own: "auto" heads one by one and other sites whole; "whole"
            all heads together too; "each" neuron, expert or dimension; or numbers.
        rules: "paper" (LN, identity, half), "quick_start" (LN, half: what the public quick start
            really computes), or "ln".
        fixed_patterns: Hold attention patterns constant too (the AH rule, off in the paper): no
            relevance goes to queries and keys.
        grad_at: The run that relevance is taken at: the one that `direction` edits ("base"; the
            contrast when denoising, as in the paper), the clean one, the contrast ("corrupt"), or
            both, averaged.
        direction: "denoise": as if the clean activation were written into the contrast run;
            "noise": the contrast's into the clean run.
        metric: A name of `underhood.data.METRICS`, any but "rank".
        positions: "each" position by itself, the sum over "all", the "last" only, or numbers.
        verify: Exact patching of so many of the strongest cells by relevance, and by plain
            attribution patching; 0: no check.
        tail: And of so many random others.
        subsets: Random subsets of the rest to patch jointly, for a bound on what was missed.
        theta: An effect (1 is the whole way) to ask about: how likely is it that a cell that was
            not run reaches it?
        seed: Of the random cells and subsets.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        As `attribution_patching`, cell by cell: `effect` (the estimate; no unit, 1 is the whole way
        from contrast to clean, positive supports the answer), `sem`, `raw` (in the metric's unit),
        `skipped`, `rows`, and with `batch` `change`. From the check: `atp` (plain attribution
        patching, as `effect`), `exact` (as `effect`; NaN where not run), `verified` (0 no, 1 as one
        of RelP's strongest, 2 at random, 3 as one of AtP's strongest alone), and numbers:
        `pearson_all` and `pearson_atp` (both estimates against exact on the same cells, the random
        ones weighted by what they stand for), and RelP's other numbers as in
        `attribution_patching`. Over `batch`: `clean`, `contrast`.

    Raises:
        PairError: Pairs that cannot be compared, or whose metric is the same at both ends.
        UsageError: A metric without gradient; sites that `activation_patching` refuses too.
        NotOffered: A site that this model lacks; a rule that finds nothing to act on in a part of
            the model where it must (a norm of an unknown kind, an activation written out in the
            code, a model of mixers without MLPs).

    Cost: 2 forwards to read, then 1 forward and backward for all cells. The check: as much again
        for plain attribution patching, and one row per cell run (at most 2 verify + tail) and pair.

    Source: Jafari et al. 2025, "RelP" (2508.21258), and its code; the paper's MLP numbers (GPT-2
        small, IOI: Pearson 0.195 to 0.992) were not reproduced here for lack of its weights. Ours:
        norms after sub-layers and on queries and keys, experts as gated MLPs (routing weights keep
        their gradients), `grad_at`, the check beside plain attribution patching.

    Misleads: the LN rule ignores that a change may change the norm's scale. Where a part writes
        much along the stream while the two answers are far apart, plain gradients are closer
        (greater-than in the built-in model: 0.82 against 0.94 on MLP outputs): read both
        correlations. "ln" alone counts gated products twice. Patterns keep their gradients:
        saturated ones give none, and what the LN rule lets through is amplified by others; compare
        `fixed_patterns`. Scores do not sum to the difference between the runs.

    Example:
        >>> import underhood as uh
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = relevance_patching(uh.load(), pair, verify=8, tail=8)
        >>> bool(found["pearson_all"] > 0.9)
        True
    """
    at_least(1, batch_size=batch_size)
    asked = Asked(
        names_of(model, sites, units), direction, differentiable(metric), positions, "resample", 0,
        seed, batch_size, units,
    )  # fmt: skip
    encoded, origin = answered(model, pairs.encode(model), asked.metric, batch_size)
    names = (*RULE_SETS[rules], *(("heads",) if fixed_patterns else ()))
    how = How("atp", runs_at(grad_at, asked), 1)
    with relevance_rules(model, names) as touched:
        relp, exact = estimated(model, encoded, asked, how)
    columns = estimate_columns(relp, asked)
    checked = None
    if verify > 0:
        atp, _ = estimated(model, encoded, asked, how)
        columns["atp"] = columns_of(atp.found, asked)["effect"]
        checked = _checked(
            columns, exact, k=verify, tail=tail, subsets=subsets, theta=theta, seed=seed
        )
        columns |= {"exact": checked.exact, "verified": checked.part}
    labels = words(encoded, pairs)
    data = dataset(relp.found, asked, columns, labels, checked.scalars() if checked else {})
    title = f"Relevance patching, rules: {' + '.join(names)}"
    view = grid_view(data, asked, title, note="Estimated from relevance, not run.")
    if checked is not None:
        view = group([view, checked.view(labels_of(relp.found.cells, labels))], title=title)
    return Result(
        name="relevance_patching",
        data=data,
        view=view,
        provenance=describe(
            model, sites=[str(s) for s in asked.names], rules=list(names), grad_at=grad_at,
            direction=direction, metric=metric, positions=positions, units=units, seed=seed,
            rows=len(pairs), answers=origin, touched=touched.paths, skipped=touched.skipped,
            forwards=relp.forwards, backwards=relp.backwards, subsets=subsets,
            verified=0 if checked is None else int((checked.part > 0).sum()),
        ),
    )  # fmt: skip


# The check ---------------------------------------------------------------------------------------


class _Checked(NamedTuple):
    """Both estimates beside exact effects, on the same cells.

    Over all cells, on the scale of `effect`: both estimates, and exact effects (NaN where not run).
    `part` says why a cell was run: 0 not at all, 1 strongest by RelP, 2 random other, 3 strongest
    by AtP alone.
    """

    found: Verified
    relp: Float[Tensor, " cell"]
    atp: Float[Tensor, " cell"]
    exact: Float[Tensor, " cell"]
    part: Int[Tensor, " cell"]
    pearson: float
    pearson_atp: float

    def scalars(self) -> dict[str, float]:
        """The numbers without axes."""
        both = {"pearson_all": self.pearson, "pearson_atp": self.pearson_atp}
        return self.found.scalars() | both

    def view(self, labels: Sequence[str]) -> View:
        """Sentences, and the strongest cells that were run with all three numbers."""
        run = (self.part > 0).nonzero()[:, 0]
        size = torch.maximum(self.relp[run].abs(), self.atp[run].abs())
        order = run[size.argsort(descending=True, stable=True)][:_SHOWN]
        why = ("", "RelP's strongest", "random other", "AtP's strongest")
        rows = [
            [
                labels[cell], float(self.relp[cell]), float(self.atp[cell]),
                float(self.exact[cell]), why[int(self.part[cell])],
            ]
            for cell in order.tolist()
        ]  # fmt: skip
        number = {"unit": "of the way", "format": "+.3f"}
        named = [{"name": name, **number} for name in ("RelP", "AtP", "exact")]
        shown = "" if len(rows) == len(run) else f" ({len(rows)} of {len(run)})"
        return group(
            [
                sentences(self._statements(len(run)), title="How far the estimate can be trusted"),
                table([{"name": "cell"}, *named, {"name": "drawn as"}], rows,
                      title=f"Estimates and exact effect{shown}"),
            ],
            title="Verified by exact patching",
            about="Both estimates on the same cells: the strongest by either, and random others.",
        )  # fmt: skip

    def _statements(self, run: int) -> list[str]:
        gap = self.pearson - self.pearson_atp
        if abs(gap) < _EQUAL or math.isnan(gap):
            closer = "Neither is closer."
        else:
            closer = f"{'RelP' if gap > 0 else 'AtP'} is closer here."
        return [
            f"Correlation with exact patching: RelP {self.pearson:.3f}, plain attribution patching"
            f" (AtP) {self.pearson_atp:.3f}, on the same {run} of {self.found.total} cells"
            f" (permuted estimates reach {self.found.chance:.2f}). {closer}",
            *self.found.statements("of the way")[1:],
        ]


def _checked(
    columns: Mapping[str, Tensor],
    exact: ExactPatching,
    *,
    k: int,
    tail: int,
    subsets: int,
    theta: float | None,
    seed: int,
) -> _Checked:
    """Exact effects of the strongest cells by either estimate, and of random others.

    Neither estimate is favoured: correlations are over the union of what both name, and the others
    stand for all that they were drawn from.
    """
    relp, atp = columns["effect"], columns["atp"]
    ignore = columns["skipped"] | relp.isnan()
    found = check(
        relp, exact.effects, k=k, tail=tail, seed=seed, ignore=ignore, subsets=subsets, theta=theta
    )
    truth, part = found.scattered(len(relp))
    live = (~ignore).nonzero()[:, 0]
    named = live[atp[live].abs().argsort(descending=True, stable=True)][:k]
    left = named[part[named] == 0]
    if len(left):
        truth[left] = run_sets(exact.effects, [[int(cell)] for cell in left], "exact effects")
    part[named] = torch.where(part[named] == 1, 1, 3)
    run = part > 0
    drawn, others = int((part == 2).sum()), int((part[live] % 2 == 0).sum())
    weight = torch.where(part[run] == 2, others / max(drawn, 1), 1.0).double()
    both = [_agreement(guess[run].double(), truth[run], weight).pearson for guess in (relp, atp)]
    return _Checked(found, relp, atp, truth, part, *both)
