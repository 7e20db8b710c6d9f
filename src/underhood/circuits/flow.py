"""Information flow routes: how much of what a reader takes came from each source.

    importance(u -> v) = max(0, |in_v|_1 - |in_v - a_u|_1),  normalised over the sources u of v

One forward, no gradient and no metric; so it tells what flows, not what matters for an answer.

Source: Ferrando and Voita, 2024, "Information Flow Routes".
"""

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.wiring import Wiring, last_logits
from underhood.core.site import Site
from underhood.data import EncodedPairs

__all__ = ["flow_scores"]


def flow_scores(wiring: Wiring, pairs: EncodedPairs) -> Float[Tensor, "source destination"]:
    """Importance of every edge in the clean runs: mean over positions, summed over prompts.

    Heads under a norm count with their share of what the norm makes of their sum. An expert that a
    token is not routed to brings nothing there.
    """
    graph = wiring.graph
    taps = [Site("module_in", path=r.norm) if r.inside else r.tap for r in graph.readers]
    record = list(dict.fromkeys([*taps, *(site for w in graph.writers for site in w.sites)]))
    _, run = last_logits(wiring.model, pairs.clean, record=record)
    mask = pairs.clean.mask.to(wiring.model.device)
    written = [
        wiring.additive(number, writer.written(run)) for number, writer in enumerate(graph.writers)
    ]
    total = torch.zeros(graph.real.shape, dtype=torch.float64)
    for number, tap in enumerate(taps):
        stream = run[tap].view(*mask.shape, -1)
        size = stream.abs().sum(-1)[..., None]
        parts = [
            (size - (stream[:, :, None] - written[w]).abs().sum(-1)).clamp(min=0)
            for w in range(graph.before(number))
        ]
        proximity = torch.cat(parts, -1).double()
        share = proximity / proximity.sum(-1, keepdim=True).clamp(min=1e-30)
        share = (share * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        cut = graph.read(number)
        total[: share.shape[1], cut.start : cut.stop] += share.sum(0)[:, None].cpu()
    return total
