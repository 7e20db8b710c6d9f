"""What the methods on attention share: which layers attend, rows of ids, padding, small views."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.site import Site
from underhood.core.tokens import Tokens

__all__ = [
    "attending", "batches", "bos_of", "check_head", "check_reads_text", "id_rows", "names_of",
    "ordinary", "pad_heads", "site", "visible_keys",
]  # fmt: skip

ROWS = 8  # prompts per forward: bounds the memory that patterns of all layers take


def site(model: Model, name: str, layer: int | None = None, unit: int | None = None) -> Site:
    """A site in the stack that predicts tokens."""
    return Site(name, layer, unit, stack=model.main)


def check_reads_text(model: Model) -> None:
    """Refuse encoder-decoder models: one prompt does not say what their decoder reads.

    Raises:
        NotOffered: The model is one.
    """
    if model.main == "dec":
        raise NotOffered(
            "this method reads one text, and the model has an encoder and a decoder",
            given=repr(model),
            why="a prompt goes to the encoder; nothing says what the decoder reads",
            do="record pattern or resid_post with model.run and both inputs",
        )


def attending(model: Model, layers: Sequence[int] | None = None) -> list[int]:
    """Layers with a softmax over keys: all of them, or those asked for.

    Raises:
        NotOffered: The model has none, or a layer that was asked for has none.
        OutOfRange: A layer that the model lacks.
    """
    check_reads_text(model)
    if layers is None:
        return [s.layer for s in model.resolve(site(model, "pattern")) if s.layer is not None]
    if not layers:
        raise UsageError("no layer was named", given="()", do="leave layers out for all of them")
    found = sorted({layer % model.n_layers if layer < 0 else layer for layer in layers})
    model.resolve([site(model, "pattern", layer) for layer in found])
    return found


def check_head(model: Model, layer: int, head: int) -> None:
    """Refuse a query head that a layer lacks."""
    count = model.size(site(model, "pattern", layer), "head") or model.n_heads
    if not 0 <= head < count:
        raise OutOfRange(
            f"layer {layer} has no head {head}",
            given=part_name("head", layer, head),
            why=f"it has {count} query heads",
            do=f"use heads 0 to {count - 1}",
        )


def bos_of(model: Model) -> int | None:
    """The token that opens a text: the tokenizer's, else the config's; None without one."""
    if model.tokenizer is not None:
        return getattr(model.tokenizer, "bos_token_id", None)
    config = getattr(model.config, "text_config", None) or model.config
    bos, size = getattr(config, "bos_token_id", None), getattr(config, "vocab_size", 0)
    return bos if isinstance(bos, int) and 0 <= bos < size else None


def ordinary(model: Model) -> list[int]:
    """Ids that are words or pieces of words: no special tokens, no unused rows of the table.

    Raises:
        UsageError: The vocabulary is not known.
    """
    config = getattr(model.config, "text_config", None) or model.config
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise UsageError(
            "the size of the vocabulary is not known",
            given=repr(model),
            do="use a language model",
        )
    if model.tokenizer is not None:
        special = set(model.tokenizer.all_special_ids)
        return [i for i in range(min(size, len(model.tokenizer))) if i not in special]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {v for n in names if isinstance(v := getattr(config, n, None), int)}
    return [i for i in range(size) if i not in special]


def id_rows(model: Model, prompts: Sequence[str], *, least: int = 1) -> list[list[int]]:
    """Ids of each prompt, padding taken out.

    Raises:
        UsageError: No prompt, or one with fewer than `least` tokens.
    """
    check_reads_text(model)
    if isinstance(prompts, str):
        raise UsageError("several prompts are expected", given=repr(prompts), do=f"[{prompts!r}]")
    if not prompts:
        raise UsageError("there are no prompts", given="[]", do="give at least one")
    rows = [model.tokens(p).ids[0].tolist() for p in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) < least:
            raise UsageError(
                f"a prompt has {len(row)} tokens",
                given=repr(prompt),
                why=f"this statistic needs at least {least}",
                do="use longer prompts",
            )
    return rows


def batches(model: Model, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tokens]]:
    """Rows of ids as padded batches: (which rows, tokens). Without a pad token, equal lengths only.

    Long rows go together, so little is padded.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    at = 0
    while at < len(order):
        chunk = order[at : at + ROWS]
        if model.text.pad_id is None:
            chunk = [i for i in chunk if len(rows[i]) == len(rows[chunk[0]])]
        yield chunk, model.text.rectangle([rows[i] for i in chunk])
        at += len(chunk)


def visible_keys(scores: Float[Tensor, "query key"]) -> Float[Tensor, " query"]:
    """How many keys each query may look at, from masked scores."""
    return (~torch.isneginf(scores)).double().sum(-1)


def pad_heads(per_layer: Sequence[Tensor], axis: int = 0) -> np.ndarray:
    """Layers stacked in front; where head counts differ the missing heads are NaN."""
    most = max(t.shape[axis] for t in per_layer)
    full = []
    for tensor in per_layer:
        shape = list(tensor.shape)
        shape[axis] = most - shape[axis]
        filler = torch.full(shape, torch.nan, dtype=torch.float64)
        full.append(torch.cat([tensor.double().cpu(), filler], axis))
    return torch.stack(full).numpy()


def names_of(values: np.ndarray, layers: Sequence[int], *, lowest: bool = False) -> list[str]:
    """Heads, the highest value first (or the lowest); undefined ones left out."""
    flat = [
        (float(values[i, h]), part_name("head", int(layer), h))
        for i, layer in enumerate(layers)
        for h in range(values.shape[1])
        if np.isfinite(values[i, h])
    ]
    flat.sort(key=lambda pair: pair[0] if lowest else -pair[0])
    return [name for _, name in flat]
