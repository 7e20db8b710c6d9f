"""Subspaces: a few directions that carry what decides the answer, and whether that is an illusion.

    h = h_b + R'R (h_s - h_b)

The base run (clean) gets the source run's (contrast's) part along a subspace R and nothing else. If
it then says what the contrast calls for, R *suffices* to carry the decision: distributed alignment
search (DAS) trains R for that. Such training can also find a direction that the model does not use
and that works all the same (Makelov et al. 2023); so every result holds the illusion diagnostic
(`_illusion`), besides random subspaces, permuted labels and the whole activation.

    found = subspace(model, pairs, site="resid_post", k=4)
    edit = subspace_edit(found, model.run(contrasts, record="resid_post.2"), layer=2)
    illusion_report(model, pairs, "mlp_post.2", direction)

What this does not do: several places at once, or variables with more than the two values of a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.ops import swap_subspace
from underhood.core.provenance import describe
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.tokens import Where
from underhood.data import Pairs
from underhood.methods.locate._das import TRAINED, Learned, Training, learn
from underhood.methods.locate._illusion import arms, dataset
from underhood.methods.locate._interchange import Interchange, answered, spots
from underhood.methods.locate._options import at_least
from underhood.methods.locate._readout import readout
from underhood.methods.locate._subspace_asked import (
    Reader,
    check_same,
    check_width,
    directions_given,
    divide,
    reader_of,
    sites_of,
    works,
)
from underhood.methods.locate._subspace_view import headline, report_view, search_view
from underhood.methods.registry import method
from underhood.view import Result

if TYPE_CHECKING:
    import xarray

__all__ = ["illusion_report", "subspace", "subspace_edit"]


@method
def subspace(
    model: Model,
    pairs: Pairs,
    *,
    site: str = "resid_post",
    layers: tuple[int, ...] | None = None,
    positions: str | int = "last",
    k: int = 1,
    kind: Literal["das", "boundless", "mask", "mask-pca", "mean-difference", "pca"] = "das",
    loss: Literal["label", "logit_diff"] = "label",
    steps: int = 100,
    lr: float = 0.02,
    sparsity: float = 0.1,
    rows_per_step: int = 16,
    held_out: float = 0.5,
    reader: tuple[str, ...] = (),
    control: bool = True,
    draws: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """A subspace whose exchange changes the answer, layer by layer, and whether it is an illusion.

    Args:
        pairs: Clean and contrast prompts; the contrast's answer (`wrong`) is what a swapped run
            should say. Without answers: the model's own top tokens.
        site: A site with one vector per position: "resid_post" (every layer), "mlp_post.2",
            "z.9.6" (heads one at a time), ...
        layers: Of a site named without a layer, only these.
        positions: "last", "changed" (each row's first differing token), "all", a number (from the
            row's own first token, or negative), or a word of `pairs.word_positions`.
        k: Dimensions; "boundless" and the masks find their own number and do not read it.
        kind: "das" (a learned rotation to k dimensions), "boundless" (a full rotation and a learned
            boundary), "mask" (a mask over the site's own axes), "mask-pca" (over principal
            components), "mean-difference" (k = 1), "pca" (main directions of the differences).
        loss: What training lowers: "label" (cross-entropy on the contrast's answer, nats) or
            "logit_diff" (answers minus wrong, logits).
        steps: Optimizer steps (Adam).
        lr: Its learning rate.
        sparsity: Price, in units of the loss, of keeping all dimensions ("boundless" and masks).
        rows_per_step: Pairs of one step.
        held_out: Share of the pairs kept from training; all numbers are theirs. Equal pairs (also
            with clean and contrast exchanged) stay on one side.
        reader: What reads the site, for the diagnostic: for sites of the stream e.g. ("q.9.9",
            "q.9.6"), "mlp_pre.3", "logits". Default: what comes next.
        control: Also learn from permuted labels, each from a pair that has another one (trained
            kinds only, and where labels differ); doubles the cost.
        draws: Random subspaces of equal size; the strongest is shown.
        seed: Of the split, the start, the permutation and the random subspaces.
        batch_size: Rows of one pass of the sweeps; the numbers do not depend on it.

    Returns:
        Over `layer` and `part` ("subspace"; its "row" part, which the read-out sees; its "null"
        part; "full", the whole activation; "random"; "permuted"), on the held-out pairs:
        `accuracy` (share of rows whose top token is the contrast's answer: interchange accuracy),
        `flipped` (share whose logit difference turns negative), `effect` (share of the way from
        clean to contrast, positive where the place supports the answer) with `sem`, `fldd`
        (100 (1 - LD_swapped / LD_clean), percent), and with `batch` the logit difference itself,
        `patched`. Over `batch`: `clean`, `contrast` (logits), `reached` (the contrast run says its
        answer: the ceiling). Over `layer`: `basis` with `feature` and the site's axis (orthonormal
        rows, NaN-padded), `size`, `row_norms` and `null_norms` per direction, `disconnected`,
        `dormant` (shares, see `_illusion`), `rank` of the read-out (-1: none known), `illusion`,
        coordinate `verdict`; `train_accuracy` (on the pairs learned from), `permuted_fit` (the
        same for permuted labels: what training can force), `loss` over `step`.

    Raises:
        UsageError: A site without one vector per position, or an unknown position or reader.
        OutOfRange: k not below the site's width, or options that are no amounts.
        PairError: Fewer than four different pairs, unequal lengths, pairs that do not differ there.

    Cost: per layer `steps` forwards and backwards over `rows_per_step` rows of the whole model (the
        backward stops at the site; no gradient of a weight is computed), twice with the control;
        then two sweeps of 5 + draws cells over the held-out pairs. "boundless" also exponentiates a
        d x d matrix each step.

    Source: DAS: Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and
        Distributed Neural Representations"; boundless: Wu et al. 2023; masks: as in MIB (Mueller
        et al. 2025); illusion, FLDD: Makelov et al. 2023, "Is This the Subspace You Are Looking
        for?". Ours: the split for more than one direction, the two shares, the thresholds of the
        verdict, permuted labels, the boundary's start at a quarter of narrow widths.

    Misleads: training finds what *suffices*, not what the model uses: read `verdict`. Accuracy of
        the best layer of several is chosen after the fact. A large k or few pairs fit anything on
        the pairs trained on: compare `train_accuracy`. Boundaries and masks shrink slowly: their
        `size` after few steps is an upper bound, and random subspaces of that size do much too.
        With two labels in all, permuted labels say "do not swap". Where the prompts'
        roles are drawn at random, the mean difference is noise. In the stream the null part may act
        (`rank` says how much the read-out sees); "cleared" there means no more than that.

    Example:
        >>> import underhood as uh
        >>> from underhood.organisms import organism
        >>> pairs = organism("town").pairs("agreement", 16)
        >>> found = subspace(uh.load(), pairs, site="resid_post.2", steps=20, control=False)
        >>> bool(found["effect"].sel(part="subspace") > found["effect"].sel(part="random"))
        True
    """
    at_least(1, k=k, steps=steps, draws=draws, rows_per_step=rows_per_step,
                   batch_size=batch_size or 1)  # fmt: skip
    if not lr > 0 or sparsity < 0 or not 0 < held_out < 1:
        raise OutOfRange(
            "lr must be above 0, sparsity not below it, and held_out between 0 and 1",
            given=f"lr={lr}, sparsity={sparsity}, held_out={held_out}",
            do="leave them out",
        )
    if kind == "mean-difference" and k != 1:
        raise OutOfRange("a mean difference is one direction", given=f"k={k}", do="use kind='pca'")
    # What is wrong with the pairs is said before the model runs.
    pairs.encode(model)
    divide(pairs, held_out, seed)
    sites = sites_of(model, site, layers)
    check_width(sites, [model.size(place, place.kind.axes[-1]) for place in sites], k)
    readers = [reader_of(model, place, reader) for place in sites]
    asked = Training(kind, k, steps, lr, loss, sparsity, rows_per_step, seed)
    train, test, origin = works(model, pairs, sites, positions, held_out, seed, batch_size)
    check_width(sites, [train.base[place].shape[-1] for place in sites], k)
    check_same(train, sites)
    found = [_search(train, place, asked, control=control) for place in sites]
    more = {p: {"permuted": f.permuted.basis} for p, f in zip(sites, found, strict=True)
            if f.permuted is not None}  # fmt: skip
    results = arms(
        test, [(p, f.learned.basis, r.map) for p, f, r in zip(sites, found, readers, strict=True)],
        draws=draws, seed=seed, more=more,
    )  # fmt: skip
    data = dataset(results, test)
    data = _with_training(data, train, sites, found)
    facts = describe(
        model, site=[str(s) for s in sites], positions=positions, kind=kind, k=k, loss=loss,
        steps=steps, lr=lr, sparsity=sparsity, trained_on=len(train), tested_on=len(test),
        readers=[r.name for r in readers], draws=draws, seed=seed, answers=origin,
    )  # fmt: skip
    lines = headline(data, facts)
    return Result("subspace", data, search_view(data, facts, lines), facts | {"headline": lines[0]})


def illusion_report(
    model: Model,
    pairs: Pairs,
    site: str | Site,
    directions: Tensor,
    *,
    positions: str | int = "last",
    reader: Tensor | Sequence[str] | None = None,
    draws: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """What a given direction or subspace does, split by what reads the site: used, or an illusion?

    Args:
        model: The model.
        pairs: As for `subspace`; all of them are used.
        site: One site of one layer (and head).
        directions: `[d]` or `[k, d]`, any length; their span counts.
        positions: As for `subspace`.
        reader: What reads the site: names of readers, or a matrix `[d, out]` applied as `h @ W`;
            default: the output projection for mlp_post and z, else what comes next.
        draws: Random subspaces of equal size; the strongest is shown.
        seed: Of these.
        batch_size: Rows of one pass of the sweeps.

    Returns:
        The variables of `subspace` that need no training, over one `layer`.

    Raises:
        ShapeMismatch: Directions or a matrix that do not fit the site.
        SelfCheckFailed: The null part alone changes the answer, although nothing reads it.

    Cost: two forwards, and two sweeps of 4 + draws cells over the pairs.

    Source: Makelov et al. 2023; see `subspace`.

    Example:
        >>> import underhood as uh
        >>> from underhood.methods.locate.subspace import illusion_report
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is")
        >>> model = uh.load()
        >>> neuron = torch.eye(model.config.intermediate_size)[7]
        >>> report = illusion_report(model, pair, "mlp_post.2", neuron)
        >>> str(report["verdict"].values[0])
        'no effect'
    """
    at_least(1, draws=draws, batch_size=batch_size)
    (place,) = sites_of(model, str(site), None, one=True)
    encoded, origin = answered(model, pairs.encode(model))
    work = Interchange(
        model, encoded, [place], spots(encoded, pairs, positions), batch_size=batch_size
    )
    check_same(work, [place])
    basis = directions_given(directions, work.base[place].shape[-1], place)
    if isinstance(reader, Tensor):
        read = Reader(readout(reader, basis.shape[1]))
    else:
        read = reader_of(model, place, tuple(reader or ()))
    results = arms(work, [(place, basis, read.map)], draws=draws, seed=seed)
    data = dataset(results, work)
    facts = describe(
        model, site=[str(place)], positions=positions, readers=[read.name], draws=draws, seed=seed,
        tested_on=len(work), answers=origin,
    )  # fmt: skip
    return Result("illusion_report", data, report_view(data, facts), facts)


def subspace_edit(
    result: Result,
    source: Run | Float[Tensor, "rows pos d"],
    *,
    layer: int | None = None,
    where: Where | int | None = None,
) -> Edit:
    """The swap of a subspace that was found, as an edit: along its basis, `source`'s activation.

    Args:
        result: From `subspace` or `illusion_report`, fresh or loaded.
        source: A run that recorded the site, or its activations in each row's own positions.
        layer: Which of the result's layers; None where there is one.
        where: Default: the positions of the search, where they are the same in every prompt.

    Raises:
        UsageError: No such layer; positions that depend on the prompt.
    """
    known = [int(n) for n in result["layer"].values]
    if layer is None and len(known) == 1:
        layer = known[0]
    if layer not in known:
        raise UsageError(
            "this result holds no such layer" if layer is not None else "say which layer",
            given=f"layer={layer}",
            do=f"use one of {', '.join(map(str, known))}",
        )
    at = known.index(layer)
    basis = torch.as_tensor(result["basis"].values[at][: int(result["size"].values[at])]).float()
    if where is None:
        where = _where(result.provenance["positions"])
    if not isinstance(source, Run):
        source = source.float()
    return Edit(result.provenance["site"][at], swap_subspace(basis, source), where)


def _where(positions: str | int) -> Where:
    if positions in ("last", "all"):
        return Where(-1 if positions == "last" else None)
    try:
        return Where(int(positions))
    except ValueError:
        raise UsageError(
            "the swapped position depends on the prompt",
            given=f"positions={positions!r}",
            do="say where: where=Where(pos=...)",
        ) from None


# The search --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """What one layer's search gave, and the same search with permuted labels."""

    learned: Learned
    permuted: Learned | None
    labels: Tensor | None


def _search(train: Interchange, site: Site, asked: Training, *, control: bool) -> _Found:
    learned = learn(train, site, asked)
    labels = _permuted(train.pairs.wrong, asked.seed) if asked.kind in TRAINED and control else None
    permuted = learn(train, site, asked, labels=labels) if labels is not None else None
    return _Found(learned, permuted, labels)


def _permuted(labels: Tensor, seed: int) -> Tensor | None:
    """Each row's label taken from a row that has another one; None where all have the same.

    A plain permutation of two labels leaves half of them right, and what is learned from them is a
    coin's choice between swapping and not.
    """
    make = torch.Generator().manual_seed(seed + 1)
    rows = []
    for own in labels:
        others = (labels != own).any(1).nonzero()[:, 0]
        if not len(others):
            return None
        rows.append(int(others[torch.randint(len(others), (1,), generator=make)]))
    return labels[rows]


def _with_training(
    data: "xarray.Dataset", train: Interchange, sites: Sequence[Site], found: Sequence[_Found]
) -> "xarray.Dataset":
    """Adds what the search says of the pairs that it learned from."""
    cells = [train.swap(s, f.learned.basis) for s, f in zip(sites, found, strict=True)]
    fitted = [(s, f) for s, f in zip(sites, found, strict=True) if f.permuted is not None]
    data["train_accuracy"] = ("layer", train.hits(cells).mean(1).numpy())
    if fitted and (labels := fitted[0][1].labels) is not None:
        own = train.relabelled(labels)
        plans = [own.swap(s, f.permuted.basis) for s, f in fitted if f.permuted is not None]
        data["permuted_fit"] = ("layer", own.hits(plans).mean(1).numpy())
    if found[0].learned.losses:
        data["loss"] = (("layer", "step"), [f.learned.losses for f in found])
    return data
