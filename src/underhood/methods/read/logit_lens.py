"""The logit lens: what each layer would say if the model stopped there.

    lens_l(x) = unembed(final_norm(resid_post_l(x)))

The stream before the first block (the embedding) is read too, as layer -1. The lens of the last
block is the model itself; that is checked in every call, so a model with anything else between its
last block and its logits is refused rather than misread.

What this does not do: translate early layers into the last layer's basis (a tuned lens would).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.errors import NotOffered, OutOfRange
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.site import Site
from underhood.core.tokens import Where
from underhood.methods.read._unembedding import head_of, tolerance
from underhood.methods.registry import method
from underhood.view import Result, View, grid, group, lines, sentences

if TYPE_CHECKING:
    import xarray

__all__ = ["logit_lens"]

_RANDOM = 8  # least number of random vectors per layer
_TOGETHER = 256  # stream vectors unembedded at once
_WHOLE = 12_000  # cells beyond which a view has the followed probability alone


@method
def logit_lens(
    model: Model,
    prompt: str,
    *,
    top: int = 5,
    answer: str | None = None,
    wrong: str | None = None,
    positions: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Result:
    """What each layer would say at each position, read through the model's own unembedding.

    Args:
        prompt: The text to read.
        top: Tokens to keep per layer and position.
        answer: The token whose probability and rank are followed, as text of exactly one token
            (mind the leading space). None: at each position the model's own top prediction.
        wrong: A second token to follow.
        positions: Positions to read, counted in the prompt's tokens (-1: the last). None: all.
        seed: Of the random vectors of the control.

    Returns:
        Over `layer` (-1: the embedding, l: after block l) and `pos`: `top_prob` and `top_id` (with
        `rank`, best first; the texts are the coordinate `top_token`), `entropy` (nats), `kl` from
        the model's own distribution to the layer's (nats), `target_prob`, `target_rank` (tokens
        above it), `wrong_prob` (if asked), `control_prob` (the target's probability on random
        vectors of the same length). Over `pos`: `settles`, the first layer from which the top token
        stays the model's own.

    Raises:
        NotOffered: No unembedding, an encoder-decoder, or a model with more than a final norm and
            an unembedding after its last block.
        AnswerError: An answer that is not one token.
        OutOfRange: `top` or a position outside the vocabulary or the prompt.

    Cost: one forward, and the unembedding of every layer twice (lens and control).

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens". Ours: entropy, KL and settling
        layer in one call, and the control on random vectors.

    Misleads: early layers need not use the basis of the last one, so an unreadable layer is not an
        empty one (Belrose et al. 2023 train a translator per layer). A token that the lens shows is
        readable there; whether the model uses it, only patching tells.

    Example:
        >>> import underhood as uh
        >>> lens = logit_lens(uh.load(), "The capital of France is", top=2)
        >>> str(lens["top_token"].values[-1, -1, 0])
        'Paris'
    """
    head = head_of(model)
    tokens = model.tokens(prompt)
    chosen = _positions(positions, tokens.lengths[0])
    _check_top(head, top)
    follow = [model.token_id(t) if t is not None else None for t in (answer, wrong)]
    first = Site("resid_pre", 0, stack=model.main)
    each = Site("resid_post", stack=model.main)
    run = model.run(tokens, record=[first, each], at=Where(chosen))
    streams = torch.cat([run[first], run[each][:, 0]])
    final = run.logits[0, chosen].float()
    gap = _check_last(model, head.logits(streams[-1]), final)
    targets = final.argmax(-1) if follow[0] is None else final.new_full((len(chosen),), follow[0])
    log = _log_probs(final)
    lens = _Lens(head, log, log.exp(), targets.long(), follow[1], top)
    found = lens.read(streams) | lens.control(streams, seed)
    data = _dataset(model, found, targets.long())
    words = {"token": ("pos", [tokens.strings[0][p] for p in chosen])}
    data = data.assign_coords({"pos": list(chosen), **words})
    return Result(
        name="logit_lens",
        data=data,
        view=_view(data, answer=answer, wrong=wrong),
        provenance=describe(
            model, prompt=prompt, answer=answer, wrong=wrong, top=top, seed=seed,
            self_check=f"lens of the last block = the model's logits within {gap:.1e}",
        ),
    )  # fmt: skip


def _positions(positions: tuple[int, ...] | None, length: int) -> list[int]:
    """Positions as numbers from 0, in order, each once."""
    if positions is None:
        return list(range(length))
    Where(positions).validate(lengths=[length], generating=False)
    if not positions:
        raise OutOfRange(
            "no position was named", given="positions=()", do="name some, or leave it out for all"
        )
    return sorted({p % length for p in positions})


def _check_top(head: Head, top: int) -> None:
    size = getattr(head.module, "out_features", None)
    if top < 1 or (size is not None and top > size):
        raise OutOfRange(
            "this many top tokens cannot be shown", given=f"top={top}", do=f"use 1 to {size or 'n'}"
        )


def _check_last(
    model: Model, lens: Float[Tensor, "pos vocab"], final: Float[Tensor, "pos vocab"]
) -> float:
    """The largest difference between the lens of the last block and the model, relative to it."""
    gap = float((lens.float() - final).abs().max() / final.abs().max().clamp(min=1.0))
    if gap <= tolerance(model.dtype):
        return gap
    raise NotOffered(
        "the lens of the last block is not what the model says",
        given=f"{model!r}: largest difference {gap:.2g} of the largest logit",
        why="there is more between its last block and its logits than a norm and an unembedding",
        do="use activation patching, which needs no unembedding of inner layers",
    )


@dataclass(frozen=True, slots=True)
class _Lens:
    """The lens over one prompt.

    Attributes:
        head: Final norm and unembedding.
        final: Log-probabilities of the model itself.
        sure: Its probabilities.
        targets: The token followed at each position.
        wrong: A second token, the same everywhere.
        top: Tokens to keep.
    """

    head: Head
    final: Float[Tensor, "pos vocab"]
    sure: Float[Tensor, "pos vocab"]
    targets: Int[Tensor, " pos"]
    wrong: int | None
    top: int

    def read(self, streams: Float[Tensor, "layer pos d_model"]) -> dict[str, Tensor]:
        """All numbers of all layers."""
        parts = [self._read(block) for block in streams.split(_layers_at_once(streams.shape[1]))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _read(self, streams: Float[Tensor, "layer pos d_model"]) -> dict[str, Tensor]:
        log = _log_probs(self.head.logits(streams))
        best = log.topk(self.top, dim=-1)
        mine = log.gather(-1, self._index(log))
        found = {
            "top_prob": best.values.exp(),
            "top_id": best.indices,
            "entropy": -_dot(log.exp(), log),
            # Rounding may leave the distance of equal distributions just below zero.
            "kl": (_dot(self.sure, self.final) - _dot(self.sure, log)).clamp(min=0),
            "target_prob": mine[..., 0].exp(),
            "target_rank": (log > mine).sum(-1),
        }
        if self.wrong is not None:
            found["wrong_prob"] = log[..., self.wrong].exp()
        return {name: value.cpu() for name, value in found.items()}

    def _index(self, logits: Tensor) -> Int[Tensor, "*layer pos 1"]:
        """The targets, as an index into logits `[..., pos, vocab]`."""
        return self.targets[:, None].expand(*logits.shape[:-1], 1)

    def control(self, streams: Float[Tensor, "layer pos d_model"], seed: int) -> dict[str, Tensor]:
        """The same reading of random vectors as long as the streams.

        Returns:
            `control_prob` `[layer, pos]`: probability of each position's target, mean over draws;
            `control_last` `[layer]`: that of the last position's target over all random vectors of
            the layer, so that its curve does not hang on a single one.
        """
        make = torch.Generator().manual_seed(seed)
        draws = -(-_RANDOM // len(self.targets))
        cells, last = [], []
        for block in streams.split(_layers_at_once(draws * len(self.targets))):
            noise = torch.randn(draws, *block.shape, generator=make).to(block.device)
            length = block.float().norm(dim=-1, keepdim=True)
            noise = noise / noise.norm(dim=-1, keepdim=True) * length
            logits = self.head.logits(noise.to(block.dtype)).float()
            total = logits.logsumexp(-1)
            mine = (logits.gather(-1, self._index(logits))[..., 0] - total).exp()
            end = (logits[..., int(self.targets[-1])] - total).exp()
            cells.append(mine.mean(0).cpu())
            last.append(end.mean((0, 2)).cpu())
        return {"control_prob": torch.cat(cells), "control_last": torch.cat(last)}


def _layers_at_once(rows: int) -> int:
    """Layers to unembed together: the unembedding is read from memory once for all of them."""
    return max(1, _TOGETHER // rows)


def _log_probs(logits: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row vocab"]:
    """In float32; tokens ruled out get the least number, so that zero times it is zero."""
    return logits.float().log_softmax(-1).clamp_(min=torch.finfo(torch.float32).min)


def _dot(a: Float[Tensor, "*a vocab"], b: Float[Tensor, "*b vocab"]) -> Float[Tensor, "*c"]:
    return torch.linalg.vecdot(a, b)


def _settles(top_id: Int[Tensor, "layer pos"]) -> Int[Tensor, " pos"]:
    """Index of the first layer from which the top token stays the last layer's."""
    same = (top_id == top_id[-1]).flip(0).int()
    return len(top_id) - same.cumprod(0).sum(0)


def _dataset(
    model: Model, found: dict[str, Tensor], targets: Int[Tensor, " pos"]
) -> "xarray.Dataset":
    import numpy as np
    import xarray

    ids = found["top_id"]
    texts = {i: model.token_text(i) for i in ids.unique().tolist()}
    strings = np.vectorize(texts.__getitem__, otypes=[object])(ids.numpy()).astype(str)
    axes = ("layer", "pos", "rank")
    variables: dict[str, Any] = {n: (axes[: v.ndim], v.numpy()) for n, v in found.items()}
    variables["settles"] = ("pos", (_settles(ids[..., 0]) - 1).numpy())
    names = ["resid_pre.0", *(f"resid_post.{i}" for i in range(len(ids) - 1))]
    coords = {
        "layer": list(range(-1, len(ids) - 1)),
        "site": ("layer", names),
        "rank": list(range(ids.shape[-1])),
        "top_token": (axes, strings),
        "target": ("pos", [model.token_text(i) for i in targets.tolist()]),
    }
    return xarray.Dataset(variables, coords=coords)


def _view(data: "xarray.Dataset", *, answer: str | None, wrong: str | None) -> View:
    labels = ["embed", *map(str, data["layer"].values[1:])]
    followed = f"{answer!r}" if answer is not None else "the model's own top token"
    chance, highest = float(data["control_prob"].mean()), float(data["control_prob"].max())
    cells = grid(
        data["target_prob"],
        rows=labels,
        cols=data["token"].values,
        row_name="layer",
        col_name="pos",
        col_at={"pos": data["pos"].values.tolist()},
        text=data["top_token"].values[..., 0].tolist(),
        scale="probability",
        unit="probability",
        marks=[(int(s) + 1, p) for p, s in enumerate(data["settles"].values)],
        **_behind(data),
        title="What each layer would say",
        about=f"Text: the layer's top token. Colour: its probability of {followed}. Outlined: the"
        " layer from which the top token stays the model's own. A layer that cannot be read here"
        " is not empty: it may use another basis than the last one.",
        control=sentences(
            [
                f"On random vectors of the same length the lens gives {followed} a probability of"
                f" {chance:.2g} (mean of all cells; highest cell {highest:.2g})."
            ],
            title="Random vectors",
        ),
    )
    return group([cells, _curves(data, labels, wrong)], title="Logit lens")


def _behind(data: "xarray.Dataset") -> dict[str, Any]:
    """What a reader of the page can ask of each cell: other measures, and the likeliest tokens."""
    import numpy as np

    if data["target_prob"].size > _WHOLE:
        return {}
    known, ids = np.unique(data["top_id"].values, return_inverse=True)
    texts = dict(zip(ids.ravel().tolist(), data["top_token"].values.ravel().tolist(), strict=True))
    told = {"target_rank": ("rank", "tokens above"), "entropy": ("entropy", "nats"),
            "kl": ("distance from the model's own", "nats")}  # fmt: skip
    return {
        "measures": [
            {"name": name, "values": data[key].values, "unit": unit}
            for key, (name, unit) in told.items()
        ],
        "candidates": {
            "tokens": [texts[i] for i in range(len(known))],
            "ids": ids.reshape(data["top_id"].shape),
            "values": data["top_prob"].values,
        },
    }


def _curves(data: "xarray.Dataset", labels: list[str], wrong: str | None) -> View:
    """Probability over layers at the last position read."""
    target = str(data["target"].values[-1])
    series: dict[str, Any] = {repr(target): data["target_prob"].values[:, -1]}
    if wrong is not None:
        series[repr(wrong)] = data["wrong_prob"].values[:, -1]
    series["random vectors"] = data["control_last"].values
    settled, final = int(data["settles"].values[-1]), str(data["top_token"].values[-1, -1, 0])
    where = "the embedding" if settled < 0 else f"layer {settled}"
    return lines(
        labels,
        series,
        x_name="layer",
        y_name="probability",
        span=(0, 1),
        title=f"At {str(data['token'].values[-1])!r}",
        about=f"The model says {final!r}; from {where} on, it is the lens's top token."
        f" Random vectors: the probability of {target!r} on vectors of the same length.",
    )
