"""Who may look at whom, layer by layer; and states that know their own token only.

`Look` is a mask over queries and keys as an op on `scores`. `TokenStates` holds, for every position
and token, the mean state over prompts of one template that have this token there: what the model
makes of the token by itself, at each layer (CAMA).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import OutOfRange, PairError, UsageError, nearest
from underhood.core.model import Model
from underhood.core.ops import Moment, Op, patch
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Pairs

__all__ = [
    "Look", "TokenStates", "alone", "last_logits", "looks", "margin", "one_template", "places",
    "streams",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Look(Op):
    """Leave each query the keys that `visible` grants it (site `scores`).

    Attributes:
        visible: Over positions within a row's own tokens. A query beyond its end keeps its row.
    """

    name = "look"
    only_on = ("scores",)
    visible: Bool[Tensor, "query key"]

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        size = len(self.visible)
        keys = torch.arange(h.shape[-1], device=h.device).expand(h.shape[0], -1)
        if moment.key_offset is not None:
            keys = keys - moment.key_offset.to(h.device)[:, None]
        queries = moment.positions.to(h.device)
        seen = self.visible.to(h.device)[
            queries.clamp(0, size - 1)[:, :, None], keys.clamp(0, size - 1)[:, None]
        ]
        shape = (h.shape[0], *[1] * (h.ndim - 3), *seen.shape[1:])
        out = h.masked_fill(~seen.view(shape), -torch.inf)
        # Padding queries see nothing of theirs; a softmax over nothing is not a number.
        empty = torch.isneginf(out).all(-1, keepdim=True)
        return torch.where(empty, h, out)


def alone(size: int, *, first: bool) -> Bool[Tensor, "query key"]:
    """Every token sees itself, and the first token where that one is a fixed sink."""
    visible = torch.eye(size, dtype=torch.bool)
    visible[:, 0] |= first
    return visible


def margin(
    logits: Float[Tensor, "rows vocab"], right: Int[Tensor, "rows n"], wrong: Tensor | None
) -> Float[Tensor, " rows"]:
    """Best answer's logit minus the best other's (of `wrong`, or of the whole vocabulary).

    Positive exactly where the answer comes first, so one number tells accuracy and distance.
    """
    logits = logits.double()
    mine = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    mine = mine.scatter(1, right.to(logits.device) % (logits.shape[1] + 1), True)[:, :-1]
    best = logits.masked_fill(~mine, -torch.inf).amax(1)
    others = ~mine
    if wrong is not None:
        named = torch.zeros_like(torch.nn.functional.pad(mine, (0, 1)))
        named = named.scatter(1, wrong.to(logits.device) % named.shape[1], True)[:, :-1]
        others = others & named
    return best - logits.masked_fill(~others, -torch.inf).amax(1)


# Prompts -----------------------------------------------------------------------------------------


def one_template(encoded: EncodedPairs) -> tuple[Int[Tensor, "prompt pos"], bool]:
    """Ids of all prompts, clean ones first, and whether all start with the same token.

    Raises:
        PairError: Prompts of different length, so that positions do not correspond.
    """
    lengths = encoded.clean.lengths
    if len(set(lengths)) > 1:
        other = next(i for i, n in enumerate(lengths) if n != lengths[0])
        raise PairError(
            "these prompts are not of one template",
            given=f"{lengths[0]} tokens in row 0, {lengths[other]} in row {other}",
            why="tokens are compared and exchanged position by position",
            do="keep prompts of one template and length, or make one call per template",
        )
    ids = []
    for tokens in (encoded.clean, encoded.contrast):
        starts, size = torch.tensor(tokens.starts), lengths[0]
        columns = starts[:, None] + torch.arange(size)[None]
        ids.append(tokens.ids.cpu().gather(1, columns))
    both = torch.cat(ids)
    return both, bool((both[:, 0] == both[0, 0]).all())


def places(names: Sequence[str], pairs: Pairs, size: int) -> dict[str, tuple[int, ...]]:
    """Groups of positions: by the name of a word or position, "4", "2-5" or "2,7".

    Raises:
        UsageError: A name that the pairs do not know.
        OutOfRange: A position outside the prompts.
    """
    known = dict(pairs.word_positions or {})
    known |= {name: i for i, name in enumerate(pairs.position_labels or ()) if name not in known}
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        spots: list[int] = []
        for part in [name] if name in known else name.split(","):
            part = part.strip()
            low, _, high = part.partition("-")
            if part in known:
                spots.append(known[part])
            elif low.isdecimal() and (high.isdecimal() or not high):
                spots += range(int(low), int(high or low) + 1)
            else:
                raise UsageError(
                    f"there is no group of tokens named {part!r}",
                    given=name,
                    why="the pairs name " + (", ".join(known) if known else "no words"),
                    do=(f"nearest: {nearest(part, known)}; or " if known else "")
                    + 'give positions: "4", "2-5" or "2,7"',
                )
        if bad := [spot for spot in spots if not -size <= spot < size]:
            raise OutOfRange(
                f"the group {name!r} names position {bad[0]}",
                given=f"prompts of {size} tokens",
                do=f"use 0 to {size - 1}",
            )
        found[name] = tuple(sorted({spot % size for spot in spots}))
    return found


def streams(model: Model) -> list[Site]:
    """The stream before each layer, and after the last."""
    sites = [Site("resid_pre", layer, stack=model.main) for layer in range(model.n_layers)]
    return [*sites, Site("resid_post", model.n_layers - 1, stack=model.main)]


class TokenStates:
    """Mean states by position and token: E[state | token t], over prompts of one template.

    Args:
        model: The model.
        pool: Prompts of the template.
        draw: "slots": new prompts whose tokens are drawn position by position from those of the
            pool, each by itself; "prompts": the pool as it is.
        samples: Prompts per position and token at least ("slots").
        seed: Of the draw.
        batch_size: Rows of one pass.

    Raises:
        UsageError: "prompts", and a token that only one prompt has at its place.
    """

    def __init__(
        self, model: Model, pool: Int[Tensor, "prompt pos"], *, draw: str, samples: int, seed: int,
        batch_size: int | None,
    ) -> None:  # fmt: skip
        self.model, self.sites = model, streams(model)
        self.known = [column.unique().tolist() for column in pool.T]
        drawn = self._drawn(samples, seed) if draw == "slots" else pool.unique(dim=0)
        if draw == "prompts":
            self._check(drawn)
        self.index = [{token: i for i, token in enumerate(tokens)} for tokens in self.known]
        self.passes, self.drawn = 0, len(drawn)
        size = batch_size or rows_per_pass(drawn.shape[1])
        widest = max(map(len, self.known))
        self.counts = torch.zeros(drawn.shape[1], widest, dtype=torch.float64)
        self.sums: list[Tensor] = []
        for start in range(0, len(drawn), size):
            self._add(drawn[start : start + size], widest)

    def _drawn(self, samples: int, seed: int) -> Int[Tensor, "prompt pos"]:
        """Each column holds its tokens equally often, in an order of its own."""
        many = samples * max(map(len, self.known))
        rng = random.Random(seed)
        columns = []
        for tokens in self.known:
            column = [tokens[i % len(tokens)] for i in range(many)]
            rng.shuffle(column)
            columns.append(column)
        return torch.tensor(columns).T

    def _check(self, pool: Tensor) -> None:
        for pos, tokens in enumerate(self.known):
            for token in tokens:
                if int((pool[:, pos] == token).sum()) < 2:
                    raise UsageError(
                        "a token has no other prompt to be averaged with",
                        given=f"{self.model.token_text(token)!r} at position {pos}",
                        why="the mean over its prompts would be its own state, and hide nothing",
                        do="give more prompts of the template, or draw='slots'",
                    )

    def _add(self, ids: Tensor, widest: int) -> None:
        mask = torch.ones_like(ids, dtype=torch.bool)
        run = self.model.run(Tokens(ids, mask), record=self.sites)
        self.passes += 1
        slots = self.slots(ids)
        flat = (slots + torch.arange(ids.shape[1])[None] * widest).flatten()
        cells = ids.shape[1] * widest
        self.counts += torch.zeros(cells, dtype=torch.float64).index_add(
            0, flat, torch.ones(len(flat), dtype=torch.float64)
        ).view_as(self.counts)  # fmt: skip
        for number, site in enumerate(self.sites):
            value = run.aligned(site).double().cpu().flatten(0, 1)
            total = torch.zeros(cells, value.shape[-1], dtype=torch.float64)
            total = total.index_add(0, flat, value).view(ids.shape[1], widest, -1)
            if number == len(self.sums):
                self.sums.append(torch.zeros_like(total))
            self.sums[number] += total

    def slots(self, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """Number of each token among the known ones of its position."""
        rows = [[self.index[pos][token] for pos, token in enumerate(row)] for row in ids.tolist()]
        return torch.tensor(rows)

    def mean(self, ids: Int[Tensor, "batch pos"], layer: int) -> Float[Tensor, "batch pos d"]:
        """The mean state before a layer of each token of some prompts, given the token."""
        slots, spots = self.slots(ids), torch.arange(ids.shape[1])[None]
        return self.sums[layer][spots, slots] / self.counts[spots, slots][..., None]

    def blind(self, batch: int, layer: int) -> Float[Tensor, "batch pos d"]:
        """The same whatever the token."""
        mean = self.sums[layer].sum(1) / self.counts.sum(1)[:, None]
        return mean.expand(batch, *mean.shape)

    def edit(self, layer: int, values: Float[Tensor, "batch pos d"]) -> Edit:
        """Write states before a layer (after the last for its number)."""
        return Edit(self.sites[layer], patch(values.to(self.model.device, self.model.dtype)))

    def waiting(
        self, ids: Tensor, own: Run, rows: range, *, seed: int
    ) -> Iterator[tuple[str, Edit]]:
        """Per layer the mean given the token, and its controls, as (kind, edit).

        blind: the mean whatever the token; skip: the state before the first layer; noise: the own
        state moved by as much as the mean moves it, in a random direction.
        """
        for layer, site in enumerate(self.sites):
            state, mean = own.aligned(site).double().cpu(), self.mean(ids, layer)
            move = (mean - state).norm(dim=-1, keepdim=True)
            noise = []
            for row in rows:
                make = torch.Generator().manual_seed(hash((seed, row, layer)) % 2**63)
                noise.append(torch.randn(state.shape[1:], generator=make, dtype=torch.float64))
            random_way = torch.stack(noise)
            random_way = random_way / random_way.norm(dim=-1, keepdim=True)
            yield "mean", self.edit(layer, mean)
            yield "blind", self.edit(layer, self.blind(len(ids), layer))
            yield "skip", self.edit(layer, own.aligned(self.sites[0]).double().cpu())
            yield "noise", self.edit(layer, state + move * random_way)


def looks(model: Model, visible: Mapping[int, Tensor]) -> list[Edit]:
    """Edits for masks by layer."""
    return [
        Edit(Site("scores", layer, stack=model.main), Look(mask.to(model.device)))
        for layer, mask in visible.items()
    ]


def last_logits(
    model: Model, tokens: Tokens, batch_size: int | None
) -> Float[Tensor, "batch vocab"]:
    """Logits at each prompt's last token, in passes of some rows."""
    size = batch_size or rows_per_pass(tokens.ids.shape[1])
    return torch.cat([model.run(tokens.rows(b)).last_logits for b in tokens.blocks(size)])
