"""Sequences that repeat, and how much each head looks at fixed offsets in them.

A sequence is `BOS + r + r`; its control is `BOS + r + r'`, where `r'` shares no token with `r` as
far as the vocabulary allows. For a query in the second half, offset 0 is the earlier occurrence of
its own token, offset 1 the token after that (what an induction head copies).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Plan
from underhood.core.errors import UsageError
from underhood.core.model import Model
from underhood.methods.read._attention import batches, bos_of, id_rows, ordinary, site

__all__ = ["Looks", "Repeats", "draw", "look"]

REACH = 8
"""Furthest offset looked at, in tokens after the earlier occurrence or before the query."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """Sequences with and without a repeat.

    Attributes:
        repeated: Ids of `BOS + r + r`, row by row.
        control: Ids of `BOS + r + r'`.
        start: 1 with a BOS token, else 0.
        lengths: Length of each `r`.
        note: What had to give way (length, repeated tokens), for the provenance.
    """

    repeated: list[list[int]]
    control: list[list[int]]
    start: int
    lengths: list[int]
    note: str = ""

    @property
    def reach(self) -> int:
        """Offsets looked at; small enough that no lag is also an offset from the duplicate."""
        return max(min(REACH, (min(self.lengths) - 1) // 2), 1)


@dataclass(frozen=True, slots=True)
class Looks:
    """Mean attention at fixed offsets, per sequence; one tensor per layer.

    Attributes:
        from_duplicate: Offsets -reach .. reach from the earlier occurrence; second half only.
        back: 1 .. reach tokens before the query; all queries.
        accuracy: Share of the second half's tokens (after its first) that come out on top.
    """

    from_duplicate: list[Float[Tensor, "row head offset"]]
    back: list[Float[Tensor, "row head lag"]]
    accuracy: float
    causal: bool


def draw(
    model: Model, prompts: Sequence[str] | None, *, samples: int, length: int, seed: int
) -> Repeats:
    """Sequences of random tokens, or of given texts, each said twice.

    Raises:
        UsageError: Too few samples or tokens, or a context that holds no repeat.
    """
    for name, value, least in (("samples", samples, 2), ("length", length, 3)):
        if value < least:
            raise UsageError(f"{name} is at least {least}", given=value, do=f"use {least} or more")
    make = torch.Generator().manual_seed(seed)
    words, bos = torch.tensor(ordinary(model)), bos_of(model)
    head = [] if bos is None else [bos]
    room = ((model.text.context or 2**31) - len(head)) // 2
    if room < 3:
        raise UsageError(
            "the model's context is too short to repeat anything",
            given=f"{model.text.context} tokens",
            do="use a model with a longer context",
        )
    if prompts is not None:
        special = set(model.tokenizer.all_special_ids) if model.tokenizer is not None else set()
        rows = [[i for i in row if i not in special] for row in id_rows(model, prompts)]
        return _texts(rows, words, head, make, room)
    used = min(length, room)
    note = f"length {used}, not {length}: the context has {model.text.context} tokens; "
    note = note if used < length else ""
    distinct = len(words) >= 2 * used
    if not distinct:
        note += f"tokens recur by chance: the vocabulary has {len(words)}; "
    first, second = [], []
    for _ in range(samples):
        if distinct:
            both = words[torch.randperm(len(words), generator=make)[: 2 * used]]
        else:
            both = words[torch.randint(len(words), (2 * used,), generator=make)]
        first.append(both[:used].tolist())
        second.append(both[used:].tolist())
    return Repeats(
        [head + r + r for r in first],
        [head + r + other for r, other in zip(first, second, strict=True)],
        len(head), [used] * samples, note.removesuffix("; "),
    )  # fmt: skip


def _texts(
    rows: list[list[int]], words: Tensor, head: list[int], make: torch.Generator, room: int
) -> Repeats:
    for row in rows:
        if not 3 <= len(row) <= room:
            raise UsageError(
                f"a text of {len(row)} tokens cannot be said twice here",
                given=f"{len(row)} tokens",
                why=f"3 to {room} fit",
                do="use texts of that length, or random tokens (no prompts)",
            )
    control = []
    for row in rows:
        fresh = words[~torch.isin(words, torch.tensor(row))]
        fresh = fresh if len(fresh) else words
        picks = torch.randint(len(fresh), (len(row),), generator=make)
        control.append(head + row + fresh[picks].tolist())
    note = "the given texts, each said twice; samples and length do not apply"
    return Repeats([head + r + r for r in rows], control, len(head), [len(r) for r in rows], note)


def look(
    model: Model, rows: list[list[int]], repeats: Repeats, layers: list[int], edits: Plan | None
) -> Looks:
    """Run the sequences and average each head's attention at every offset.

    Cost: one forward over all rows, in batches.
    """
    parts: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}
    record = [site(model, "pattern", layer) for layer in layers]
    right = total = 0
    order: list[int] = []
    causal = True
    for chunk, tokens in batches(model, rows):
        run = model.run(tokens, record=record, edits=edits)
        order += chunk
        for layer in layers:
            pattern = run[site(model, "pattern", layer)].double().cpu()
            causal = causal and not bool(pattern.triu(1).any())
            for row, i in enumerate(chunk):
                n = repeats.lengths[i]
                own = pattern[row, :, : len(rows[i]), : len(rows[i])]
                parts[layer][0].append(_from_duplicate(own, repeats.start, n, repeats.reach))
                parts[layer][1].append(_back(own, repeats.reach))
        for row, i in enumerate(chunk):
            first = repeats.start + repeats.lengths[i]
            said = run.logits[row, first : len(rows[i]) - 1].argmax(-1).cpu()
            right += int((said == torch.tensor(rows[i][first + 1 :])).sum())
            total += len(said)
    back_in_order = torch.tensor(order).argsort()
    stacked = {k: [torch.stack(p)[back_in_order] for p in v] for k, v in parts.items()}
    return Looks(
        [stacked[layer][0] for layer in layers],
        [stacked[layer][1] for layer in layers],
        right / max(total, 1),
        causal,
    )


def _diagonal(pattern: Tensor, queries: Tensor, offset: int) -> Tensor:
    """Mean weight of `queries` on the key `offset` places on; keys outside are left out."""
    keys = queries + offset
    inside = (keys >= 0) & (keys < pattern.shape[-1])
    if not bool(inside.any()):
        return torch.full(pattern.shape[:1], torch.nan, dtype=pattern.dtype)
    return pattern[:, queries[inside], keys[inside]].mean(-1)


def _from_duplicate(
    pattern: Float[Tensor, "head query key"], start: int, n: int, reach: int
) -> Float[Tensor, "head offset"]:
    queries = torch.arange(start + n, start + 2 * n)
    offsets = range(-reach, reach + 1)
    return torch.stack([_diagonal(pattern, queries, k - n) for k in offsets], -1)


def _back(pattern: Float[Tensor, "head query key"], reach: int) -> Float[Tensor, "head offset"]:
    queries = torch.arange(1, pattern.shape[-1])
    return torch.stack([_diagonal(pattern, queries, -k) for k in range(1, reach + 1)], -1)


def uniform(repeats: Repeats, *, causal: bool) -> tuple[float, float]:
    """What a head gets that looks at all visible tokens alike: (second half, one token back)."""
    halves, backs = [], []
    for n in repeats.lengths:
        size = repeats.start + 2 * n
        seen = torch.arange(1, size + 1).double() if causal else torch.full((size,), float(size))
        halves.append(float((1 / seen[repeats.start + n :]).mean()))
        backs.append(float((1 / seen[1:]).mean()))
    return sum(halves) / len(halves), sum(backs) / len(backs)
