"""Direct logit attribution: who writes the logit difference.

The logits are linear in the stream once the final norm's scale is frozen at its actual value, and
the stream is a sum of what its parts wrote. So the difference between two logits splits exactly:

    logit(answer) - logit(wrong) = sum over parts <part, u> + biases
    u = gain * (W_answer - W_wrong) / scale

with `u` centred where the norm is. The parts are the embedding, every head (or mixer) and every
MLP. Families that normalise a sub-layer's output before adding it (Gemma 2, OLMo 2, GLM 4) get that
norm's scale frozen as well. The sum is compared with the model's own difference in every call.

What this does not do: indirect effects, through later layers. Those take patching.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from underhood.core.errors import NotOffered, OutOfRange, PairError, UsageError
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.provenance import describe
from underhood.core.taps.modules import weight_in_out
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Pairs
from underhood.methods.read._direct_parts import Found, Layout, Place, attribute, layout_of
from underhood.methods.read._unembedding import head_of, tolerance
from underhood.methods.registry import method
from underhood.view import Result, View, bars, grid, group, sentences

if TYPE_CHECKING:
    import xarray

__all__ = ["direct_attribution"]

_ROWS = 32  # prompts per forward; the numbers do not depend on it
_SHOWN = 20
_NOISE = 1e-6  # an attention without biases leaves less than this beside its heads, relative


@method
def direct_attribution(
    model: Model,
    pairs: Pairs,
    *,
    split: Literal["heads", "sublayers"] = "heads",
    random_pairs: int = 20,
    seed: int = 0,
) -> Result:
    """How much every head and MLP writes, directly, into the logit difference of the clean prompt.

    Args:
        pairs: Clean prompts with answers and wrong answers; contrasts are read only to fill in
            missing ones. Without answers: the model's own top token on the clean prompt, against
            its best other token on the contrast.
        split: "heads" takes attention apart where it has heads; "sublayers" keeps it whole.
        random_pairs: Pairs of random tokens for the control.
        seed: Of these random tokens.

    Returns:
        In logits before any soft cap, positive where a part supports the answer. Over `node` (such
        as `embed`, `a1.h2`, `m3`): `contribution` (mean over rows), `spread` (standard
        deviation over rows), `control` (mean magnitude for pairs of random tokens); `per_row`
        over `batch` and `node`. Over `layer` and `head`: `heads`; over `layer`: `attention` (all
        of it, or the mixer), `mlp`. Numbers: `total` (sum of all parts), `logit_diff` (the model's
        own), `gap` (the largest difference between the two in any row, relative to the row's
        largest number), `capped_logit_diff` (after the soft cap, where there is one).

    Raises:
        NotOffered: No unembedding; a model whose stream itself is normalised (BERT, BART); or
            parts that do not add up to the model's logit difference.
        PairError: Pairs that cannot be compared.
        UsageError: Another `split`, or no random pairs.
        AnswerError: An answer that is not one token.

    Cost: one forward over the clean prompts; one more over clean and contrast each if answers are
        missing.

    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits". Ours: norms
        after a sub-layer are frozen like the final one; the control on random tokens.

    Misleads: it shows direct effects only: a head that works through later layers gets nothing.
        Remove a large part and the frozen norm moves and backup heads step in, so the loss is not
        its contribution. Patching measures that.

    Example:
        >>> import underhood as uh
        >>> pair = Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = direct_attribution(uh.load(), pair)
        >>> bool(abs(found["total"] - found["logit_diff"]) < 1e-3)
        True
    """
    if split not in ("heads", "sublayers"):
        raise UsageError(
            "attention is split into heads or kept as a sub-layer",
            given=repr(split),
            do="choose 'heads' or 'sublayers'",
        )
    layout = layout_of(model, head_of(model), heads=split == "heads")
    if random_pairs < 1:
        raise OutOfRange(
            "the control needs at least one random pair", given=random_pairs, do="use 20"
        )
    encoded, origin = _with_answers(model, pairs.encode(model))
    found = _attributed(layout, encoded, random_pairs, seed)
    _check_sum(found, model)
    data = _dataset(found, model, pairs.clean)
    return Result(
        name="direct_attribution",
        data=data,
        view=_view(found, data, origin),
        provenance=describe(
            model, split=split, rows=len(encoded), answers=origin, seed=seed,
            random_pairs=random_pairs,
            self_check=f"sum of parts = the model's logit difference within {found.gap:.1e}",
        ),
    )  # fmt: skip


def _with_answers(model: Model, encoded: EncodedPairs) -> tuple[EncodedPairs, str]:
    """Missing answers filled in with what the model says, and where the answers come from."""
    answers, wrong, origin = encoded.answers, encoded.wrong, "as given"
    for name, ids in (("answers", answers), ("wrong answers", wrong)):
        if ids.shape[1] and bool((ids < 0).all(1).any()):
            raise PairError(
                f"some rows have {name} and others have none",
                given=f"{len(encoded)} rows",
                do="give them to every row, or to none",
            )
    if not answers.shape[1]:
        answers = _last_logits(model, encoded.clean).argmax(-1, keepdim=True)
        origin = "answer: the model's top token on the clean prompt"
    if not wrong.shape[1]:
        logits = _last_logits(model, encoded.contrast)
        for row, own in enumerate(answers.tolist()):
            logits[row, [i for i in own if i >= 0]] = -torch.inf
        wrong = logits.argmax(-1, keepdim=True)
        origin += "; wrong: the model's top token on the contrast, other than the answer"
    return replace(encoded, answers=answers, wrong=wrong), origin


def _last_logits(model: Model, tokens: Tokens) -> Tensor:
    blocks = tokens.blocks(_ROWS)
    return torch.cat([model.run(tokens.rows(block)).last_logits.clone() for block in blocks])


def _attributed(layout: Layout, encoded: EncodedPairs, random_pairs: int, seed: int) -> Found:
    """All rows, some at a time."""
    drawn = _random_tokens(weight_in_out(layout.head.module).shape[1], random_pairs, seed)
    parts = [encoded.rows(block) for block in encoded.blocks(_ROWS)]
    chunks = [attribute(layout, p.clean, p.answers, p.wrong, drawn) for p in parts]
    capped = [c.capped for c in chunks if c.capped is not None]
    found = Found(
        chunks[0].places,
        torch.cat([c.values for c in chunks]),
        torch.cat([c.says for c in chunks]),
        torch.cat(capped) if capped else None,
    )
    return found.without("rest", _NOISE)


def _random_tokens(vocab: int, n: int, seed: int) -> Int[Tensor, "n 2"]:
    """Pairs of different tokens."""
    make = torch.Generator().manual_seed(seed)
    first = torch.randint(0, vocab, (n,), generator=make)
    step = torch.randint(1, vocab, (n,), generator=make)
    return torch.stack([first, (first + step) % vocab], 1)


def _check_sum(found: Found, model: Model) -> None:
    if found.gap <= tolerance(model.dtype):
        return
    raise NotOffered(
        "the parts of this model do not add up to its logit difference",
        given=f"{model!r}: sum {float(found.mine.sum(1).mean()):+.4g} logits, model"
        f" {float(found.says.mean()):+.4g}, largest gap {found.gap:.2g} of the largest number",
        why="something else writes to the stream, rescales it, or stands before the logits",
        do="use activation patching, which needs no sum; model.check() shows which sums hold",
    )


# What is handed out ------------------------------------------------------------------------------


def _label(place: Place) -> str:
    kind, layer, head = place
    if layer < 0:
        return kind
    if kind in ("head", "mlp"):
        return part_name(kind, layer, head)
    attention = part_name("attention", layer)
    return f"{attention} rest" if kind == "rest" else attention


def _dataset(found: Found, model: Model, prompts: tuple[str, ...]) -> "xarray.Dataset":
    import numpy as np
    import xarray

    mine = found.mine
    mean = mine.mean(0)
    attention, mlp = (np.full(model.n_layers, np.nan) for _ in range(2))
    heads = np.full((model.n_layers, model.n_heads), np.nan)
    for value, (kind, layer, head) in zip(mean.tolist(), found.places, strict=True):
        if kind == "head":
            heads[layer, head] = value
        if kind == "mlp":
            mlp[layer] = value
        elif layer >= 0:
            attention[layer] = np.nansum([attention[layer], value])
    variables: dict[str, Any] = {
        "contribution": ("node", mean.numpy()),
        "spread": ("node", mine.std(0, correction=0).numpy()),
        "control": ("node", found.values[..., 1:].abs().mean((0, 2)).numpy()),
        "per_row": (("batch", "node"), mine.numpy()),
        "attention": ("layer", attention),
        "mlp": ("layer", mlp),
        "total": float(mean.sum()),
        "logit_diff": float(found.says.mean()),
        "gap": found.gap,
    }
    coords: dict[str, Any] = {
        "node": [_label(place) for place in found.places],
        "kind": ("node", [place[0] for place in found.places]),
        "layer": range(model.n_layers),
        "prompt": ("batch", list(prompts)),
    }
    if any(kind == "head" for kind, _, _ in found.places):
        variables["heads"] = (("layer", "head"), heads)
        coords["head"] = range(model.n_heads)
    if found.capped is not None:
        variables["capped_logit_diff"] = float(found.capped.mean())
    return xarray.Dataset(variables, coords=coords)


def _view(found: Found, data: "xarray.Dataset", origin: str) -> View:
    return group(
        [_sentences(data, origin), _bars(found, data), _grid(data)],
        title="Who writes the logit difference",
    )


def _sentences(data: "xarray.Dataset", origin: str) -> View:
    """The sum beside the model's own number, and the largest parts."""
    total, says, rows = float(data["total"]), float(data["logit_diff"]), data.sizes["batch"]
    items = [
        f"The parts sum to {total:+.4f} logits; the model's own logit difference is {says:+.4f}"
        f" (mean of {rows} prompt{'s' * (rows != 1)}; largest gap {float(data['gap']):.1e} of the"
        " largest number).",
    ]
    if "capped_logit_diff" in data:
        items.append(f"After the model's soft cap it is {float(data['capped_logit_diff']):+.4f}.")
    order = abs(data["contribution"]).argsort().values[::-1][:3]
    largest = [
        f"{data['node'].values[i]} {float(data['contribution'][i]):+.2f}"
        f" (random tokens: \N{PLUS-MINUS SIGN}{float(data['control'][i]):.2f})"
        for i in order
    ]
    items.append(f"Largest parts: {', '.join(largest)}.")
    if origin != "as given":
        items.append(f"Answers were not given. {origin[0].upper()}{origin[1:]}.")
    return sentences(items)


def _bars(found: Found, data: "xarray.Dataset") -> View:
    """The largest parts by magnitude, and all the others in one bar, so that the bars add up."""
    mean = data["contribution"].values
    order = abs(mean).argsort()[::-1].tolist()
    # A single part left over is drawn as itself.
    shown, others = (order, []) if len(order) <= _SHOWN + 1 else (order[:_SHOWN], order[_SHOWN:])
    labels = [str(data["node"].values[i]) for i in shown]
    values = [float(mean[i]) for i in shown]
    chance = [float(data["control"].values[i]) for i in shown]
    if others:
        labels.append(f"{len(others)} others")
        values.append(float(mean[others].sum()))
        chance.append(float(found.values[:, others, 1:].sum(1).abs().mean()))
    return bars(
        labels,
        values,
        unit="logits",
        total=float(data["total"]),
        total_label=f"sum (the model's logit difference: {float(data['logit_diff']):+.4f})",
        baseline=[(-c, c) for c in chance],
        baseline_name="random tokens",
        title="Direct contribution to the logit difference",
        about="Positive: the part supports the answer. Direct effects only, with the norm's scale"
        " frozen: a head that works through later layers shows nothing, and removing a part may"
        " change more or less than its bar. Behind: mean magnitude for pairs of random tokens.",
    )


def _grid(data: "xarray.Dataset") -> View:
    """Layer by head, with the MLP beside."""
    import numpy as np

    parts, cols = [], []
    if "heads" in data:
        parts, cols = [data["heads"].values], [f"H{h}" for h in range(data.sizes["head"])]
        whole = np.isnan(data["heads"].values).all(1) & ~np.isnan(data["attention"].values)
        if whole.any():  # hybrids: layers whose mixer has no heads
            parts.append(np.where(whole, data["attention"].values, np.nan)[:, None])
            cols.append("mixer")
    else:
        parts, cols = [data["attention"].values[:, None]], ["attention"]
    if not np.isnan(data["mlp"].values).all():
        parts, cols = [*parts, data["mlp"].values[:, None]], [*cols, "MLP"]
    return grid(
        np.concatenate(parts, 1),
        rows=data["layer"].values,
        cols=cols,
        row_name="layer",
        unit="logits",
        title="By layer",
        about="The same numbers by place; the embedding and biases are not drawn.",
    )
