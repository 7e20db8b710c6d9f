"""Contextual decomposition (CD-T): how much of the logit difference is due to each node.

Each activation is split into what is due to one node (beta) and the rest (gamma), and both are
carried to the logits (`circuits.decomposition`). A node's contribution is beta's share of the logit
difference. One recorded run and no gradients: nodes are rows of one batch.

Patterns are those of the whole. What a node does by moving attention (the first head of an
induction circuit, all queries and keys) therefore counts as nothing, and the exact effects beside
the contributions show it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.decomposition import Decomposition, Followed
from underhood.circuits.wiring import Wiring
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.sweep import rows_per_pass
from underhood.data import Pairs, metric_named
from underhood.methods.locate._cuts import Cuts
from underhood.methods.locate._options import at_least
from underhood.methods.locate._verify import Verified
from underhood.methods.locate._verify import verify as check
from underhood.methods.registry import method
from underhood.view import Result, View, bars, group, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["contextual_decomposition"]

_ABLATIONS = {"contrast": "resample", "mean": "mean"}
_CHANCE = 0.95
_HIDDEN = 0.5  # of an exact effect: a contribution further off is pointed out
_SMALL = 0.05  # of the largest exact effect: nothing to point out


@method
def contextual_decomposition(
    model: Model,
    pairs: Pairs,
    *,
    reference: Literal["contrast", "mean"] = "contrast",
    biases: Literal["shared", "rest"] = "shared",
    collapse: bool = False,
    draws: int = 3,
    verify: int = 10,
    tail: int = 10,
    top: int = 20,
    batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """What each node adds to the logit difference, carried through the model in two parts.

    Args:
        pairs: Clean and contrast prompts of equal length, with answers and wrong answers.
        reference: A node's own part is what it writes in the clean run minus what it writes in the
            "contrast", or minus its "mean" over all prompts and positions.
        biases: Of norms and values: "shared" in proportion |beta| : |gamma| (the paper), or to the
            "rest", so that beta holds nothing but the node's change.
        collapse: Where the two parts have opposite signs, give both to the larger (the paper's
            code). Contributions are then no longer linear in what the node writes.
        draws: Random directions of equal norm in each node's place, as a control.
        verify: How many of the strongest nodes to patch exactly; 0: no check.
        tail: How many random others to patch as well.
        top: Nodes shown.
        batch_size: Prompts of one pass; nothing depends on it.
        seed: Of the random directions and the random others.

    Returns:
        Over `node` (input, heads, MLPs): `contribution` (logits; positive supports the answer),
        `sem` (over prompts, NaN for one), and with `batch` `change`. Controls, with `draw` and
        `node`: `control`, the contribution of a random direction of equal norm, and `chance`,
        the 95th percentile of its size over all draws and nodes. From the check: `exact` (what the
        logit difference loses when the node is patched for all that read it; NaN where not run),
        `verified` (0 no, 1 among the strongest, 2 at random) and numbers as in `edge_attribution`
        (`pearson_all`, ...). Over `batch`: `clean`, `contrast` (logit differences). `sum_error`:
        the largest difference between beta + gamma and the model's own activation anywhere, as a
        share of its size.

    Raises:
        PairError: The contrast gives the same logit difference, or prompts that cannot be compared.
        NotOffered: Heads that cannot be told apart, or a stream that is not a sum of what parts
            write.
        OutOfRange: A number outside its range.

    Cost: forwards only. 1 run of each prompt; for all nodes together the MLPs of (1 + draws) *
        nodes * 2 forwards, and the heads' values; 1 row per node checked and prompt.

    Source: Hsu et al. 2024, "CD-T" (2407.00886). Ours: MLPs as one function (gated ones, mixtures;
        the paper splits at the activation, which in a plain MLP differs only in who gets biases),
        norms after sub-layers with their scale frozen, `biases`, the random directions, and the
        exact check. The paper's search over targets is not here: the logits are the only one.

    Misleads: patterns are held: a node that acts by moving attention gets nothing, however
        necessary it is (the check points this out). Norm scales are held too. Contributions of
        nodes that lie behind each other count the same way twice and do not add up. With
        `biases="shared"` a node may get a bias that does not depend on it. MLPs are bent: what
        beta gets depends on gamma being there (that is the point), so that two nodes with equal
        outputs need not get the same. Under a soft cap contributions are those before it.

    Example:
        >>> from underhood.organisms import wired
        >>> organism = wired("induction")
        >>> found = contextual_decomposition(organism.model, organism.pairs(n=8))
        >>> strongest = found["contribution"].argmax("node")
        >>> str(found["node"].values[int(strongest)])
        'a1.h1'
    """
    at_least(1, draws=draws, top=top, batch_size=batch_size)
    at_least(0, verify=verify, tail=tail)
    wiring = Wiring(model)
    encoded = pairs.encode(model)
    cuts = Cuts(wiring, encoded, metric_named("logit_diff"), _ABLATIONS[reference], batch_size)
    found = _followed(cuts, _How(biases, collapse, draws, seed))
    mean = found.change.mean(1)
    checked = None
    if verify:

        def exact(sets: Any) -> Tensor:
            return cuts.drops(sets).mean(1)

        checked = check(mean, exact, k=verify, tail=tail, seed=seed)
    data = _data(cuts, found, checked)
    return Result(
        name="contextual_decomposition",
        data=data,
        view=_view(data, checked, top),
        provenance=describe(
            model, pairs=len(pairs), reference=reference, biases=biases, collapse=collapse,
            draws=draws, verify=verify, tail=tail, seed=seed, metric="logit_diff",
            passes=cuts.passes, decompositions=found.passes, sum_error=found.error,
        ),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _How:
    biases: str
    collapse: bool
    draws: int
    seed: int


@dataclass(slots=True)
class _Found:
    """Contributions of all nodes, and of random directions in their place."""

    change: Float[Tensor, "node batch"]
    control: Float[Tensor, "draw node"]
    error: float
    passes: int


def _followed(cuts: Cuts, how: _How) -> _Found:
    """All nodes followed, a few prompts and nodes at a time."""
    pairs, wiring = cuts.pairs, cuts.wiring
    nodes = range(len(wiring.graph.sources))
    size = cuts.batch_size or rows_per_pass(pairs.clean.ids.shape[1])
    change = torch.zeros(len(nodes), len(pairs), dtype=torch.float64)
    control = torch.zeros(how.draws, len(nodes), len(pairs), dtype=torch.float64)
    error, passes = 0.0, 0
    for rows in pairs.blocks(size):
        part, cut = pairs.rows(rows), slice(rows.start, rows.stop)
        parts = Decomposition(wiring, part.clean, biases=how.biases, collapse=how.collapse)
        reference = [values[cut] for values in cuts.columns]

        def share(found: Followed, parts: Any = parts, part: Any = part) -> Tensor:
            return parts.shares(found.beta, part.answers, part.wrong)

        step = parts.nodes_per_pass()
        for some in (nodes[i : i + step] for i in range(0, len(nodes), step)):
            found = parts.follow(some, reference)
            change[some.start : some.stop, cut] = share(found)
            error, passes = max(error, *found.errors.values()), passes + 1 + how.draws
            for draw in range(how.draws):
                other = parts.follow(some, reference, random=how.seed + draw)
                control[draw, some.start : some.stop, cut] = share(other)
    return _Found(change, control.mean(2), error, passes)


# What is handed out ------------------------------------------------------------------------------


def _data(cuts: Cuts, found: _Found, checked: Verified | None) -> "xarray.Dataset":
    import xarray

    change, n = found.change, found.change.shape[1]
    sem = change.std(1) / n**0.5 if n > 1 else torch.full((len(change),), torch.nan)
    chance = found.control.abs().flatten().quantile(_CHANCE)
    data: dict[str, Any] = {
        "contribution": ("node", change.mean(1).numpy()),
        "sem": ("node", sem.numpy()),
        "change": (("node", "batch"), change.numpy()),
        "control": (("draw", "node"), found.control.numpy()),
        "chance": ((), float(chance)),
        "clean": ("batch", cuts.clean.numpy()),
        "contrast": ("batch", cuts.contrast.numpy()),
        "sum_error": ((), found.error),
    }
    if checked is not None:
        exact, part = checked.scattered(len(change))
        data |= {"exact": ("node", exact.numpy()), "verified": ("node", part.numpy())}
        data |= {name: ((), value) for name, value in checked.scalars().items()}
    return xarray.Dataset(data, coords={"node": list(cuts.wiring.graph.sources)})


def _view(data: "xarray.Dataset", checked: Verified | None, top: int) -> View:
    names = [str(name) for name in data["node"].values]
    values = data["contribution"].values
    order = sorted(range(len(names)), key=lambda i: -abs(values[i]))[:top]
    chance = float(data["chance"])
    parts: list[View] = [
        sentences(_statements(data, names, order), title="What the nodes add"),
        bars(
            [names[i] for i in order], values[order], unit="logits",
            baseline=[(-chance, chance)] * len(order), baseline_name="random directions",
            title=f"The {len(order)} strongest of {len(names)} nodes",
        ),
    ]  # fmt: skip
    if checked is not None:
        hidden = _hidden(data)
        if hidden:
            number = {"unit": "logits", "format": "+.3f"}
            parts.append(
                table(
                    [{"name": "node"}, {"name": "contribution", **number},
                     {"name": "exact", **number}],
                    [[names[i], float(values[i]), float(data["exact"].values[i])] for i in hidden],
                    title="Nodes whose exact effect is another",
                )
            )  # fmt: skip
        parts.append(checked.view(names, unit="logits"))
    return group(parts, title="Contextual decomposition", about=_ABOUT)


_ABOUT = (
    "Positive: what the node writes beyond the reference supports the answer, on its way through"
    " values and MLPs. Attention patterns and norm scales are held as they are."
)


def _hidden(data: "xarray.Dataset") -> list[int]:
    """Nodes that were patched and whose contribution is far from the exact effect."""
    exact, values = data["exact"].values, data["contribution"].values
    run = [i for i, part in enumerate(data["verified"].values) if part]
    largest = max(abs(exact[i]) for i in run)
    return [
        i for i in sorted(run, key=lambda i: -abs(exact[i]))
        if abs(exact[i] - values[i]) > _HIDDEN * abs(exact[i]) and abs(exact[i]) > _SMALL * largest
    ]  # fmt: skip


def _statements(data: "xarray.Dataset", names: list[str], order: list[int]) -> list[str]:
    values, chance = data["contribution"].values, float(data["chance"])
    gap = float((data["clean"] - data["contrast"]).mean())
    above = int((abs(values) > chance).sum())
    found = [
        f"The strongest node is {names[order[0]]}: {values[order[0]]:+.3f} logits; clean prompts"
        f" and contrasts are {gap:.3f} logits apart.",
        f"{above} of {len(names)} nodes add more than 95 of 100 random directions with the norms"
        f" of these nodes ({chance:.3f} logits).",
        f"Both parts add up to the model's activations within {float(data['sum_error']):.1e} of"
        " their size.",
    ]
    if "exact" in data and (hidden := _hidden(data)):
        few = ", ".join(names[i] for i in hidden[:5])
        found.append(
            f"Nodes with another exact effect: {len(hidden)} of those patched ({few}). They act by"
            " moving attention, through norm scales, or through bends that the split shares out."
        )
    return found
