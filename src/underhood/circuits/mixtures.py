"""What taking mixtures of experts apart stands on, and where their routers can be held."""

from dataclasses import replace

import torch
from torch import Tensor

from underhood.circuits.graph import Graph
from underhood.core.errors import NotOffered
from underhood.core.model import Model
from underhood.core.parts import Writer
from underhood.core.run import Run
from underhood.core.site import Site

__all__ = ["prove_mixtures", "routers_of", "stream_around"]


def routers_of(model: Model) -> list[Site]:
    """The sites of all routers' logits.

    Raises:
        NotOffered: There are none.
    """
    each = [Site("router_logits", layer, stack=model.main) for layer in range(model.n_layers)]
    found = [site for site in each if model.offers(site)]
    if not found:
        raise NotOffered(
            "there is no routing to freeze in this model",
            given=repr(model),
            why="it has no routers, or such that cannot be tapped",
            do="use freeze_routing=False",
        )
    return found


def prove_mixtures(graph: Graph, run: Run) -> None:
    """Check in a run what taking a mixture apart stands on.

    Raises:
        NotOffered: A router does not read what its experts read; or the experts' outputs do not sum
            to what the MLP adds, or what the MLP adds is not all that happens to the stream there
            (Granite's shared MLP stands beside the mixture, MiniMax scales the stream).
    """
    why = None
    for reader in graph.readers:
        if reader.beside is not None:
            theirs = run[reader.beside]
            if not torch.equal(run[reader.tap].reshape(theirs.shape), theirs):
                why = f"the router of layer {reader.layer} does not read what its experts read"
    for writer in graph.writers:
        if writer.slots is None:
            continue
        whole = run[writer.site]
        parts = writer.written(run).unflatten(-1, (writer.heads, -1)).sum(2)
        if not _close(parts, whole, whole):
            why = f"layer {writer.layer} adds more than the sum of its experts"
        ends = stream_around(writer)
        if all(site in run for site in ends):
            before, after = (run[site] for site in ends)
            if not _close(after - before, whole, after):
                why = f"layer {writer.layer} does more to the stream than adding its experts"
    if why is not None:
        raise NotOffered(
            "a mixture of this model cannot be taken apart into edges",
            given=graph.name,
            why=why,
            do="use experts=False: the mixture is then one node",
        )


def stream_around(writer: Writer) -> tuple[Site, Site]:
    """The stream before and after a mixture, in sequential blocks."""
    return replace(writer.site, name="resid_mid"), replace(writer.site, name="resid_post")


def _close(one: Tensor, other: Tensor, rounded: Tensor) -> bool:
    """Equal up to two percent and the rounding of sums as large as `rounded`."""
    gap, size, largest = (float(x.float().norm()) for x in (one - other, other, rounded))
    return gap <= 0.02 * size + 4 * torch.finfo(rounded.dtype).eps * largest
