"""The semantic trace graph: what a layer could say, and how that supports what later layers say.

A *concept* is a token that the logit lens ranks high at the last position; spellings of one word
(" Paris", "paris") are one concept. Its *direction* in the stream is what the lens reads it by: the
norm's gain times its unembedding row, the mean row taken out. To ablate a concept is to take that
direction out of the stream at one layer; a concept supports another as far as the other's logit
(less the mean logit) then falls in a later layer's lens, or in the model's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from underhood.core.edit import Edit, Plan
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.taps.modules import weight_in_out
from underhood.core.tokens import Tokens
from underhood.methods.locate._trace import random_like, stopped, sweep_columns, written

__all__ = ["Concepts", "Edges", "concepts", "edges", "supports"]

_WIDER = 4  # tokens looked at per concept kept, so that spellings can be merged


@dataclass(frozen=True, slots=True)
class Concepts:
    """Top concepts of each row and layer, and the streams they were read from.

    Attributes:
        ids: Token per concept.
        states: The stream at the last token, after each block.
        without: The same with each concept's direction taken out.
    """

    ids: Int[Tensor, "layer batch rank"]
    states: Float[Tensor, "layer batch d"]
    without: Float[Tensor, "layer rank batch d"]

    def row(self, row: int) -> "Concepts":
        """One row alone."""
        cut = slice(row, row + 1)
        return Concepts(self.ids[:, cut], self.states[:, cut], self.without[:, :, cut])


def concepts(
    model: Model, head: Head, states: Float[Tensor, "layer batch d"], top: int
) -> Concepts:
    """The `top` concepts of every layer and row."""
    ids = []
    for layer in states:
        logits = head.logits(layer).float()
        wide = logits.topk(min(_WIDER * top, logits.shape[-1]), dim=-1).indices.tolist()
        ids.append([_merged(model, row, top) for row in wide])
    ids = torch.tensor(ids)
    gain, centred = _reading(head, states.shape[-1])
    weight = weight_in_out(head.module)  # [d vocab]
    rows = weight.T[ids.to(weight.device)].double() - weight.mean(1, dtype=torch.float64)
    rows = rows * gain.double().to(weight.device)
    rows = rows - rows.mean(-1, keepdim=True) if centred else rows
    rows = rows / rows.norm(dim=-1, keepdim=True)
    h = states.double()[:, :, None]  # [layer batch 1 d]
    without = (h - (h * rows).sum(-1, keepdim=True) * rows).to(states.dtype)
    return Concepts(ids, states, without.transpose(1, 2))


def _merged(model: Model, ranked: Sequence[int], top: int) -> list[int]:
    """The best tokens, one per word whatever its case and spaces; filled up where words repeat."""
    words: dict[str, int] = {}
    for token in ranked:
        text = model.token_text(token)
        words.setdefault(text.strip().lower() or text, token)
    kept = list(words.values())[:top]
    return kept + [t for t in ranked if t not in kept][: top - len(kept)]


def _reading(head: Head, width: int) -> tuple[Float[Tensor, " d"], bool]:
    """The final norm's gain, and whether it takes the mean out."""
    plain = torch.ones(width, dtype=torch.float64)
    if head.norm is None or isinstance(head.norm, nn.Identity):
        return plain, False
    form = head.form()
    return (plain, False) if form is None else (form.gain, form.centred)


def _centred(
    logits: Float[Tensor, "row vocab"], ids: Int[Tensor, "row column"]
) -> Float[Tensor, "row column"]:
    """Some logits less the mean over the vocabulary: what a softmax can see."""
    logits = logits.float()
    return logits.gather(1, ids.to(logits.device)) - logits.mean(1, keepdim=True)


def supports(
    model: Model,
    tokens: Tokens,
    found: Concepts,
    targets: Int[Tensor, "batch column"],
    *,
    batch_size: int | None = None,
) -> Float[Tensor, "layer rank batch column"]:
    """How much of each target's logit in the model's output each concept supports."""
    layers, top = found.without.shape[:2]
    cells: list[Edit | Plan] = [
        written(Site("resid_post", layer, stack=model.main), found.without[layer, rank])
        for layer in range(layers)
        for rank in range(top)
    ]
    # The unedited run as a cell of the same sweep: what it holds, written again.
    cells.append(written(Site("resid_post", 0, stack=model.main), found.states[0]))

    def read(logits: Tensor) -> Tensor:
        return _centred(logits, targets.repeat(len(logits) // len(tokens), 1))

    values, _ = sweep_columns(model, tokens, cells, read, batch_size=batch_size)
    return (values[-1] - values[:-1]).view(layers, top, len(tokens), -1)


@dataclass(frozen=True, slots=True)
class Edges:
    """Edges of one prompt's graph, in order of their layers.

    Attributes:
        layer: Layer of the source.
        to: Layer of the target; the last one is the output.
        source: Token of the source.
        target: Token of the target.
        weight: Logits of the target that the source supports.
        control: The same for a random change of equal length.
    """

    layer: list[int]
    to: list[int]
    source: list[int]
    target: list[int]
    weight: list[float]
    control: list[float]


def edges(
    model: Model,
    tokens: Tokens,
    found: Concepts,
    *,
    reach: str,
    seed: int,
    batch_size: int | None = None,
) -> Edges:
    """The graph of one prompt.

    Args:
        model: The model.
        tokens: One prompt.
        found: Its concepts (one row).
        reach: "next": to the next layer and to the output; "all": to every later layer.
        seed: Of the random changes.
        batch_size: Rows of one pass.
    """
    layers, top = found.without.shape[:2]
    last, width = layers - 1, top
    ways = [
        (layer, to)
        for layer in range(last)
        for to in (range(layer + 1, layers) if reach == "all" else sorted({layer + 1, last}))
    ]
    every = found.ids[:, 0].flatten()[None]  # concepts of all layers, [1 layer * rank]
    cells: list[Plan] = []
    for layer, to in ways:
        site, stop = Site("resid_post", layer, stack=model.main), stopped(model, to)
        state = found.states[layer]
        change = found.without[layer] - state
        noise = state + random_like(change, seed, layer).to(state.dtype)
        values = [state, *found.without[layer], *noise]
        cells += [Plan([written(site, value), *stop]) for value in values]
    values, _ = sweep_columns(
        model,
        tokens,
        cells,
        lambda logits: _centred(logits, every.expand(len(logits), -1)),
        batch_size=batch_size,
    )
    blocks = values[:, 0].view(len(ways), 1 + 2 * top, layers, width)
    out = Edges([], [], [], [], [], [])
    for (layer, to), block in zip(ways, blocks, strict=True):
        fell = block[0, to] - block[1:, to]  # [source (then its control) target]
        for source in range(top):
            for target in range(top):
                out.layer.append(layer)
                out.to.append(to)
                out.source.append(int(found.ids[layer, 0, source]))
                out.target.append(int(found.ids[to, 0, target]))
                out.weight.append(float(fell[source, target]))
                out.control.append(float(fell[top + source, target]))
    return out
