"""Two-stage reasoning: which layer resolves which hop of a two-hop question.

A question `h r1 r2` has the bridge entity b (of h and r1) and the answer t (of b and r2). If the
model goes by the bridge, there is a place that holds b (usually the token of r1, or, after explicit
reasoning, the token before b) and a layer from which it does; later, another place and layer hold
t. Two views of that, side by side:

    readable    reciprocal rank of b and of t by the logit lens, at every layer and position
    causal      run the question, write the state of a contrast question (another h, r1 or r2) at
                one layer and position, and see how much of b (stage 1) or t (stage 2) is lost

    share = (log p_clean(t) - log p_written(t)) / (log p_clean(t) - log p_contrast(t))

Hop 1 is resolved in the first layer whose state at the bridge's token carries half of the effect
of a contrast that changes an earlier token; hop 2 likewise at the last token.

What this does not do: find the bridge's token by itself, or say which head moved it
(`path_patching` does).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.errors import OutOfRange, PairError, UsageError
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Pairs
from underhood.methods.locate._hops import Stage, Traced, readable, trace
from underhood.methods.locate._hops_view import view_of
from underhood.methods.locate._options import at_least
from underhood.methods.locate._trace import check_stop, last_states, streams
from underhood.methods.read._unembedding import head_of
from underhood.methods.registry import method
from underhood.view import Result

if TYPE_CHECKING:
    import xarray

__all__ = ["two_stage_reasoning"]


@dataclass(frozen=True, slots=True)
class _Question:
    """Everything that was asked, checked.

    Attributes:
        encoded: The prompts.
        bridges: Bridge token per row.
        answers: Answer token per row.
        hop: Position of the bridge.
        positions: Positions to write at.
        parts: Names of the groups of rows.
        group: Group of each row.
    """

    encoded: EncodedPairs
    bridges: Int[Tensor, " batch"]
    answers: Int[Tensor, " batch"]
    hop: int
    positions: tuple[int, ...]
    parts: list[str]
    group: Int[Tensor, " batch"]

    @property
    def length(self) -> int:
        return self.encoded.clean.ids.shape[1]

    def kept(self, part: int, pos: int) -> bool:
        """Whether clean and contrast of a group hold the same token at a position, and an earlier
        one differs: then a state there tells what was brought to it."""
        rows = self.group == part
        a, b = (t.ids.cpu()[rows] for t in (self.encoded.clean, self.encoded.contrast))
        same = a == b
        return bool(same[:, pos].all()) and not bool(same[:, :pos].all(1).any())


@method
def two_stage_reasoning(
    model: Model,
    pairs: Pairs,
    *,
    bridges: tuple[str, ...] = (),
    hop_at: int = -2,
    positions: tuple[int, ...] | None = None,
    bridge_layer: int | None = None,
    threshold: float = 0.5,
    control: bool = True,
    draws: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """Where and in which layer each hop of a two-hop question is resolved.

    Args:
        pairs: Questions and contrasts, all of one number of tokens. A contrast swaps the entity or
            one relation for another that changes the answer. `labels` say which ("h", "r1", "r2")
            and are traced apart. Without answers: the model's own top token after the question.
        bridges: The bridge entity of each question, text of one token (or one for all). Empty: the
            token that the model itself says at `hop_at`.
        hop_at: Position at which the bridge is read; -2 is the token before the last. With explicit
            reasoning written out: the token before the bridge.
        positions: Positions whose states are written. None: all.
        bridge_layer: Layer whose lens reads the bridge in stage 1. None: the first one with the
            highest mean reciprocal rank.
        threshold: Share of the effect from which a state counts as carrying it.
        control: Run the random directions as well.
        draws: Random directions per cell; the strongest is shown.
        seed: Of these, and of the shuffled bridges.
        batch_size: Rows of one pass; the numbers do not depend on it.

    Returns:
        Layer -1 is the stream before the first block. Over `layer`, `pos`: mean reciprocal ranks
        `mrr_bridge`, `mrr_answer`, `mrr_own` (the position's own input token), and of other rows'
        tokens `shuffled_bridge`, `shuffled_answer` (NaN where all rows have one). Over `part` (the
        labels), `layer`, `pos`: `answer_effect` (nats of log-probability lost: positive supports
        the answer), `answer_rank_effect` (reciprocal rank lost), `share` (of the contrast's whole
        effect), `answer_control` (share, random directions), and, up to `bridge_layer` and
        `hop_at`, `bridge_effect`, `bridge_rank_effect`, `bridge_control` (nats). Over `part`:
        `hop1_layer`, `hop2_layer` (NaN: no such layer, or the contrast changes that very token and
        cannot tell), `full_answer`, `full_bridge` (nats lost in the contrast run), `rows`.
        Scalars: `bridge_layer`, and `hop1_readable`, `hop2_readable`, the first layers from which
        the mean reciprocal rank stays at or above the threshold (NaN: none).

    Raises:
        PairError: Prompts of several lengths, or a contrast that costs the answer nothing.
        UsageError: As many bridges as neither one nor rows; a threshold outside 0 to 1.
        NotOffered: No unembedding, or a model that cannot be stopped after `bridge_layer`.

    Cost: 5 forwards to read; one row per cell (layer x position where the two runs differ) and
        pair for each stage, times 1 + draws with the control. No backward.

    Source: adapted from "Unveiling the Mechanisms of Explicit CoT Training" (2025) and its script,
        after Wang et al. 2024, "Grokked Transformers". As there: ranks by the lens, states swapped
        by those of a perturbed question. Not as there: the script skips the causal mask, changes r1
        along with r2, and counts the state entering a block as that block's; here the model itself
        runs, contrasts are yours, and layers are counted after the block. Ours: log-probabilities
        beside ranks (ranks saturate), shares and thresholds, the bridge read at its own token by a
        model stopped there, both controls.

    Misleads: a bridge that the lens cannot read may still be used: trust the causal half. A state
        may carry h and r1 instead of b; that the bridge is read there too speaks against it. A hop
        done again elsewhere hides each of the two places. A threshold makes a number of a curve:
        look at the curve.

    Example:
        >>> import underhood as uh
        >>> pair = uh.Pairs.one("The capital of France is", "The capital of Norway is", "Paris")
        >>> found = two_stage_reasoning(uh.load(), pair, bridges=("France",), hop_at=4)
        >>> float(found["share"].sel(layer=-1, pos=4)[0]) > 0.99
        True
    """
    at_least(1, draws=draws, batch_size=batch_size)
    if not 0 < threshold <= 1:
        raise OutOfRange("the threshold is a share", given=threshold, do="use 0.5")
    head = head_of(model)
    asked = _question(model, pairs, bridges, hop_at, positions)
    ranks = _readable(model, head, asked, seed, batch_size)
    layer = _bridge_layer(model, ranks["mrr_bridge"][:, asked.hop], bridge_layer)
    cut = [_cut(t, asked.hop + 1) for t in (asked.encoded.clean, asked.encoded.contrast)]
    before = tuple(p for p in asked.positions if p <= asked.hop)
    if layer < model.n_layers - 1:
        site = streams(model)[layer + 1]
        stream = last_states(model, cut[0].row(0), [site])[0][site]
        check_stop(model, head, cut[0], layer, stream, do=f"bridge_layer={model.n_layers - 1}")
    many, sides = draws if control else 0, (asked.encoded.clean, asked.encoded.contrast)
    second = Stage(
        *sides, asked.answers, asked.positions, model.n_layers - 1, many, seed, batch_size
    )
    first = Stage(cut[0], cut[1], asked.bridges, before, layer, many, seed + 1, batch_size)
    stages = trace(model, first), trace(model, second)
    data = _dataset(model, asked, ranks, stages, layer, threshold)
    return Result(
        name="two_stage_reasoning",
        data=data,
        view=view_of(data, hop=asked.hop, last=asked.length - 1, threshold=threshold),
        provenance=describe(
            model, rows=len(pairs), hop_at=asked.hop, bridge_layer=layer, threshold=threshold,
            draws=many, seed=seed, how=stages[1].how, passes=sum(s.passes for s in stages),
            bridges="as given" if bridges else "the model's own top token at hop_at",
        ),
    )  # fmt: skip


def _question(
    model: Model, pairs: Pairs, bridges: tuple[str, ...], hop_at: int, positions: Any
) -> _Question:
    encoded = pairs.encode(model)
    lengths = sorted(set(encoded.clean.lengths))
    if len(lengths) > 1:
        raise PairError(
            "these questions are not of one form",
            given=f"lengths of {', '.join(map(str, lengths))} tokens",
            why="positions are compared over rows",
            do="make one call for each length",
        )
    length = lengths[0]
    for pos in (hop_at, *(positions or ())):
        if not -length <= pos < length:
            raise OutOfRange(
                f"there is no position {pos}", given=f"{length} tokens", do=f"use 0 to {length - 1}"
            )
    hop = hop_at % length
    chosen = tuple(range(length)) if positions is None else tuple(p % length for p in positions)
    if bridges and len(bridges) not in (1, len(pairs)):
        raise UsageError(
            "each question has one bridge",
            given=f"{len(bridges)} bridges, {len(pairs)} questions",
            do="give one per row, or a single one for all",
        )
    if bridges:
        ids = torch.tensor([model.token_id(text) for text in bridges])
        ids = ids.expand(len(pairs)) if len(ids) == 1 else ids
    else:
        ids = last_states(model, _cut(encoded.clean, hop + 1), [])[1].argmax(-1).cpu()
    answers = encoded.answers[:, 0].cpu() if encoded.answers.shape[1] else None
    if answers is None:
        answers = last_states(model, encoded.clean, [])[1].argmax(-1).cpu()
    names = pairs.labels or ("all",) * len(pairs)
    parts = list(dict.fromkeys(names))
    member = torch.tensor([parts.index(name) for name in names])
    return _Question(
        encoded, ids, answers, hop, tuple(dict.fromkeys(sorted({*chosen, hop, length - 1}))),
        parts, member,
    )  # fmt: skip


def _cut(tokens: Tokens, length: int) -> Tokens:
    """The prompts' first tokens (all prompts are of one length)."""
    strings = tuple(row[:length] for row in tokens.strings)
    return Tokens(tokens.ids[:, :length], tokens.mask[:, :length], strings)


def _bridge_layer(model: Model, curve: Float[Tensor, " layer"], asked: int | None) -> int:
    if asked is None:
        return max(int(curve[1:].argmax()), 0)
    if not 0 <= asked < model.n_layers:
        raise OutOfRange(
            f"there is no layer {asked}",
            given=f"{model.n_layers} layers",
            do=f"use 0 to {model.n_layers - 1}",
        )
    return asked


def _readable(
    model: Model, head: Head, asked: _Question, seed: int, batch_size: int | None
) -> dict[str, Float[Tensor, "layer pos"]]:
    """Mean reciprocal ranks, of the right tokens and of other rows'."""

    def wide(ids: Tensor) -> Tensor:
        return ids[:, None].expand(-1, asked.length)

    own = asked.encoded.clean.ids.cpu()
    targets = {
        "mrr_bridge": wide(asked.bridges), "mrr_answer": wide(asked.answers), "mrr_own": own,
    }  # fmt: skip
    others = {}
    for name, ids in (("shuffled_bridge", asked.bridges), ("shuffled_answer", asked.answers)):
        drawn = _others(ids.tolist(), seed)
        others |= {name: None if drawn is None else wide(drawn)}
    targets |= {name: ids for name, ids in others.items() if ids is not None}
    found = readable(
        model, head, asked.encoded.clean, list(targets.values()), batch_size=batch_size
    )
    means = dict(zip(targets, found.mean(-1), strict=True))
    gone = torch.full(found.shape[1:3], torch.nan, dtype=torch.float64)
    return means | {name: gone for name, ids in others.items() if ids is None}


def _others(ids: Sequence[int], seed: int) -> Tensor | None:
    """For each row a token of another row that differs from its own; None if all are one."""
    if len(set(ids)) < 2:
        return None
    rng = random.Random(seed)
    return torch.tensor([rng.choice([x for x in ids if x != mine]) for mine in ids])


# Numbers -----------------------------------------------------------------------------------------


def _dataset(
    model: Model,
    asked: _Question,
    ranks: dict[str, Tensor],
    stages: tuple[Traced, Traced],
    layer: int,
    threshold: float,
) -> "xarray.Dataset":
    import numpy as np
    import xarray

    axes = ("part", "layer", "pos")
    spots, cube = (
        list(asked.positions),
        (len(asked.parts), model.n_layers + 1, len(asked.positions)),
    )
    names = ("effect", "rank_effect", "control")
    columns = {f"{w}_{n}": np.full(cube, np.nan) for w in ("bridge", "answer") for n in names}
    columns["share"] = np.full(cube, np.nan)
    single = {n: [] for n in ("full_bridge", "full_answer", "rows", "hop1_layer", "hop2_layer")}
    for part, name in enumerate(asked.parts):
        rows = asked.group == part
        for what, found in zip(("bridge", "answer"), stages, strict=True):
            effect, chance, full = _effects(found, rows)
            size = effect.shape[1]  # stage 1 ends at the bridge's layer and token
            columns[f"{what}_effect"][part, : effect.shape[0], :size] = effect[..., 0]
            columns[f"{what}_rank_effect"][part, : effect.shape[0], :size] = effect[..., 1]
            columns[f"{what}_control"][part, : effect.shape[0], :size] = chance
            single[f"full_{what}"].append(full)
        full = single["full_answer"][-1]
        _refuse_flat(full, name)
        columns["share"][part] = columns["answer_effect"][part] / full
        columns["answer_control"][part] /= full
        for hop, pos in (("hop1_layer", asked.hop), ("hop2_layer", asked.length - 1)):
            curve = columns["share"][part][:, spots.index(pos)]
            single[hop].append(_first(curve >= threshold) if asked.kept(part, pos) else np.nan)
        single["rows"].append(int(rows.sum()))
    variables: dict[str, Any] = {name: (axes, value) for name, value in columns.items()}
    variables |= {name: ("part", value) for name, value in single.items()}
    variables |= {name: (axes[1:], value[:, spots].numpy()) for name, value in ranks.items()}
    curves = ranks["mrr_bridge"][:, asked.hop], ranks["mrr_answer"][:, asked.length - 1]
    for name, curve in zip(("hop1_readable", "hop2_readable"), curves, strict=True):
        variables[name] = _first((curve >= threshold).numpy())
    variables["bridge_layer"] = layer
    strings = zip(*asked.encoded.clean.strings, strict=True)
    words = [s[0] if len(set(s)) == 1 else f"({i})" for i, s in enumerate(strings)]
    coords = {
        "part": asked.parts, "layer": list(range(-1, model.n_layers)), "pos": spots,
        "token": ("pos", [words[p] if words else str(p) for p in spots]),
    }  # fmt: skip
    return xarray.Dataset(variables, coords=coords, attrs={"hop_at": asked.hop})


def _effects(found: Traced, rows: Tensor) -> tuple[Any, Any, float]:
    """Mean losses `[layer, pos, 2]`, the strongest control `[layer, pos]` in nats, the whole."""
    import numpy as np

    lost = (found.clean - found.values)[:, :, rows].mean(2).numpy() + 0.0
    chance = np.full(lost.shape[:2], np.nan)
    if len(found.control):
        noise = (found.clean - found.control)[:, :, :, rows, 0].mean(3)
        chance = noise.gather(0, noise.abs().argmax(0)[None])[0].numpy() + 0.0
    return lost, chance, float((found.clean - found.contrast)[rows, 0].mean())


def _refuse_flat(full: float, part: str) -> None:
    if full > 1e-3:
        return
    raise PairError(
        "these contrasts cost the answer nothing",
        given=f"part {part!r}: {full:+.3g} nats of the answer's log-probability",
        why="there is no effect to be shared out among layers",
        do="use contrasts with another right answer, and questions that the model can answer",
    )


def _first(holds: Any) -> float:
    """The first layer that holds (the stream before the first block is -1)."""
    return float(holds.argmax()) - 1 if bool(holds.any()) else float("nan")
