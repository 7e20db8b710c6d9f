"""Output nodes: the fewest parts whose direct writing carries the logit difference, and the check.

The direct effect of a node is what it writes at the last token, through the final norm with its
scale frozen, along (answer - wrong). The check is a real edit: at the end of the stream everything
that the *other* nodes write there is replaced by its mean, and the model's own norm and unembedding
are run again.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import NotOffered, PairError
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.ops import add
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.tokens import Where
from underhood.data import EncodedPairs
from underhood.data.metrics import logit_diff
from underhood.methods.locate._roles import Asked, Bench, Part, blocks, matched, means
from underhood.methods.read._direct_parts import Layout, Place, attribute, layout_of

__all__ = ["Nodes", "output_nodes"]

_EACH = 48  # set sizes tried one by one; beyond, each a quarter larger than the last


@dataclass(frozen=True, slots=True)
class Nodes:
    """All nodes in order of their direct effect (absolute), and what the first n of them carry.

    Attributes:
        parts: The nodes.
        direct: Direct effect on rows that choose, in logits.
        total: Mean-ablated at the last token, on rows that test: what is lost, in logits.
        sizes: The set sizes tried.
        summed: Per size the sum of direct effects, as a share of the difference.
        kept: Per size the share of the difference that is left when the rest writes its mean.
        chosen: How many nodes are the output nodes; None if no size reaches the share.
        random: Kept by random sets of as many nodes from the same layers.
        kept_total: The share left when the rest is mean-ablated at the last token, so that the
            output nodes lose what it told them as well.
        clean: The difference on rows that test, in logits.
        passes: Forward passes of the sweeps.
    """

    parts: list[Part]
    direct: Float[Tensor, " node"]
    total: Float[Tensor, " node"]
    sizes: list[int]
    summed: Float[Tensor, " size"]
    kept: Float[Tensor, " size"]
    chosen: int | None
    random: Float[Tensor, " draw"]
    kept_total: float
    clean: float
    passes: int


def output_nodes(
    model: Model,
    choose: EncodedPairs,
    test: EncodedPairs,
    *,
    recover: float,
    draws: int,
    seed: int,
    batch_size: int | None,
) -> Nodes:
    """Rank the nodes on some rows, find the smallest sufficient set, and test it on others.

    Args:
        model: The model.
        choose: Rows that rank the nodes and give the means.
        test: Rows that test the sets.
        recover: The share of the logit difference that the set must carry, by sum and by edit.
        draws: Random sets beside it.
        seed: Of these.
        batch_size: Rows of one pass.

    Raises:
        PairError: Rows without answers, or answers that the model does not prefer on average.
        NotOffered: A stream that is no sum of parts.
    """
    layout = layout_of(model, Head(model), heads=True)
    places, direct, says = _direct(layout, choose, batch_size)
    order = direct.abs().argsort(descending=True, stable=True).tolist()
    places, direct = [places[i] for i in order], direct[order]
    parts = [_part(layout, place) for place in places]
    asked = Asked(logit_diff, "mean", "last", batch_size)
    sites = [site for part in parts for site in part.sites]
    bench = Bench(model, test, asked, means(model, choose, sites, asked))
    clean = float(bench.clean.mean())
    if min(clean, says) <= 0:
        raise PairError(
            "the model does not prefer the answers",
            given=f"mean logit difference {says:+.3g} and {clean:+.3g} on two halves of the rows",
            why="there is nothing that output nodes could carry",
            do="use pairs that the model answers rightly",
        )
    writer = _Writer(layout, places, _mean_written(layout, places, choose, batch_size))
    sizes = _sizes(len(places))
    kept = writer.kept(bench, [list(range(size)) for size in sizes]) / clean
    summed = torch.stack([direct[:size].sum() for size in sizes]) / says
    enough = ((summed >= recover) & (kept >= recover)).nonzero()[:, 0].tolist()
    chosen = sizes[enough[0]] if enough else None
    sets, _ = matched(parts, range(chosen or 0), draws=draws, seed=seed)
    random = writer.kept(bench, sets) / clean if sets else torch.zeros(0)
    total = clean - bench.without([[part] for part in parts]).mean(1)
    rest = parts[chosen:] if chosen is not None else []
    kept_total = float(bench.without([rest]).mean()) / clean if rest else 1.0
    return Nodes(
        parts, direct, total, sizes, summed, kept, chosen, random, kept_total, clean, bench.passes
    )


def _sizes(count: int) -> list[int]:
    sizes = list(range(min(count, _EACH) + 1))
    while sizes[-1] < count:
        sizes.append(min(count, sizes[-1] + sizes[-1] // 4))
    return sizes


def _direct(
    layout: Layout, pairs: EncodedPairs, batch_size: int | None
) -> tuple[list[Place], Float[Tensor, " node"], float]:
    """Mean direct effect of every node, and the model's own mean difference."""
    total, says, places = torch.zeros(0), 0.0, []
    nobody = torch.zeros(0, 2, dtype=torch.long)
    for rows in blocks(pairs, batch_size):
        part = pairs.rows(rows)
        found = attribute(layout, part.clean, part.answers, part.wrong, nobody)
        places, says = found.places, says + float(found.says.sum())
        mine = found.mine.sum(0)
        total = total + mine if len(total) else mine
    keep = [i for i, (kind, _, _) in enumerate(places) if kind in ("head", "mlp", "attn", "mixer")]
    if not keep:
        raise NotOffered(
            "this model has no parts that write", given=repr(layout.model), do="use another model"
        )
    return [places[i] for i in keep], total[keep] / len(pairs), says / len(pairs)


def _part(layout: Layout, place: Place) -> Part:
    """The node as something that can be ablated."""
    kind, layer, head = place
    stack = layout.model.main
    if kind == "head":
        return Part(layer, head, (Site("z", layer, stack=stack),))
    name = "mlp_out" if kind == "mlp" else "attn_out"
    return Part(layer, None, (Site(name, layer, stack=stack),))


def _written(layout: Layout, run: Run, places: list[Place]) -> Float[Tensor, "node batch d_model"]:
    """What each node adds to the stream at the last token."""
    found = []
    for kind, number, head in places:
        layer = layout.layers[number]
        site = {"head": layer.heads, "mlp": layer.mlp}.get(kind, layer.attn)
        assert site is not None
        part = run[site][:, 0].double()
        if kind == "head":
            part = part[:, head]
            if layer.norm is not None:
                path, form = layer.norm
                whole = run[Site("module_in", path=path)][:, 0]
                part = form.linear(part, form.scale(whole))
        found.append(part)
    return torch.stack(found)


def _mean_written(
    layout: Layout, places: list[Place], pairs: EncodedPairs, batch_size: int | None
) -> Float[Tensor, "node d_model"]:
    """Over both prompts of all rows."""
    sums: list[Tensor] = []
    for rows in blocks(pairs, batch_size):
        part = pairs.rows(rows)
        for tokens in (part.clean, part.contrast):
            run = layout.model.run(tokens, record=layout.sites, at=-1)
            sums.append(_written(layout, run, places).sum(1))
    return torch.stack(sums).sum(0) / (2 * len(pairs))


@dataclass(frozen=True, slots=True)
class _Writer:
    """Keeps what some nodes write at the end of the stream, and gives the others' mean."""

    layout: Layout
    places: list[Place]
    mean: Float[Tensor, "node d_model"]

    def kept(self, bench: Bench, sets: list[list[int]]) -> Float[Tensor, " set"]:
        """The mean logit difference for each set of nodes."""

        def plans(part: EncodedPairs, _rows: range) -> list[Edit]:
            run = self.layout.model.run(part.clean, record=self.layout.sites, at=-1)
            moved = _written(self.layout, run, self.places) - self.mean[:, None]
            everything = moved.sum(0)
            found = []
            for kept in sets:
                rest = moved[kept].sum(0) - everything
                found.append(Edit(self.layout.final, add(rest[:, None].float()), Where(-1)))
            return found

        return bench.swept_by_rows(plans).mean(1)
