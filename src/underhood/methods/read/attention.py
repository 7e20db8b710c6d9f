"""Where every head looks: patterns, how focused they are, and how much each look carries.

The entropy of a query's pattern `p` over its visible keys is `-sum p log p` nats: 0 for one key,
`log(visible keys)` for all of them alike, which is the control. A pattern says where a head looks,
not how much it takes from there: `value_weighted` multiplies each weight by the length of what
that key would write, `p[q, k] * ||v_k W_O||`, and divides by the row's sum.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Plan
from underhood.core.errors import NotOffered, UsageError
from underhood.core.model import Model
from underhood.core.names import head_named, part_name
from underhood.core.provenance import describe
from underhood.core.run import Run
from underhood.core.taps.modules import weight_in_out
from underhood.methods.read._attention import (
    attending,
    check_head,
    names_of,
    pad_heads,
    site,
    visible_keys,
)
from underhood.methods.registry import method
from underhood.view import Result, View, grid, group, sentences
from underhood.view import heads as heads_view

__all__ = ["attention"]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's patterns and what was measured on them."""

    pattern: Float[Tensor, "head query key"]
    uniform: Float[Tensor, " query"]
    entropy: Float[Tensor, "head query"]
    norms: Float[Tensor, "head key"] | None = None

    @property
    def weighted(self) -> Float[Tensor, "head query key"]:
        """Pattern times length written, each row divided by its sum."""
        assert self.norms is not None
        raw = self.pattern * self.norms[:, None]
        return raw / raw.sum(-1, keepdim=True)


@method
def attention(
    model: Model,
    prompt: str,
    *,
    layers: tuple[int, ...] | None = None,
    heads: tuple[str, ...] | None = None,
    value_weighted: bool = False,
    show: int = 12,
    edits: Plan | None = None,
) -> Result:
    """Attention patterns of every head, their entropy, and the key each query looks at most.

    Args:
        prompt: The text.
        layers: Layers to read; None takes every layer that has attention (a hybrid's others are
            skipped).
        heads: Heads to draw, as `("a1.h2", "a3.h0")`; None draws the most focused ones.
        value_weighted: Also weight each look by the length of what that key writes.
        show: How many heads to draw when `heads` names none.
        edits: A plan in force while reading.

    Returns:
        Over `layer`, `head` (query heads under grouped attention), `query`, `key`: `pattern`;
        `entropy` (nats) per query and `mean_entropy` per head (queries with two visible keys or
        more); `top_key` and `top_weight` per query; control `uniform_entropy` per layer and query
        and `mean_uniform` per layer. With `value_weighted` also `value_norm` (||v_k W_O||) and
        `weighted` (rows sum to one).

    Raises:
        NotOffered: No attention in the model or in a layer named, or no readable values.
        OutOfRange: A layer or head that the model lacks.

    Cost: one forward. Memory: layers x heads x tokens^2 numbers.

    Source: patterns as in Vaswani et al. 2017; weighting by the length of the transformed value
        from Kobayashi et al. 2020 ("Attention is not only a weight"). Adapted: rows are
        renormalised to sum to one, and biases and gates after the values are left out. Where
        attention keeps some weight for no key (gpt-oss) the entropy is that of the rest,
        renormalised.

    Misleads: a large weight is no effect: what is moved may be small (`value_weighted`) or
        unread (use patching). The first token often takes the weight that a head has no use for
        (`sinks`).

    Example:
        >>> import underhood as uh
        >>> result = uh.read.attention(uh.load(), "The capital of France is")
        >>> result["pattern"].dims
        ('layer', 'head', 'query', 'key')
    """
    chosen = attending(model, layers)
    named = _parse(model, heads, chosen)
    if show < 1:
        raise UsageError("at least one head is drawn", given=show, do="use show=1 or more")
    record = [site(model, "pattern", layer) for layer in chosen]
    record += [site(model, "scores", layer, 0) for layer in chosen]
    writes: dict[int, Tensor] = {}
    if value_weighted:
        record += model.resolve([site(model, "v", layer) for layer in chosen])
        writes = {layer: _writing(model, layer) for layer in chosen}
    run = model.run(prompt, record=record, edits=edits)
    found = [_measure(model, run, layer, writes.get(layer)) for layer in chosen]
    data = _dataset(model, run, chosen, found)
    facts = describe(model, prompt=prompt, layers=chosen, value_weighted=value_weighted)
    return Result("attention", data, _view(data, named, show), facts)


def _parse(model: Model, heads: tuple[str, ...] | None, layers: list[int]) -> list[str]:
    """Heads to draw, checked."""
    found = []
    for name in heads or ():
        layer, head = head_named(name)
        if layer not in layers:
            raise UsageError(
                f"layer {layer} is not among the layers read",
                given=name,
                why=f"they are {', '.join(map(str, layers))}",
                do="name it in layers",
            )
        check_head(model, layer, head)
        found.append(part_name("head", layer, head))
    return found


def _writing(model: Model, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """The output projection, cut by heads."""
    block = model.anatomy.stacks[model.main].blocks[layer]
    spec = block.attention
    if spec is None or spec.o_proj is None or spec.heads is None:
        raise NotOffered(
            "values cannot be weighted here",
            given=f"layer {layer}",
            why="its output projection cannot be split by heads",
            do="leave value_weighted out",
        )
    scale = block.points["attn_out"].scale if "attn_out" in block.points else 1.0
    weight = weight_in_out(model.module.get_submodule(spec.o_proj)).detach()
    return weight.unflatten(0, (spec.heads, -1)) * scale


def _measure(model: Model, run: Run, layer: int, write: Tensor | None) -> _Layer:
    pattern = run[site(model, "pattern", layer)][0].double()
    uniform = visible_keys(run[site(model, "scores", layer, 0)][0]).log()
    share = pattern / pattern.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).sum(-1)
    norms = None
    if write is not None:
        value = run[site(model, "v", layer)][0]
        wide = value.repeat_interleave(write.shape[0] // value.shape[1], 1)
        if wide.shape[1:] != write.shape[:2]:
            raise NotOffered(
                "values cannot be weighted here",
                given=f"layer {layer}: values {tuple(wide.shape[1:])}, W_O {tuple(write.shape)}",
                why="the output projection does not read the values' own axes",
                do="leave value_weighted out",
            )
        # [key head d_head] x [head d_head d_model] -> [head key]
        written = torch.einsum("khd,hdm->hkm", wide, write.to(wide))
        norms = written.double().norm(dim=-1)
    return _Layer(pattern, uniform, entropy, norms)


def _dataset(model: Model, run: Run, layers: list[int], found: list[_Layer]) -> Any:
    import xarray

    assert run.tokens is not None
    strings = list(run.tokens.strings[0])
    many = [layer.uniform > 0 for layer in found]  # queries that have a choice
    means = [
        f.entropy[:, m].mean(-1) if bool(m.any()) else torch.full_like(f.entropy[:, 0], torch.nan)
        for f, m in zip(found, many, strict=True)
    ]
    uniform = torch.stack([f.uniform for f in found])
    chance = [float(f.uniform[m].mean()) for f, m in zip(found, many, strict=True)]
    tops = [f.pattern.max(-1) for f in found]
    rows, cells = ("layer", "head", "query"), ("layer", "head", "query", "key")
    values = {
        "pattern": (cells, pad_heads([f.pattern for f in found])),
        "entropy": (rows, pad_heads([f.entropy for f in found])),
        "mean_entropy": (rows[:2], pad_heads(means)),
        "top_key": (rows, pad_heads([t.indices for t in tops])),
        "top_weight": (rows, pad_heads([t.values for t in tops])),
        "uniform_entropy": (("layer", "query"), uniform.cpu().numpy()),
        "mean_uniform": ("layer", np.array(chance)),
    }
    norms = [f.norms for f in found if f.norms is not None]
    if norms:
        values["value_norm"] = (("layer", "head", "key"), pad_heads(norms))
        values["weighted"] = (cells, pad_heads([f.weighted for f in found]))
    heads = values["pattern"][1].shape[1]
    coords = {
        "layer": layers,
        "head": range(heads),
        "query": range(len(strings)),
        "key": range(len(strings)),
        "query_token": ("query", strings),
        "key_token": ("key", strings),
    }
    return xarray.Dataset(values, coords=coords)


def _view(data: Any, named: list[str], show: int) -> View:
    layers = [int(layer) for layer in data["layer"].values]
    mean = data["mean_entropy"].values
    chance = data["mean_uniform"].values
    strings = [str(s) for s in data["key_token"].values]
    drawn = named or names_of(mean, layers, lowest=True)[:show]
    kind = "weighted" if "weighted" in data else "pattern"
    patterns, notes = {}, {}
    for name in drawn:
        layer, head = head_named(name)
        i = layers.index(layer)
        patterns[name] = data[kind].values[i, head]
        notes[name] = f"entropy {mean[i, head]:.2f} of {chance[i]:.2f} nats"
    top = float(np.nanmax(np.append(chance, 0.0))) or 1.0
    labels, columns = [str(n) for n in layers], [str(h) for h in range(mean.shape[1])]
    control = grid(
        np.broadcast_to(chance[:, None], mean.shape),
        rows=labels, cols=columns, row_name="layer", col_name="head", scale="sequential",
        limit=top, unit="nats", title="All visible tokens alike",
        about="The most entropy that a head can have here.",
    )  # fmt: skip
    measured = grid(
        mean, rows=labels, cols=columns, row_name="layer", col_name="head", scale="sequential",
        limit=top, unit="nats", title="Mean entropy of each head", control=control,
        about="Low: the head looks at few tokens. Queries that see only themselves are left out.",
    )  # fmt: skip
    how = "weight x length of what that token writes" if kind == "weighted" else "attention weight"
    thumbs = heads_view(
        strings, patterns, notes=notes, title="Where the heads look",
        about=f"Rows: queries; columns: keys; shade: {how}."
        + ("" if named else " Most focused heads first.")
        + " A large weight is not an effect: check by patching.",
    )  # fmt: skip
    return group([sentences(_facts(data, layers)), thumbs, measured], title="Attention")


def _facts(data: Any, layers: list[int]) -> list[str]:
    mean, chance = data["mean_entropy"].values, data["mean_uniform"].values
    order = names_of(mean, layers, lowest=True)
    if not order:
        return ["The prompt has a single token: no head has a choice."]
    layer, head = head_named(order[0])
    i = layers.index(layer)
    last = data["top_key"].values[i, head, -1]
    first = float(np.nanmean(data["pattern"].values[:, :, 1:, 0]))
    return [
        f"Head {order[0]} is the most focused: {mean[i, head]:.2f} nats on average, where looking"
        f" at all visible tokens alike gives {chance[i]:.2f}.",
        f"From the last token it looks most at {str(data['key_token'].values[int(last)])!r}"
        f" (weight {data['top_weight'].values[i, head, -1]:.2f}).",
        f"Averaged over heads and later tokens, the first token receives {first:.0%} of the"
        " attention.",
    ]
