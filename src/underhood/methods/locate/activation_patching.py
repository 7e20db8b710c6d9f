"""Activation patching: what a place holds, put into the other run, and the answer read again.

    denoise: run the contrast, write the clean activation: (patched - contrast) / (clean - contrast)
    noise:   run the clean prompt, write the contrast's:   (clean - patched) / (clean - contrast)

Denoising finds places that suffice to restore the answer, noising places that it needs; where a
model has backups the two disagree. Every number is the effect of a real forward with one edit, not
an estimate, and stands beside a control: at the same cells, changes of the same length in random
directions.

What this does not do: several places at once (effects do not add up), paths between places.
"""

from dataclasses import replace
from typing import Literal

from torch import Tensor

from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.site import Site
from underhood.data import EncodedPairs, Pairs, metric_named
from underhood.methods.locate._asked import Asked
from underhood.methods.locate._estimates import How, estimated
from underhood.methods.locate._grid_views import grid_view
from underhood.methods.locate._grids import answered, columns_of, dataset, words
from underhood.methods.locate._options import at_least, written_by
from underhood.methods.locate._patching import patched
from underhood.methods.locate._places import Spots, Units, names_of
from underhood.methods.locate._written import Learning
from underhood.methods.registry import method
from underhood.view import Result

__all__ = ["activation_patching"]


@method
def activation_patching(
    model: Model,
    pairs: Pairs,
    *,
    sites: str | tuple[str, ...] = "resid_pre",
    units: Literal["auto", "whole", "each", "top"] | tuple[int, ...] = "auto",
    top: int = 20,
    direction: Literal["denoise", "noise"] = "denoise",
    metric: str = "logit_diff",
    positions: Literal["each", "all", "last"] | tuple[int, ...] = "each",
    value: Literal["resample", "mean", "mean-position", "zero", "optimal"] = "resample",
    steps: int = 1000,
    rate: float = 1e-3,
    control: bool = True,
    draws: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """The exact effect of every layer and position, head, neuron or expert on the answer.

    Args:
        pairs: Clean and contrast prompts. Without answers: the model's own top token after the
            clean prompt, against its top token after the contrast.
        sites: What to patch in every layer: "resid_pre", "attn_out", "mlp_out", "z", "mlp_post",
            "expert_out", "router_logits", ... Several sites need the same axes.
        units: What is patched by itself: "auto" heads one by one and other sites whole; "whole" all
            heads together too; "each" neuron, expert, router logit or dimension; numbers; "top" the
            units with the largest attribution (one backward pass over all of them).
        top: How many units "top" takes, over all layers.
        direction: "denoise" writes the clean activation into the contrast run; "noise" the
            contrast's into the clean run.
        metric: A name of `underhood.data.METRICS`.
        positions: "each" position by itself, "all" at once, the "last" only, or numbers.
        value: What noising writes: the contrast run's activation ("resample"); its mean over all
            prompts and tokens except the first ("mean"), or over all prompts at that position
            ("mean-position", prompts of one structure only); zeros, which no run ever holds; or the
            constant that hurts the metric least, learned for each cell ("optimal").
        steps: Of learning that constant, at most; it ends when 50 steps brought nothing.
        rate: Of learning (Adam), in the activation's own unit.
        control: Run the control as well.
        draws: Random directions per cell in the control; the strongest is shown.
        seed: Of these.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Over `layer`, then `head`, `neuron`, `expert` or `d_model` where units are patched, then
        `pos` for "each" (and first `site`, where there are several): `effect` (no unit; 1 is the
        whole way from contrast to clean, positive supports the answer), `sem` (its standard error
        over rows, NaN for one), `raw` (the effect in the metric's unit), `control` (of random
        directions, the strongest draw), `skipped` (nothing was run: both runs are equal there, or
        the expert was not chosen; the effect is exactly 0), `rows` (how many rows have the
        position), and with `batch` the metric itself, `patched`. Over `batch`: `clean`, `contrast`,
        in the metric's unit. Positions count from each row's own first token; the effect is the
        mean change over rows by the mean distance between the two ends over the same rows. Cells
        that "top" left out are NaN.

    Raises:
        PairError: Pairs that cannot be compared, or whose metric is the same at both ends; a mean
            per position over prompts of different length.
        UsageError: Sites without layers or positions, of different axes, or named with a unit; more
            cells than anybody would wait for.
        OutOfRange: Units or positions that are not there.
        NotOffered: A site that this model lacks.

    Cost: 2 forwards to read, then one row per cell and pair, times 1 + draws with the control;
        cells where the two runs agree are not run (all before the first differing token). No
        backward, except: "top" adds one forward and backward; "optimal" up to `steps` of both per
        cell and pair.

    Source: Vig et al. 2020, "Causal mediation analysis"; Meng et al. 2022; names and pitfalls after
        Zhang & Nanda 2023, "Towards best practices of activation patching". Optimal constants: Li &
        Janson 2024, "Optimal ablation". Ours: cells with equal activations are found by comparing
        them; the control; constants are learned on the pairs themselves and end early.

    Misleads: backup parts hide what noising removes, so a needed part may show nothing. Effects of
        single cells do not add up. One pair shows one pair: see `sem`. Zeros and means put the
        model where it never is. An optimal constant may beat the clean run (a negative effect), and
        fits few pairs too well; take metric="kl" to measure what is lost. An expert that the edited
        run does not choose cannot be patched: patch router_logits to change the choice.

    Example:
        >>> import underhood as uh
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = activation_patching(uh.load(), pair, control=False)
        >>> bool(found["effect"].sel(layer=0, pos=4) > 0.99)
        True
    """
    written_by(direction, value)
    at_least(1, draws=draws, batch_size=batch_size, top=top, steps=steps)
    split: Units = "each" if units == "top" else units
    asked = Asked(
        names_of(model, sites, split), direction, metric_named(metric), positions, value,
        draws if control else 0, seed, batch_size, split, learning=Learning(steps, rate),
    )  # fmt: skip
    encoded, origin = answered(model, pairs.encode(model), asked.metric, batch_size)
    if units == "top":
        asked = replace(asked, chosen=_strongest_units(model, encoded, asked, top))
    found = patched(model, encoded, asked)
    columns = columns_of(found, asked) | {"patched": found.values}
    data = dataset(found, asked, columns, words(encoded, pairs))
    return Result(
        name="activation_patching",
        data=data,
        view=grid_view(data, asked, "Activation patching"),
        provenance=describe(
            model, sites=[str(s) for s in asked.names], direction=direction, metric=metric,
            positions=positions, value=value, units=units, draws=asked.draws, seed=seed,
            rows=len(pairs), answers=origin, how=found.how, passes=found.passes,
        ),
    )  # fmt: skip


def _strongest_units(
    model: Model, pairs: EncodedPairs, asked: Asked, top: int
) -> dict[Site, tuple[int, ...]]:
    """Per site and layer the units among the `top` strongest by attribution patching.

    A unit's strength is the size of its attribution, summed over rows and over the positions asked
    for (all of them, for "each").
    """
    spots: Spots = "all" if asked.positions == "each" else asked.positions
    search = replace(asked, value="resample", positions=spots, draws=0)
    at = (not asked.denoises,)
    job, _ = estimated(model, pairs, search, How("atp", at, 1))
    start = job.found.contrast if asked.denoises else job.found.clean
    size = (job.found.values - start).nan_to_num().abs().sum(1)
    totals: dict[Site, Tensor] = {}
    for cell, value in zip(job.found.cells, size, strict=True):
        totals[cell.site] = totals.get(cell.site, 0) + value
    best = sorted(totals, key=lambda site: -float(totals[site]))[:top]
    found: dict[Site, tuple[int, ...]] = {}
    for site in sorted(best):
        found[site.whole] = (*found.get(site.whole, ()), site.unit or 0)
    return found
