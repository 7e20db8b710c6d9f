"""Which heads a desiderata mask exchanges, beside the strongest single heads and random sets."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.circuits.masks import Trained
from underhood.core.site import Site
from underhood.data import Metric
from underhood.methods.locate._mask_heads import Carrying
from underhood.methods.locate._mask_views import percent, training_data, training_view
from underhood.view import View, bars, group, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["Carried", "carried", "head_data", "head_view"]


@dataclass(frozen=True, slots=True)
class Carried:
    """A set of heads, judged.

    Attributes:
        trained: The mask: 1 is exchanged.
        heads: All heads.
        single: How far each head moves the prompts of training by itself.
        rival: As many heads as the mask has, the best by themselves.
        moved: How far the mask's heads move the judged prompts: 1, all the way to the contrast's.
        moved_rival: The rival's.
        moved_random: Random sets of as many heads.
        moved_all: All heads.
        judged: Prompts that it was judged on.
        held_out: Whether these took no part in training.
    """

    trained: Trained
    heads: list[Site]
    single: Float[Tensor, " head"]
    rival: Int[Tensor, " chosen"]
    moved: float
    moved_rival: float
    moved_random: Float[Tensor, " draw"]
    moved_all: float
    judged: int
    held_out: bool


def carried(
    trained: Trained, train: Carrying, test: Carrying, *, draws: int, seed: int
) -> Carried:  # fmt: skip
    """Run the set, and its controls, on the prompts to judge on."""
    n, count = len(train.heads), int(trained.kept.sum())
    single = train.moved([[head] for head in range(n)])
    rival = single.argsort(descending=True, stable=True)[:count]
    make = torch.Generator().manual_seed(seed)
    others = [torch.randperm(n, generator=make)[:count].tolist() for _ in range(draws)]
    chosen = trained.kept.nonzero()[:, 0].tolist()
    moved = test.moved([chosen, rival.tolist(), list(range(n)), *others])
    mine, theirs, everything = moved[:3].tolist()
    return Carried(
        trained, train.heads, single, rival, mine, theirs, moved[3:], everything,
        len(test.pairs), test is not train,
    )  # fmt: skip


def head_data(found: Carried) -> "xarray.Dataset":
    """The result's numbers; where layers have different numbers of heads, NaN fills the grid."""
    import xarray

    layers = sorted({head.layer or 0 for head in found.heads})
    width = 1 + max(head.unit or 0 for head in found.heads)
    grids = {name: torch.full((len(layers), width), torch.nan) for name in ("mask", "single")}
    chosen = torch.zeros(len(layers), width, dtype=torch.bool)
    for number, head in enumerate(found.heads):
        place = layers.index(head.layer or 0), head.unit or 0
        grids["mask"][place] = found.trained.values[number]
        grids["single"][place] = found.single[number]
        chosen[place] = found.trained.kept[number]
    data: dict[str, Any] = {name: (("layer", "head"), x.numpy()) for name, x in grids.items()}
    data |= {
        "in_circuit": (("layer", "head"), chosen.numpy()),
        "moved_random": ("random", found.moved_random.numpy()),
        "moved": ((), found.moved),
        "moved_single": ((), found.moved_rival),
        "moved_all": ((), found.moved_all),
        "size": ((), int(found.trained.kept.sum())),
        **training_data(found.trained),
    }
    return xarray.Dataset(data, coords={"layer": layers, "head": list(range(width))})


def head_view(found: Carried, metric: Metric, position: str) -> View:
    """The claim, its controls, and the heads."""
    trained = found.trained
    order = torch.where(trained.kept, trained.rank, -torch.inf).argsort(descending=True)
    rows = [
        [str(found.heads[i]), float(trained.values[i]), float(found.single[i])]
        for i in order[: int(trained.kept.sum())].tolist()
    ]
    low, high = (float(x) for x in (found.moved_random.min(), found.moved_random.max()))
    shown = [found.moved, found.moved_rival, found.moved_all]
    columns = [
        {"name": "head"}, {"name": "mask", "format": ".3f"},
        {"name": "moved by it alone", "format": "+.1%"},
    ]  # fmt: skip
    return group(
        [
            sentences(_statements(found, metric, position), title="Heads that carry it over"),
            bars(
                ["trained mask", "best single heads", "all heads"], shown,
                baseline=[(low, high)] * len(shown), baseline_name="random heads, as many",
                unit="share of the way", title="How far the clean run is moved",
                about="0: the clean run; 1: as far as the contrast's.",
            ),
            table(columns, rows, title="The heads"),
            training_view(trained, "nats"),
        ],
        title="Head masks",
    )  # fmt: skip


def _statements(found: Carried, metric: Metric, position: str) -> list[str]:
    count, total = int(found.trained.kept.sum()), len(found.heads)
    names = ", ".join(str(found.heads[i]) for i in found.trained.kept.nonzero()[:, 0].tolist()[:12])
    prompts = "prompt" if found.judged == 1 else f"{found.judged} prompts"
    return [
        f"Exchanging {count} of {total} heads at position {position!r} moves {metric.name}"
        f" {percent(found.moved)} of the way from the clean run to the contrast's: {names}.",
        f"As many of those that move it most by themselves go {percent(found.moved_rival)}, random"
        f" sets {percent(found.moved_random.mean())} (at most"
        f" {percent(found.moved_random.max())}), all heads {percent(found.moved_all)}.",
        f"Judged on {prompts} that took no part in training."
        if found.held_out
        else f"Trained and judged on the same {prompts}.",
    ]
