"""The QK fix of AtP*: queries and keys without a straight line through the softmax.

A saturated softmax has no gradient to speak of, so AtP finds nothing at the queries and keys of the
heads that are surest. Here the softmax is recomputed, and only what follows it is linearised. With
p the pattern, g = dm/dp, and row i of one head:

    query i   sum_j (p'_j - p_j) g_j,   p' = softmax of the row with the other run's query
    key t     only column t of the row changes, so that the other keys keep their shares:
                  (p'_t - p_t) (g_t - mean of g over the other keys)
              summed over all rows; O(T^2) per head for all key positions together

g_ij = dm/dz_i . v_j needs no attention matrix in the graph, so models keep their fused kernels. The
scores are recomputed from q_rot and k_rot; masks, position biases and sinks stay what they were. A
family whose recomputed pattern is not the recorded one is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.errors import NotOffered
from underhood.core.model import Model
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.tokens import Tokens

__all__ = ["QUERY", "KEY", "Softmax", "key_moves", "row_moves", "softmaxes"]

QUERY, KEY = ("q", "q_rot"), ("k", "k_rot")

_PATTERN_GAP = 1e-3  # of a probability: recomputed against recorded
_NO_SINK = 1e-5  # what a row of the pattern may lack of 1 by rounding
_READ = ("q_rot", "k_rot", "v", "z", "scores", "pattern")


def row_moves(
    logits: Float[Tensor, "*row key"],
    moved: Float[Tensor, "*row key"],
    slope: Float[Tensor, "*row key"],
    sink: Float[Tensor, "*row"] | None = None,
) -> Float[Tensor, "*row"]:
    """sum_j (p'_j - p_j) g_j for softmax rows whose logits move; -inf hides a key.

    Args:
        logits: Before.
        moved: After.
        slope: g, the metric's gradient at the probabilities.
        sink: A further logit per row that belongs to no key.
    """
    return ((_softmax(moved, sink) - _softmax(logits, sink)) * slope).sum(-1)


def key_moves(
    logits: Float[Tensor, "*row key"],
    moved: Float[Tensor, "*row key"],
    slope: Float[Tensor, "*row key"],
    sink: Float[Tensor, "*row"] | None = None,
) -> Float[Tensor, "*row key"]:
    """The same when only one logit of the row moves: entry t is for the move of logit t alone.

    Written as (p'_t - p_t) (g_t - mean of g over the other keys), which stays exact where the row's
    largest probability is 1 but for rounding: that key's others are averaged by themselves.
    """
    p = _softmax(logits, sink)
    total = _total(logits, sink)
    top = p.argmax(-1, keepdim=True)
    others = logits.scatter(-1, top, -torch.inf)
    lesser = _softmax(others, sink)
    # What the other keys hold, in logarithms; at most one key of a row holds more than half.
    left = torch.log1p(-p).scatter(-1, top, (_total(others, sink) - total)[..., None])
    mean = ((p * slope).sum(-1, keepdim=True) - p * slope) / (1 - p)
    mean = mean.scatter(-1, top, (lesser * slope).sum(-1, keepdim=True))
    new = torch.sigmoid(moved - total[..., None] - left).nan_to_num()
    return ((new - p) * (slope - mean)).nan_to_num()


def _total(logits: Tensor, sink: Tensor | None) -> Tensor:
    full = logits if sink is None else torch.cat([logits, sink[..., None]], -1)
    return full.logsumexp(-1)


def _softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Rows of -inf (padding) give zeros."""
    full = logits if sink is None else torch.cat([logits, sink[..., None]], -1)
    return full.softmax(-1).nan_to_num()[..., : logits.shape[-1]]


@dataclass(frozen=True, slots=True)
class Softmax:
    """One layer's attention at a point, and its logits with the other run's queries and keys.

    Attributes:
        logits: The point's own, -inf where masked.
        queries: With the other run's queries.
        keys: With the other run's keys.
        sink: A further logit per row, where rows of the pattern do not sum to one.
        values: Per query head.
    """

    logits: Float[Tensor, "rows head query key"]
    queries: Float[Tensor, "rows head query key"]
    keys: Float[Tensor, "rows head query key"]
    sink: Float[Tensor, "rows head query"] | None
    values: Float[Tensor, "rows pos head d_head"]

    def slope(self, z: Float[Tensor, "rows pos head d_head"]) -> Tensor:
        """dm/dp from dm/dz: `[rows, head, query, key]`."""
        return torch.einsum("bihd,bjhd->bhij", z.double(), self.values)

    def query_moves(self, z: Tensor) -> Float[Tensor, "rows pos head"]:
        """What each query's exchange does to the metric, to first order after the softmax."""
        return row_moves(self.logits, self.queries, self.slope(z), self.sink).transpose(1, 2)

    def key_moves(self, z: Tensor, heads: int, *, joint: bool) -> Float[Tensor, "rows pos head"]:
        """The same for each key; for all keys of a head at once (put at position 0) if `joint`.

        Args:
            z: dm/dz.
            heads: Key heads; what their query heads have is summed.
            joint: Exchange all positions together.
        """
        slope = self.slope(z)
        if joint:
            whole = row_moves(self.logits, self.keys, slope, self.sink).sum(-1)  # [rows, head]
            moves = torch.zeros_like(slope[:, :, 0])
            moves[..., 0] = whole
        else:
            moves = key_moves(self.logits, self.keys, slope, self.sink).sum(2)
        moves = moves.transpose(1, 2)
        return moves.unflatten(2, (heads, -1)).sum(-1)


def softmaxes(
    model: Model, here: Tokens, there: Tokens, sites: Sequence[Site]
) -> dict[Site, Softmax]:
    """Per query or key site (concrete) its layer's softmax at `here`, against `there`.

    Raises:
        NotOffered: The family's scores are not a function of q . k that can be recomputed.
    """
    layers = {replace(site, name="z", unit=None) for site in sites}
    wanted = [replace(layer, name=name) for layer in layers for name in _READ]
    for site in wanted:
        model.resolve(site)
    runs = [model.run(tokens, record=wanted) for tokens in (here, there)]
    found = {layer: _softmax_of(model, layer, *runs) for layer in layers}
    return {site: found[replace(site, name="z", unit=None)] for site in sites}


def _softmax_of(model: Model, layer: Site, here: Run, there: Run) -> Softmax:
    def read(run: Run, name: str) -> Tensor:
        return run[replace(layer, name=name)].double()

    q, k = ([read(run, name) for run in (here, there)] for name in ("q_rot", "k_rot"))
    logits, pattern = read(here, "scores"), read(here, "pattern")
    sink = _sink(logits, pattern)
    wanted = read(there, "pattern")
    for scale, cap in _forms(model, layer, q[0].shape[-1]):
        base = _scores(q[0], k[0], scale, cap)
        both = logits + _scores(q[1], k[1], scale, cap) - base
        gap = (_softmax(both, sink) - wanted).abs()
        if bool((gap[_real(wanted)] < _PATTERN_GAP).all()):
            break
    else:
        raise NotOffered(
            f"the pattern of layer {layer.layer} cannot be recomputed from its queries and keys",
            given=type(model.module).__name__,
            why="recomputed and recorded probabilities differ, so the QK fix would be wrong",
            do="method='atp' or 'ig', or patch exactly: activation_patching",
        )
    values = read(here, "v")
    values = values.repeat_interleave(pattern.shape[1] // values.shape[2], 2)
    _check_values(model, layer, pattern, values, read(here, "z"))
    moved = [logits + _scores(a, b, scale, cap) - base for a, b in ((q[1], k[0]), (q[0], k[1]))]
    return Softmax(logits, moved[0], moved[1], sink, values)


def _scores(q: Tensor, k: Tensor, scale: float, cap: float | None) -> Tensor:
    """`[rows, head, query, key]` from `[rows, pos, head, d_head]`; key heads serve several."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    raw = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    return raw if cap is None else torch.tanh(raw / cap) * cap


def _forms(model: Model, layer: Site, width: int) -> list[tuple[float, float | None]]:
    """Scales and soft caps that the family may use, the likeliest first."""
    attention = model.anatomy.stacks[layer.stack].blocks[layer.layer or 0].attention
    module = model.module.get_submodule(attention.core) if attention else None
    own = [getattr(module, name, None) for name in ("scaling", "scale")]
    scales = [float(s) for s in own if isinstance(s, int | float)] + [width**-0.5, 1.0]
    cap = getattr(module, "attn_logit_softcapping", None)
    caps = [None] if not cap else [float(cap), None]
    return [(scale, c) for c in caps for scale in dict.fromkeys(scales)]


def _sink(logits: Tensor, pattern: Tensor) -> Tensor | None:
    """The logit that takes what a row of the pattern lacks of one."""
    lack = 1 - pattern.sum(-1)
    real = _real(pattern).any(-1)
    if not bool((lack[real] > _NO_SINK).any()):
        return None
    total = logits.logsumexp(-1) - pattern.sum(-1).log()
    return torch.where(lack > 1e-12, total + lack.clamp(min=1e-12).log(), -torch.inf)


def _real(pattern: Tensor) -> Tensor:
    """Rows that attend to anything (padding may not)."""
    return (pattern.sum(-1, keepdim=True) > 0).expand_as(pattern)


def _check_values(model: Model, layer: Site, pattern: Tensor, values: Tensor, z: Tensor) -> None:
    """z must be pattern @ v, else dm/dp is not dm/dz . v."""
    again = torch.einsum("bhij,bjhd->bihd", pattern, values)
    if again.shape != z.shape or float((again - z).abs().max()) > 1e-3 * float(z.abs().max()):
        raise NotOffered(
            f"what the heads of layer {layer.layer} move is not pattern @ v",
            given=type(model.module).__name__,
            why="the gradient at the pattern cannot be had from that at z",
            do="method='atp' or 'ig', or patch exactly: activation_patching",
        )
