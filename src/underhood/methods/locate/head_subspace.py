"""Head subspaces: which nodes write the answer, and in how few dimensions their heads do it.

1. Output nodes: the fewest heads and MLPs whose direct writing carries the logit difference.
2. Compression: their heads' queries (last token) and keys (labels), or values, projected on the r
   leading directions of their spread over prompts: `kept(r) = (m(r) - m(0)) / (m - m(0))`, where
   m(0) holds the mean only. Beside it, random subspaces of the same rank.
3. Meaning: the contrast's part of the subspace is put into the clean run. A contrast that swaps
   labels asks for order, one with new labels for names. `other` prompts ask whether the same
   subspace serves there.

What this does not do: name what a subspace holds. It says what a change of it changes.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from underhood.core.errors import NotOffered, OutOfRange, PairError
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.provenance import describe
from underhood.core.site import Site
from underhood.data import EncodedPairs, Pairs
from underhood.methods.locate._low_rank import (
    LOG_ODDS,
    PARTS,
    HeadAt,
    Spaces,
    Swap,
    check_ranks,
    compressed,
    heads_named,
    random_spaces,
    recentred,
    spaces,
    swapped,
)
from underhood.methods.locate._low_rank_views import heads_view
from underhood.methods.locate._options import at_least
from underhood.methods.locate._output_nodes import Nodes, output_nodes
from underhood.methods.locate._roles import Asked, Bench, losses
from underhood.methods.registry import method
from underhood.view import Result

if TYPE_CHECKING:
    import xarray

__all__ = ["head_subspace"]

_FLAT = 0.02  # of the log odds: heads whose mean does as well have nothing to keep


@method
def head_subspace(
    model: Model,
    pairs: Pairs,
    *,
    other: Pairs | None = None,
    heads: tuple[str, ...] = (),
    most: int = 3,
    ranks: tuple[int, ...] = (1, 2, 3, 4, 8),
    keys: tuple[int, ...] = (),
    recover: float = 0.9,
    held_out: float = 0.5,
    draws: int = 3,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """The nodes that write the answer, and the few dimensions in which their heads work.

    Args:
        pairs: Prompts with answers and wrong answers (the candidates); the contrasts decide which
            question the exchange asks.
        other: Prompts on which the same subspaces are tried, e.g. with other labels. On the command
            line a file: `--set other=FILE`.
        heads: Heads, e.g. `("a2.h1",)`; default the output nodes' heads with the
            largest direct effect.
        most: How many of these.
        ranks: Ranks to try, up to a head's dimensions; larger ones than it has are left out of the
            default.
        keys: Positions of the labels, where keys and values are compressed (negative: from the
            end); default all but the first token.
        recover: Share that counts as kept.
        held_out: Share of the prompts that give nodes, means and subspaces; the rest test them.
        draws: Random subspaces (of equal rank) and random sets of nodes (of equal size).
        seed: Of split and draws.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Over `node`, largest direct effect first: `direct` (logits, positive supports the answer),
        `total` (logits lost when the node is mean-ablated at the last token), `output` (whether it
        is an output node). Over `step` (sizes of the set): `summed` (share of the logit difference
        that the direct effects add up to) and `left` (share left when all other nodes write their
        mean at the end of the stream); `left_random`, `left_total` (the rest mean-ablated at the
        last token) for the chosen set. Over `part` ("qk", "ov", "both"), `head` (last: all of them
        together) and `rank` (0 is the mean alone): `kept` (1: nothing lost; NaN where the mean does
        as well), `loss` (nats, among the candidates), `accuracy` (share of rows whose answers
        outweigh the wrong ones), and with `other` `kept_other`. For all heads together, over `part`
        and `rank`: `kept_random` (best draw), `exchanged` (the share of the way to the contrast
        that the exchange of the subspace goes), `exchanged_rest` (of everything but the subspace),
        `exchanged_random` (strongest draw), `exchanged_whole` (over `part`: of everything there).
        Over `part` and `head`: `needed` (least rank tried that keeps enough of log odds and
        accuracy; NaN if none). `spread`: the share of variance inside ("qk": of the queries).

    Raises:
        PairError: Rows without answers or wrong answers, too few rows, or answers that the model
            does not prefer.
        OutOfRange: A head, rank or share outside its range.
        NotOffered: A stream that is no sum of parts, or a model without attention heads.

    Cost: about eight forwards per row to read; in sweeps over the testing rows: nodes + 50 +
        draws, then 3 parts times ranks times (heads + 3 + 2 * draws). No backward.

    Source: Lieberum et al. 2023, "Does circuit analysis interpretability scale? Evidence from
        multiple choice capabilities in Chinchilla" (output nodes, three dimensions, exchanges of
        the subspace). No code was at hand. Ours, where the text at hand is silent: both halves of
        the rule for output nodes at 90 percent, the ablation that tests it, held-out rows, random
        subspaces, and "accuracy" as answers outweighing the wrong ones together.

    Misleads: with grouped heads, keys and values are the group's, and its other query heads feel
        the compression too. The leading directions are those of largest spread, not of largest
        use: a small direction may carry the answer. Backup heads make a head look idle, and then
        any subspace keeps all. What an exchange moves is what these contrasts differ in, no more.

    Example:
        >>> import underhood as uh
        >>> from underhood.organisms import organism
        >>> pairs = organism("town").pairs("agreement", 8)
        >>> found = head_subspace(uh.load(), pairs, heads=("a1.h3",), ranks=(1, 4), draws=1)
        >>> found["kept"].dims
        ('part', 'head', 'rank')
    """
    for name, share in (("recover", recover), ("held_out", held_out)):
        if not 0 < share < 1:
            raise OutOfRange(f"{name} is a share", given=share, do="use a number between 0 and 1")
    at_least(1, most=most, draws=draws, batch_size=batch_size)
    if len(pairs) < 4:
        raise PairError(
            "too few rows to choose on some and test on others",
            given=f"{len(pairs)} rows",
            do="give at least 4, better 50",
        )
    named = heads_named(model, heads)
    choose, test = (half.encode(model) for half in pairs.split(held_out, seed))
    nodes = output_nodes(
        model, choose, test, recover=recover, draws=draws, seed=seed, batch_size=batch_size
    )
    named = named or _writers(model, nodes, most)
    width = _width(model, named[0], test)
    tried = tuple(r for r in sorted(set(ranks)) if heads or r <= width)
    check_ranks(model, named, tried, width)
    held = spaces(model, choose, named, keys=keys, batch_size=batch_size)
    trial = _Trial(model, named, tried, keys, held, draws, seed, batch_size)
    columns = trial.kept(test, "kept") | trial.exchanged(test)
    if other is not None:
        there = other.encode(model)
        moved = recentred(model, there, held, keys=keys, batch_size=batch_size)
        columns |= trial.kept(there, "kept_other", moved)
    data = _dataset(nodes, named, tried, columns, held, model, recover)
    return Result(
        name="head_subspace",
        data=data,
        view=heads_view(data),
        provenance=describe(
            model, heads=list(map(str, named)), ranks=list(tried),
            keys=list(keys), recover=recover, chosen_on=len(choose), tested_on=len(test),
            other=None if other is None else len(other), draws=draws, seed=seed,
            passes=nodes.passes + trial.passes,
        ),
    )  # fmt: skip


def _writers(model: Model, nodes: Nodes, most: int) -> list[HeadAt]:
    """The heads with the largest direct effect, those among the output nodes first."""
    size = nodes.chosen or 0
    found = [p for p in nodes.parts[:size] if p.unit is not None]
    found += [p for p in nodes.parts[size:] if p.unit is not None][: 0 if found else 1]
    if not found:
        raise NotOffered(
            "no attention head of this model can be told apart",
            given=repr(model),
            do="use activation_patching on attn_out",
        )
    return heads_named(model, [part_name("head", p.layer, p.unit) for p in found[:most]])


def _width(model: Model, head: HeadAt, pairs: EncodedPairs) -> int:
    """Dimensions of a head: the smaller of queries' and values'."""
    sites = [Site(n, head.layer, stack=model.main) for n in ("q_rot", "v")]
    run = model.run(pairs.clean.row(0), record=sites)
    return min(run[site].shape[-1] for site in sites)


class _Trial:
    """Every head (and all together), part and rank, on some prompts."""

    def __init__(
        self,
        model: Model,
        heads: list[HeadAt],
        ranks: tuple[int, ...],
        keys: tuple[int, ...],
        held: Spaces,
        draws: int,
        seed: int,
        batch_size: int | None,
    ) -> None:
        self.model, self.ranks, self.keys, self.held = model, (0, *ranks), keys, held
        self.sets = [(head,) for head in heads] + [tuple(heads)] * (len(heads) > 1)
        self.random = [random_spaces(held, draw=draw, seed=seed) for draw in range(draws)]
        self.asked = Asked(LOG_ODDS, "mean", "all", batch_size)
        self.passes = 0

    def kept(self, pairs: EncodedPairs, name: str, held: Spaces | None = None) -> dict[str, Tensor]:
        """What compression leaves, as a share; with the raw numbers for the first prompts."""
        bench = Bench(self.model, pairs, self.asked, {})
        mine = held or self.held
        random = [
            {site: space._replace(mean=mine[site].mean) for site, space in one.items()}
            for one in self.random
        ]
        cells = [
            compressed(self.model, heads, part, rank=rank, held=one, keys=self.keys)
            for one, sets in ((mine, self.sets), *((one, self.sets[-1:]) for one in random))
            for part in PARTS
            for heads in sets
            for rank in self.ranks
        ]
        odds = bench.swept(cells)
        self.passes += bench.passes
        split = len(PARTS) * len(self.sets) * len(self.ranks)
        own = odds[:split].unflatten(0, (len(PARTS), len(self.sets), len(self.ranks)))
        scores, clean = own.mean(-1), bench.clean.mean()
        floor = scores[..., :1]
        way = torch.where((clean - floor).abs() > _FLAT * clean.abs(), clean - floor, torch.nan)
        chance = odds[split:].unflatten(0, (len(random), len(PARTS), len(self.ranks))).mean(-1)
        chance = ((chance - floor[:, -1]) / way[:, -1]).amax(0)
        found = {name: (scores - floor) / way, f"{name}_random": chance}
        if held is None:
            found |= {
                "loss": softplus(-own).mean(-1), "accuracy": (own > 0).double().mean(-1),
                "clean_loss": softplus(-bench.clean).mean(),
                "clean_accuracy": (bench.clean > 0).double().mean(),
            }  # fmt: skip
        return found

    def exchanged(self, pairs: EncodedPairs) -> dict[str, Tensor]:
        """How far the contrast's part of the subspaces moves the answer to the contrast's."""
        bench = Bench(self.model, pairs, self.asked, {})
        heads, swaps = self.sets[-1], []
        for part in PARTS:
            swaps.append(Swap(heads, part, 0, None, self.held))
            for rank in self.ranks[1:]:
                swaps.append(Swap(heads, part, 0, rank, self.held))
                swaps.append(Swap(heads, part, rank, 10**9, self.held))
                swaps += [Swap(heads, part, 0, rank, one) for one in self.random]
        values = bench.swept_by_rows(
            lambda part, _: swapped(self.model, part, swaps, keys=self.keys)
        )
        self.passes += bench.passes
        effect = losses(values, bench)[1].view(len(PARTS), -1)
        whole = effect[:, 0]
        each = effect[:, 1:].view(len(PARTS), len(self.ranks) - 1, -1)
        chance = each[..., 2:]
        strongest = chance.gather(-1, chance.abs().argmax(-1, keepdim=True))[..., 0]
        # Rank 0 exchanges nothing, and everything is the rest.
        none = torch.zeros_like(whole)
        columns = {
            "exchanged": (none, each[..., 0]), "exchanged_rest": (whole, each[..., 1]),
            "exchanged_random": (none, strongest),
        }  # fmt: skip
        found = {name: torch.cat([x[:, None], y], 1) for name, (x, y) in columns.items()}
        return found | {"exchanged_whole": whole}


# What is handed out ------------------------------------------------------------------------------


def _dataset(
    nodes: Nodes,
    heads: list[HeadAt],
    ranks: tuple[int, ...],
    columns: dict[str, Tensor],
    held: Spaces,
    model: Model,
    recover: float,
) -> "xarray.Dataset":
    import numpy as np
    import xarray

    size = nodes.chosen
    variables: dict[str, Any] = {
        "direct": ("node", nodes.direct.numpy()),
        "total": ("node", nodes.total.numpy()),
        "output": ("node", np.arange(len(nodes.parts)) < (size or 0)),
        "summed": ("step", nodes.summed.numpy()),
        "left": ("step", nodes.kept.numpy()),
        "left_random": float(nodes.random.mean()) if len(nodes.random) else np.nan,
        "left_total": nodes.kept_total,
        "logit_diff": nodes.clean,
    }
    for name, column in columns.items():
        together = name.startswith("exchanged") or name.endswith("random")
        dims = ("part", "rank") if together else ("part", "head", "rank")
        variables[name] = (dims[: column.ndim], column.numpy())
    variables["needed"] = (("part", "head"), _needed(columns, ranks, recover).numpy())
    names = [str(head) for head in heads]
    variables["spread"] = (("part", "head", "rank"), _spread(heads, ranks, held, model))
    names += ["together"] * (len(heads) > 1)
    coords: dict[str, Any] = {
        "node": [str(part) for part in nodes.parts], "step": nodes.sizes, "part": list(PARTS),
        "head": names, "rank": [0, *ranks],
    }  # fmt: skip
    attrs = {"recover": recover, "chosen": -1 if size is None else size}
    return xarray.Dataset(variables, coords=coords, attrs=attrs)


def _needed(columns: dict[str, Tensor], ranks: tuple[int, ...], recover: float) -> Tensor:
    """The least rank that keeps enough of log odds and accuracy."""
    enough = (columns["kept"] >= recover) & (
        columns["accuracy"] >= recover * columns["clean_accuracy"]
    )
    enough = enough[..., 1:]
    first = torch.tensor(ranks, dtype=torch.float64)[enough.int().argmax(-1)]
    return torch.where(enough.any(-1), first, torch.nan)


def _spread(heads: list[HeadAt], ranks: tuple[int, ...], held: Spaces, model: Model) -> Any:
    """The share of variance inside each subspace; NaN for both parts and for all heads."""
    found = torch.full((3, len(heads) + (len(heads) > 1), len(ranks) + 1), torch.nan)
    for number, head in enumerate(heads):
        sites = [Site("q_rot", head.layer, head.head, stack=model.main)]
        sites.append(Site("v", head.layer, head.group, stack=model.main))
        for part, site in enumerate(sites):
            for column, rank in enumerate((0, *ranks)):
                found[part, number, column] = held[site].share[:rank].sum()
    return found.numpy()
