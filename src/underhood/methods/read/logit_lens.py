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
    streams = [run[first][0], *(layer[0] for layer in run[each])]
    final = run.logits[0, chosen].float()
    gap = _check_last(model, head.logits(streams[-1]), final)
    targets = final.argmax(-1) if follow[0] is None else final.new_full((len(chosen),), follow[0])
    lens = _Lens(head, final.log_softmax(-1), targets.long(), follow[1], top)
    rows = [lens.read(stream) for stream in streams]
    random = lens.control(streams, seed)
    data = _dataset(model, rows, random, targets.long(), top=top)
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
        targets: The token followed at each position.
        wrong: A second token, the same everywhere.
        top: Tokens to keep.
    """

    head: Head
    final: Float[Tensor, "pos vocab"]
    targets: Int[Tensor, " pos"]
    wrong: int | None
    top: int

    def read(self, stream: Float[Tensor, "pos d_model"]) -> dict[str, Tensor]:
        """All numbers of one layer."""
        log = self.head.logits(stream).float().log_softmax(-1)
        prob = log.exp()
        best = prob.topk(self.top, dim=-1)
        mine = log.gather(-1, self.targets[:, None])
        found = {
            "top_prob": best.values,
            "top_id": best.indices,
            "entropy": -torch.xlogy(prob, prob).sum(-1),
            # Rounding may leave a distance of equal distributions just below zero.
            "kl": (self.final.exp() * (self.final - log)).nansum(-1).clamp(min=0),
            "target_prob": mine[:, 0].exp(),
            "target_rank": (log > mine).sum(-1),
        }
        if self.wrong is not None:
            found["wrong_prob"] = prob[:, self.wrong]
        return {name: value.cpu() for name, value in found.items()}

    def control(self, streams: list[Tensor], seed: int) -> dict[str, Tensor]:
        """The same reading of random vectors as long as the streams.

        Returns:
            `control_prob` `[layer, pos]`: probability of each position's target, mean over draws;
            `control_last` `[layer]`: that of the last position's target over all random vectors of
            the layer, so that its curve does not hang on a single one.
        """
        make = torch.Generator().manual_seed(seed)
        draws = -(-_RANDOM // len(self.targets))
        cells, last = [], []
        for stream in streams:
            noise = torch.randn(draws, *stream.shape, generator=make).to(stream.device)
            length = stream.float().norm(dim=-1, keepdim=True)
            noise = noise / noise.norm(dim=-1, keepdim=True) * length
            prob = self.head.logits(noise.to(stream.dtype)).float().softmax(-1)
            index = self.targets[None, :, None].expand(draws, -1, 1)
            cells.append(prob.gather(-1, index)[..., 0].mean(0).cpu())
            last.append(prob[..., int(self.targets[-1])].mean().cpu())
        return {"control_prob": torch.stack(cells), "control_last": torch.stack(last)}


def _settles(top_id: Int[Tensor, "layer pos"]) -> Int[Tensor, " pos"]:
    """Index of the first layer from which the top token stays the last layer's."""
    same = (top_id == top_id[-1]).flip(0).int()
    return len(top_id) - same.cumprod(0).sum(0)


def _dataset(
    model: Model,
    rows: list[dict[str, Tensor]],
    control: dict[str, Tensor],
    targets: Tensor,
    *,
    top: int,
) -> "xarray.Dataset":
    import numpy as np
    import xarray

    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    ids = stacked["top_id"]
    texts = {i: model.token_text(i) for i in ids.unique().tolist()}
    strings = np.vectorize(texts.__getitem__, otypes=[object])(ids.numpy()).astype(str)
    axes = ("layer", "pos", "rank")
    variables: dict[str, Any] = {n: (axes[: v.ndim], v.numpy()) for n, v in stacked.items()}
    variables |= {n: (axes[: v.ndim], v.numpy()) for n, v in control.items()}
    variables["settles"] = ("pos", (_settles(ids[..., 0]) - 1).numpy())
    names = ["resid_pre.0", *(f"resid_post.{i}" for i in range(len(rows) - 1))]
    coords = {
        "layer": list(range(-1, len(rows) - 1)),
        "site": ("layer", names),
        "rank": list(range(top)),
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
        text=data["top_token"].values[..., 0].tolist(),
        scale="probability",
        unit="probability",
        marks=[(int(s) + 1, p) for p, s in enumerate(data["settles"].values)],
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
