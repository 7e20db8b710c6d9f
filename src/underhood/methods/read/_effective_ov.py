"""What a head writes about one token, read out of the weights by running tokens alone.

A sequence of one token attends to itself only, so `head_out` is exactly `norm(e) W_V W_O`, whatever
the family. `e` is put at the entrance of every layer at once: the token's embedding, or (effective
OV of Gould et al. 2023) what the first MLP makes of it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import AnswerError, NotOffered
from underhood.core.head import Head, NormForm
from underhood.core.model import Model
from underhood.core.ops import patch, zero
from underhood.methods.read._attention import site

__all__ = ["CLASSES", "copying", "ordinal_classes", "successor"]

CLASSES = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November"
    " December",
    "number words": "one two three four five six seven eight nine ten eleven twelve thirteen"
    " fourteen fifteen sixteen seventeen eighteen nineteen twenty",
    "numbers": " ".join(str(n) for n in range(1, 201)),
}
"""Ordinal classes in order; the step from the last back to the first is not counted."""

CHUNK = 256  # one-token rows per forward


@dataclass(frozen=True, slots=True)
class _Reader:
    """The linear map from a part of the stream to some tokens' logits, up to a positive scale."""

    rows: Float[Tensor, "n d"]
    form: NormForm | None

    def __call__(self, part: Tensor) -> Tensor:
        part = part.double().cpu()
        if self.form is not None:
            part = self.form.centre(part) * self.form.gain.double().cpu()
        return part @ self.rows.T


def _reader(model: Model, tokens: list[int]) -> _Reader:
    head = Head(model)
    return _Reader(head.directions(tokens).detach().cpu(), head.form())


def _alone(
    model: Model, tokens: list[int], layers: list[int], name: str, *, through_mlp: bool
) -> list[Float[Tensor, "token *unit"]]:  # noqa: F821
    """`name` of every layer for tokens that stand alone, their embedding (or MLP 0) put first."""
    parts: list[list[Tensor]] = [[] for _ in layers]
    source = site(model, "mlp_out", 0) if through_mlp else site(model, "embed")
    quiet = [Edit(site(model, "attn_out", 0), zero())] if through_mlp else []
    for at in range(0, len(tokens), CHUNK):
        ids = torch.tensor(tokens[at : at + CHUNK])[:, None]
        entry = model.run(ids, record=[source], edits=quiet)[source]
        put = [Edit(site(model, "resid_pre", layer), patch(entry)) for layer in layers]
        run = model.run(ids, record=[site(model, name, layer) for layer in layers], edits=put)
        for part, layer in zip(parts, layers, strict=True):
            part.append(run[site(model, name, layer)][:, 0].detach().cpu())
    return [torch.cat(part) for part in parts]


def copying(
    model: Model, layers: list[int], words: list[int], *, seed: int, most: int = 512
) -> tuple[list[Float[Tensor, " head"]], list[Float[Tensor, " head"]]]:
    """Copy score of every head's OV, and its control: `Re(sum l) / sum |l|` over eigenvalues l.

    Eigenvalues of `(C norm(W_E) W_V) (W_O G C W_U)` on a sample of tokens, in its `d_head x d_head`
    form. C takes the mean over the tokens out, which removes biases and what all logits share;
    G is the final norm's gain. The control pairs each token's embedding with another's unembedding.

    Raises:
        NotOffered: The model has no head, no embedding, or an output projection not cut by heads.
    """
    make = torch.Generator().manual_seed(seed)
    tokens = [words[i] for i in torch.randperm(len(words), generator=make)[:most].tolist()]
    shuffled = torch.randperm(len(tokens), generator=make)
    reader = _reader(model, tokens)
    values = _alone(model, tokens, layers, "z", through_mlp=False)
    scores, controls = [], []
    for layer, z in zip(layers, values, strict=True):
        out = reader(_o_proj(model, layer))  # [head d_head token]
        out = out - out.mean(-1, keepdim=True)
        centred = (z - z.mean(0)).double().permute(1, 0, 2)  # [head token d_head]
        scores.append(_positive(out @ centred))
        controls.append(_positive(out @ centred[:, shuffled]))
    return scores, controls


def _positive(matrix: Float[Tensor, "head k k"]) -> Float[Tensor, " head"]:
    values = torch.linalg.eigvals(matrix)
    size = values.abs().sum(-1)
    return torch.where(size > 0, values.real.sum(-1) / size, torch.nan)


def _o_proj(model: Model, layer: int) -> Float[Tensor, "head d_head d_model"]:
    from underhood.core.taps.modules import weight_in_out

    model.resolve(site(model, "head_out", layer))
    spec = model.anatomy.stacks[model.main].blocks[layer].attention
    if spec is None or spec.o_proj is None or spec.heads is None:
        raise NotOffered(
            "this output projection cannot be split by heads",
            given=f"layer {layer}",
            do="use attn_out",
        )
    weight = weight_in_out(model.module.get_submodule(spec.o_proj)).detach()
    return weight.unflatten(0, (spec.heads, -1))


def ordinal_classes(model: Model, *, least: int = 4) -> dict[str, list[list[int]]]:
    """Runs of consecutive ordinal words that are single tokens here; class -> runs of ids."""
    found: dict[str, list[list[int]]] = {}
    if model.tokenizer is None:
        return found
    for name, words in CLASSES.items():
        runs: list[list[int]] = [[]]
        for word in words.split():
            token = _single(model, word)
            if token is None:
                runs.append([])
            else:
                runs[-1].append(token)
        runs = [run for run in runs if len(run) > 1]
        if sum(map(len, runs)) >= least:
            found[name] = runs
    return found


def _single(model: Model, word: str) -> int | None:
    for text in (" " + word, word):
        try:
            return model.token_id(text)
        except AnswerError:
            continue
    return None


def successor(
    model: Model, layers: list[int], runs: list[list[int]]
) -> tuple[list[Float[Tensor, " head"]], float]:
    """Share of a class's tokens whose strongest output within the class is the next one; chance.

    Raises:
        NotOffered: No MLP in the first layer, no head, or heads that cannot be told apart.
    """
    tokens = [token for run in runs for token in run]
    reader = _reader(model, tokens)
    written = _alone(model, tokens, layers, "head_out", through_mlp=True)
    ask, want, at = [], [], 0
    for run in runs:
        ask += range(at, at + len(run) - 1)
        want += range(at + 1, at + len(run))
        at += len(run)
    answers = torch.tensor(want)[:, None]
    scores = [(reader(out)[ask].argmax(-1) == answers).double().mean(0) for out in written]
    return scores, 1 / len(tokens)
