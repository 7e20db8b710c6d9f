"""Attribution patching: the effects of all patches at once, estimated from gradients, then checked.

    atp     estimate = (a_clean - a_contrast) . dm/da                       2 forwards, 1 of both
            (or a_clean - value, at the clean run: zeros, means)
    ig      the gradient is the mean along the way of the whole activation  steps of both per site
            of one site and layer from one run's to the other's               and layer
    atp*    queries and keys: the softmax is recomputed (QK fix);           L + 1 backwards
            everything: mean |estimate| over backwards without the writes
            of one layer (GradDrop), so that paths which cancel are seen

m is the metric, a the activation of a part. The estimates have the sign and the scale of
`activation_patching`, cell by cell: positive supports the answer. They are first order; how far
that carries is measured on the spot, by exact patching of the strongest cells and of random others.

What this does not do: edges (`edge_attribution`), backward rules (`relevance_patching`).
"""

from typing import TYPE_CHECKING, Literal

import torch

from underhood.core.errors import UsageError
from underhood.core.model import Model
from underhood.core.provenance import describe
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
from underhood.methods.locate._grids import answered, dataset, labels_of, words
from underhood.methods.locate._options import at_least, written_by
from underhood.methods.locate._patching import ExactPatching
from underhood.methods.locate._places import names_of
from underhood.methods.locate._saturation import KEY, QUERY
from underhood.methods.locate._verify import Verified
from underhood.methods.locate._verify import verify as check
from underhood.methods.registry import method
from underhood.view import Result, View, group

if TYPE_CHECKING:
    import xarray

__all__ = ["attribution_patching"]

_NAMES = {"atp": "Attribution patching", "atp*": "AtP*", "ig": "Integrated gradients"}


@method
def attribution_patching(
    model: Model,
    pairs: Pairs,
    *,
    sites: str | tuple[str, ...] = "z",
    units: Literal["auto", "whole", "each"] | tuple[int, ...] = "auto",
    method: Literal["atp", "atp*", "ig"] = "atp",
    grad_at: Literal["base", "clean", "corrupt", "both"] = "base",
    direction: Literal["denoise", "noise"] = "denoise",
    metric: str = "logit_diff",
    positions: Literal["each", "all", "last"] | tuple[int, ...] = "each",
    value: Literal["resample", "mean", "mean-position", "zero"] = "resample",
    steps: int = 10,
    verify: int = 20,
    tail: int = 20,
    subsets: int = 0,
    theta: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """The effect of every patch at once, estimated from gradients and checked on a sample.

    Args:
        pairs: Clean and contrast prompts. Without answers: the model's own top token after the
            clean prompt, against its top token after the contrast.
        sites: Where, in every layer: "z" (heads), "q", "k", "mlp_out", "mlp_post", "resid_post",
            "expert_out", "router_logits", ... Several sites need the same axes.
        units: What is a cell of its own: "auto" heads one by one and other sites whole; "whole"
            all heads together too; "each" neuron, expert, router logit or dimension; or numbers.
        method: "atp", "atp*" (unsigned) or "ig".
        grad_at: The run that gradients are taken at: the one that `direction` edits ("base"), the
            clean one, the contrast ("corrupt"), or both, averaged. Integrated gradients start
            there.
        direction: "denoise": as if the clean activation were written into the contrast run;
            "noise": the contrast's into the clean run. The estimate depends on it only by
            `grad_at="base"`, the exact check always.
        metric: A name of `underhood.data.METRICS`, any but "rank".
        positions: "each" position by itself, "all" at once, the "last" only, or numbers. At "all"
            estimates are sums over positions, except keys of "atp*", which are moved together.
        value: What noising would write: the contrast run's activation ("resample"); its mean over
            all prompts and tokens except the first ("mean"), or over all prompts at that position
            ("mean-position", prompts of one structure only); or zeros. Gradients are then taken at
            the clean run, the only run that holds the way's beginning.
        steps: Of integrated gradients, in the middle of equal parts of the way.
        verify: Exact patching of so many of the strongest cells; 0: no check.
        tail: And of so many random others.
        subsets: Random subsets of the rest to patch jointly, for a bound on what was missed.
        theta: An effect (1 is the whole way) to ask about: how likely is it that a cell that was
            not run reaches it?
        seed: Of the random cells and subsets.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Over `layer`, then the units' axis (`head`, `neuron`, `expert`, ...), then `pos` for "each"
        (and first `site`, where there are several): `effect` (the estimate; no unit, 1 is the whole
        way from contrast to clean), `sem` (over rows), `raw` (in the metric's unit), `skipped`
        (both runs hold the same there: exactly 0), `rows`, and with `batch` `change` (the
        estimate of each row, in the metric's unit); for "atp*" also `signed` (as `effect`, with the
        QK fix and without GradDrop). From the check: `exact` (as `effect`; NaN where not run),
        `verified` (0 no, 1 as one of the strongest, 2 at random), and the numbers `pearson_top`,
        `pearson_tail`, `pearson_all`, `spearman_...`, `pearson_chance`, `recall`, `missed_bound`,
        `missed_p`. Over `batch`: `clean`, `contrast`.

    Raises:
        PairError: Pairs that cannot be compared, or whose metric is the same at both ends; a mean
            per position over prompts of different length.
        UsageError: A metric without gradient; sites that `activation_patching` refuses too; a
            `value` that the direction, `grad_at` or the QK fix of "atp*" cannot be about.
        NotOffered: A site that this model lacks; "atp*" at queries or keys of a family whose
            pattern cannot be recomputed from them; "ig" for some of the units of a site.
        NotFinite: Gradients or estimates that are not numbers.

    Cost: atp: 2 forwards to read, then 1 forward and backward for all cells. ig: `steps` of both
        per site and layer. atp*: 1 forward and L + 1 backwards, and 2 more forwards for queries and
        keys. All twice at "both". The check: one row per cell run and pair; a subset is one cell.

    Source: Nanda 2023, "Attribution patching"; Kramár et al. 2024, "AtP*" (QK fix, GradDrop, the
        diagnostic); Hanna et al. 2024 (integrated gradients of activations; steps there end at the
        clean run, here they lie in the middle of their parts). Ours: the closed form of the key
        fix; GradDrop divides by the passes in which a part is not itself dropped (L for the
        stream, L - 1 for heads, MLPs and their insides); the check's weights and permuted control.

    Misleads: a saturated softmax has no gradient: "atp" finds nothing at sure heads' queries and
        keys. Norms bend straight lines: estimates for the stream and for MLP outputs may be far
        off (look at the correlation on random cells, and at `relevance_patching`). A router's
        choice of experts jumps: no gradient sees it, and "ig" is not complete there. Estimates that
        cancel inside a cell may hide a large effect. Zeros and means may lie further from where the
        gradient was taken than the contrast does. "atp*" has no sign, and is larger than the
        exact effect where effects cancel.

    Example:
        >>> import underhood as uh
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = attribution_patching(uh.load(), pair, positions="all", verify=8, tail=8)
        >>> bool(found["pearson_all"] > 0.5)
        True
    """
    at_least(1, steps=steps, batch_size=batch_size)
    asked = Asked(
        names_of(model, sites, units), direction, differentiable(metric), positions, value, 0,
        seed, batch_size, units,
    )  # fmt: skip
    _check_value(asked, method, grad_at)
    encoded, origin = answered(model, pairs.encode(model), asked.metric, batch_size)
    job, exact = estimated(model, encoded, asked, How(method, runs_at(grad_at, asked), steps))
    columns = estimate_columns(job, asked)
    if method == "atp*":  # a size, also where the clean prompt scores lower than the contrast
        columns["effect"] = columns["effect"].abs()
    checked = _checked(
        columns, exact, k=verify, tail=tail, subsets=subsets, theta=theta, seed=seed,
        unsigned=method == "atp*",
    )  # fmt: skip
    scalars = checked.scalars() if checked is not None else {}
    labels = words(encoded, pairs)
    data = dataset(job.found, asked, columns, labels, scalars)
    return Result(
        name="attribution_patching",
        data=data,
        view=_view(data, asked, method, checked, labels_of(job.found.cells, labels)),
        provenance=describe(
            model, sites=[str(s) for s in asked.names], estimate=method, grad_at=grad_at,
            direction=direction, metric=metric, positions=positions, value=value, units=units,
            seed=seed, steps=steps if method == "ig" else None, path=_path(method), rows=len(pairs),
            answers=origin, forwards=job.forwards, backwards=job.backwards,
            verified=0 if checked is None else len(checked.cells), subsets=subsets,
        ),
    )  # fmt: skip


def _check_value(asked: Asked, method: str, grad_at: str) -> None:
    """A value that no run holds has one run to come from, and no softmax to be recomputed."""
    written_by(asked.direction, asked.value)
    if asked.value == "resample":
        return
    if grad_at not in ("base", "clean"):
        raise UsageError(
            "zeros and means are written into the clean run, and gradients are taken there",
            given=f"grad_at={grad_at!r}, value={asked.value!r}",
            why="the contrast run does not hold them, so the way does not pass through it",
            do="leave grad_at out",
        )
    fixed = [site.name for site in asked.names if site.name in (*QUERY, *KEY)]
    if method == "atp*" and fixed:
        raise UsageError(
            "the QK fix exchanges the queries and keys of two runs",
            given=f"sites {', '.join(fixed)}, value={asked.value!r}",
            why="it recomputes the softmax with those of the contrast run",
            do="method='atp' or 'ig', or value='resample'",
        )


def _path(method: str) -> str | None:
    return "the activation itself, site by site and layer by layer" if method == "ig" else None


def _checked(
    columns: dict[str, torch.Tensor],
    exact: ExactPatching,
    *,
    k: int,
    tail: int,
    subsets: int,
    theta: float | None,
    seed: int,
    unsigned: bool,
) -> Verified | None:
    """Exact patching of a sample; its numbers join the columns, on the scale of `effect`."""
    if k < 1:
        return None
    found = check(
        columns["effect"], exact.effects, k=k, tail=tail, seed=seed, unsigned=unsigned,
        ignore=columns["skipped"] | columns["effect"].isnan(), subsets=subsets, theta=theta,
    )  # fmt: skip
    columns["exact"], columns["verified"] = found.scattered(len(columns["effect"]))
    return found


def _view(
    data: "xarray.Dataset", asked: Asked, method: str, checked: Verified | None, labels: list[str]
) -> View:
    note = "Estimated from gradients, not run."
    if method == "atp*":
        note += " Sizes without a sign: the mean over backward passes without one layer's writes."
    title = _NAMES[method]
    drawn = grid_view(data, asked, title, note=note)
    if checked is None:
        return drawn
    return group([drawn, checked.view(labels, unit="of the way")], title=title)
