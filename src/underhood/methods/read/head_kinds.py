"""What kind each head is: previous-token, duplicate-token, induction, and their displaced forms.

Random tokens said twice (`BOS + r + r`) leave nothing to go by but position and repetition. With
`q` a query, `n` the length of `r` and `a` the attention weight:

    previous    mean a[q, q - 1]            all queries
    duplicate   mean a[q, q - n]            second half: the earlier occurrence of the same token
    induction   mean a[q, q - n + 1]        second half: what came after it
    lagged      mean a[q, q - k], k > 1     the best k
    shifted     mean a[q, q - n + k], k > 1 the best k

The last two are not in the papers' definitions. A model may copy by a detour: an early head moves
tokens three places on, and the head that looks back then looks four places past the duplicate. By
the standard three scores such a model copies without any head that does it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from underhood.core.edit import Plan
from underhood.core.errors import NotOffered
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.provenance import describe
from underhood.methods.read import _effective_ov as ov
from underhood.methods.read._attention import attending, ordinary, pad_heads
from underhood.methods.read._repeats import Looks, Repeats, draw, look, uniform
from underhood.methods.registry import method
from underhood.view import Result, View, grid, group, sentences, table

__all__ = ["KINDS", "head_kinds"]

KINDS = ("previous", "duplicate", "induction", "lagged", "shifted")
THRESHOLD = 0.4  # a kind is named from this score on ...
MARGIN = 0.2  # ... if it exceeds the control by this much
_ABOUT = {
    "previous": "attention to the token before",
    "duplicate": "attention to the earlier occurrence of the same token",
    "induction": "attention to what followed the earlier occurrence",
    "lagged": "attention to the token k before, best k > 1",
    "shifted": "attention to the token k after the earlier occurrence, best k > 1",
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind's numbers, `[layer, head]` each."""

    score: np.ndarray
    error: np.ndarray
    control: np.ndarray
    unrepeated: np.ndarray
    offset: np.ndarray

    @property
    def z(self) -> np.ndarray:
        """Distance from the mean of all heads, in standard deviations over heads."""
        spread = np.nanstd(self.score)
        return (self.score - np.nanmean(self.score)) / spread if spread > 0 else self.score * np.nan

    @property
    def passes(self) -> np.ndarray:
        """Where the verdict names this kind's head."""
        return (self.score > THRESHOLD) & (self.score > self.control + MARGIN)


@method
def head_kinds(
    model: Model,
    prompts: list[str] | None = None,
    *,
    samples: int = 10,
    length: int = 25,
    seed: int = 0,
    edits: Plan | None = None,
) -> Result:
    """Scores of every head as previous-token, duplicate-token, induction and successor head.

    Args:
        prompts: Texts to say twice; None says random tokens twice.
        samples: Number of random sequences.
        length: Tokens that are repeated; shortened where the context is too short (the provenance
            says so).
        seed: Of the random tokens.
        edits: A plan in force while the sequences run.

    Returns:
        Over `layer` (those with attention) and `head` (query heads), for each of `previous`,
        `duplicate`, `induction`, `lagged`, `shifted`: the score (mean attention weight, 0 to 1),
        `_error` (standard error over sequences), `_control`, `_unrepeated` (the same on sequences
        that do not repeat), `_z` (against all heads), `_offset` (k). The control of `duplicate`,
        `induction` and `shifted` is the larger of `_unrepeated` and uniform attention; previous
        and lagged heads work without a repeat, so theirs is uniform attention. `from_duplicate`
        and `back` over `key` hold the weight at every offset. `copy` is the OV copy score with
        `copy_control`; `successor` the share of ordinal words sent to the next one, with
        `successor_control` (chance). Coordinate `kind[layer, head]`: the best kind with a score
        over 0.4 and over control + 0.2, else "". Attributes `repeat_accuracy` and
        `control_accuracy`: how often the model predicts the second half.

    Raises:
        NotOffered: The model has no attention.
        UsageError: Texts that cannot be said twice in the context, or too few samples.

    Cost: two forwards over all sequences, one over up to 512 tokens that stand alone (copy score)
        and two over the ordinal words.

    Source: previous, duplicate and induction on repeated random tokens: Olsson et al. 2022
        ("In-context Learning and Induction Heads"), copy score: Elhage et al. 2021; effective OV:
        Gould et al. 2023 ("Successor Heads"). Adapted: tokens within a sequence are distinct; both
        sides of the OV circuit are centred and inputs normalised one by one; of the ordinals only
        days, months, number words and 1 to 200; offsets beyond the standard ones; thresholds ours.

    Misleads: attention is where a head looks, not what it does: check by removing the heads. With
        a vocabulary of a few tokens, tokens recur by chance and controls rise. A head may be of
        one kind on random tokens and busy with something else on text. One in `shifted` was picked
        out of several offsets: the threshold is far above what that adds by chance.

    Example:
        >>> import underhood as uh
        >>> result = uh.read.head_kinds(uh.load(), samples=4)
        >>> result["induction"].dims
        ('layer', 'head')
    """
    layers = attending(model)
    repeats = draw(model, prompts, samples=samples, length=length, seed=seed)
    seen = look(model, repeats.repeated, repeats, layers, edits)
    plain = look(model, repeats.control, repeats, layers, edits)
    half, back = uniform(repeats, causal=seen.causal)
    kinds = _kinds(seen, plain, repeats.reach, half=half, back=back)
    data = _dataset(layers, kinds, seen, repeats)
    skipped = _weights(model, layers, data, seed)
    data = data.assign_attrs(
        repeat_accuracy=seen.accuracy,
        control_accuracy=plain.accuracy,
        uniform_half=half,
        uniform_back=back,
    )
    facts = describe(
        model, seed=seed, samples=len(repeats.lengths), length=repeats.lengths[0],
        threshold=THRESHOLD, margin=MARGIN, note=repeats.note, skipped=skipped,
    )  # fmt: skip
    return Result("head_kinds", data, _view(data, kinds, layers, skipped), facts)


def _kinds(seen: Looks, plain: Looks, reach: int, *, half: float, back: float) -> dict[str, _Kind]:
    """Every kind from the two sets of looks; `half` and `back` are uniform attention's scores."""
    before, after = (seen.back, plain.back), (seen.from_duplicate, plain.from_duplicate)
    found = {
        "previous": _kind(before, [0], first=1, chance=back, repeats=False),
        "duplicate": _kind(after, [reach], first=-reach, chance=half, repeats=True),
        "induction": _kind(after, [reach + 1], first=-reach, chance=half, repeats=True),
    }
    if reach > 1:
        further = list(range(reach + 2, 2 * reach + 1))
        columns = list(range(1, reach))
        found["lagged"] = _kind(before, columns, first=1, chance=back, repeats=False)
        found["shifted"] = _kind(after, further, first=-reach, chance=half, repeats=True)
    return found


def _kind(
    looks: tuple[list[Tensor], list[Tensor]],
    columns: list[int],
    *,
    first: int,
    chance: float,
    repeats: bool,
) -> _Kind:
    """One kind; of several columns the one that exceeds its control most, head by head.

    Args:
        looks: Attention with and without a repeat, per layer `[row, head, column]`.
        columns: Candidates.
        first: Offset that column 0 stands for.
        chance: Uniform attention's score.
        repeats: Whether the kind needs a repeat, so that its absence is a control.
    """
    scores, errors, others, offsets = [], [], [], []
    for seen, plain in zip(*looks, strict=True):
        mean, other = seen[..., columns].mean(0), plain[..., columns].mean(0)  # [head column]
        count = seen.shape[0]
        spread = seen[..., columns].std(0) if count > 1 else torch.full_like(mean, torch.nan)
        best = (mean - other if repeats else mean).argmax(-1, keepdim=True)
        scores.append(mean.gather(-1, best)[..., 0])
        errors.append(spread.gather(-1, best)[..., 0] / count**0.5)
        others.append(other.gather(-1, best)[..., 0])
        offsets.append(torch.tensor(columns)[best[..., 0]] + first)
    score, other = pad_heads(scores), pad_heads(others)
    control = np.maximum(other, chance) if repeats else np.where(np.isfinite(score), chance, np.nan)
    return _Kind(score, pad_heads(errors), control, other, pad_heads(offsets))


def _verdicts(kinds: dict[str, _Kind]) -> np.ndarray:
    shape = next(iter(kinds.values())).score.shape
    verdict = np.full(shape, "", dtype=object)
    best = np.zeros(shape)
    for name, kind in kinds.items():
        better = kind.passes & (kind.score > best)
        verdict[better], best[better] = name, kind.score[better]
    return verdict.astype(str)


def _dataset(layers: list[int], kinds: dict[str, _Kind], seen: Looks, repeats: Repeats) -> Any:
    import xarray

    plane = ("layer", "head")
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        parts = {
            "": kind.score, "_error": kind.error, "_control": kind.control,
            "_unrepeated": kind.unrepeated, "_z": kind.z, "_offset": kind.offset,
        }  # fmt: skip
        values |= {name + suffix: (plane, part) for suffix, part in parts.items()}
    reach = repeats.reach
    profile = pad_heads([t.mean(0) for t in seen.from_duplicate])
    back = pad_heads([t.mean(0) for t in seen.back])
    values["from_duplicate"] = ((*plane, "key"), profile)
    values["back"] = ((*plane, "pos"), back)
    coords = {
        "layer": layers, "head": range(profile.shape[1]), "key": range(-reach, reach + 1),
        "pos": range(-1, -reach - 1, -1), "kind": (plane, _verdicts(kinds)),
    }  # fmt: skip
    return xarray.Dataset(values, coords=coords)


def _weights(model: Model, layers: list[int], data: Any, seed: int) -> dict[str, str]:
    """Add the scores that need no sequences; returns what was skipped, and why."""
    skipped = {}
    plane = ("layer", "head")
    try:
        score, control = ov.copying(model, layers, ordinary(model), seed=seed)
        data["copy"] = (plane, pad_heads(score))
        data["copy_control"] = (plane, pad_heads(control))
    except NotOffered as error:
        skipped["copy"] = error.what
    classes = ov.ordinal_classes(model)
    if not classes:
        skipped["successor"] = "the tokenizer has no days, months or numbers as single tokens"
        return skipped
    try:
        pairs = [ov.successor(model, layers, runs) for runs in classes.values()]
    except NotOffered as error:
        skipped["successor"] = error.what
        return skipped
    by_class = np.stack([pad_heads(score) for score, _ in pairs])
    data["successor_by_class"] = (("task", *plane), by_class)
    data["successor"] = (plane, by_class.mean(0))
    data["successor_control"] = ("task", np.array([chance for _, chance in pairs]))
    data.coords["task"] = list(classes)
    return skipped


def _view(data: Any, kinds: dict[str, _Kind], layers: list[int], skipped: dict[str, str]) -> View:
    labels = [str(n) for n in layers]
    columns = [str(h) for h in data["head"].values]
    named = data["kind"].values

    def plane(values: np.ndarray, title: str, about: str = "", control: View | None = None) -> View:
        return grid(
            values, rows=labels, cols=columns, row_name="layer", col_name="head",
            scale="probability", title=title, about=about, control=control,
        )  # fmt: skip

    grids = []
    for name, kind in kinds.items():
        if name in ("previous", "lagged"):
            about = "What looking at all visible tokens alike gives."
        else:
            about = "The same on tokens that do not repeat, or uniform attention if that is more."
        beside = plane(kind.control, f"{name}: control", about)
        shown = plane(kind.score, name, _ABOUT[name].capitalize() + ".", beside)
        marks = [(int(i), int(h)) for i, h in np.argwhere(named == name)]
        grids.append(shown.model_copy(update={"marks": marks}))
    views: list[View] = [
        sentences(_facts(data, kinds, layers, skipped)),
        _top(kinds, layers, named),
    ]
    views += grids
    if "copy" in data:
        views.append(_copy_grid(data, labels, columns))
    if "successor" in data:
        views.append(_successor_grid(data, labels, columns))
    return group(
        views, title="What kind each head is",
        about="Tokens said twice; outlined heads exceed 0.4 and their control by 0.2. Where a head"
        " looks is not yet what it does: remove it and see.",
    )  # fmt: skip


def _axes(labels: list[str], columns: list[str]) -> dict[str, Any]:
    return {"rows": labels, "cols": columns, "row_name": "layer", "col_name": "head"}


def _copy_grid(data: Any, labels: list[str], columns: list[str]) -> View:
    axes = _axes(labels, columns)
    control = grid(
        data["copy_control"].values, limit=1.0, title="copy: control",
        about="Each token's input paired with another token's output.", **axes,
    )  # fmt: skip
    return grid(
        data["copy"].values, limit=1.0, title="copy", control=control,
        about="+1: whatever token the head attends to, it raises; -1: it lowers.", **axes,
    )  # fmt: skip


def _successor_grid(data: Any, labels: list[str], columns: list[str]) -> View:
    axes = _axes(labels, columns)
    values = data["successor"].values
    chance = float(data["successor_control"].values.mean())
    control = grid(
        np.where(np.isfinite(values), chance, np.nan), scale="probability",
        title="successor: chance", **axes,
    )  # fmt: skip
    classes = ", ".join(str(t) for t in data["task"].values)
    return grid(
        values, scale="probability", title="successor", control=control,
        about=f"Share of ordinal words ({classes}) that the head's weights send to the next one.",
        **axes,
    )  # fmt: skip


def _top(kinds: dict[str, _Kind], layers: list[int], named: np.ndarray) -> View:
    rows = []
    for name, kind in kinds.items():
        order = np.argsort(np.nan_to_num(-kind.score, nan=np.inf), axis=None)[:3]
        for place in order:
            i, h = np.unravel_index(int(place), kind.score.shape)
            k = int(kind.offset[i, h])
            base = "query -" if name in ("previous", "lagged") else "duplicate +"
            rows.append([
                name, part_name("head", layers[i], int(h)), f"{base} {k}", kind.score[i, h],
                kind.error[i, h], kind.control[i, h], kind.z[i, h], str(named[i, h]),
            ])  # fmt: skip
    columns = [
        "kind", "head", "looks at", {"name": "score", "format": ".3f"},
        {"name": "standard error", "format": ".3f"}, {"name": "control", "format": ".3f"},
        {"name": "z", "format": "+.1f"}, "verdict",
    ]  # fmt: skip
    return table(columns, rows, title="The strongest heads of each kind")


def _facts(
    data: Any, kinds: dict[str, _Kind], layers: list[int], skipped: dict[str, str]
) -> list[str]:
    named = data["kind"].values
    lines = [
        f"The model predicts {data.attrs['repeat_accuracy']:.0%} of the repeated tokens, and"
        f" {data.attrs['control_accuracy']:.0%} where nothing repeats."
    ] if "repeat_accuracy" in data.attrs else []  # fmt: skip
    for name, kind in kinds.items():
        hits = sorted(map(tuple, np.argwhere(named == name)), key=lambda p: -kind.score[p])
        if hits:
            best = hits[0]
            heads = [part_name("head", layers[i], int(h)) for i, h in hits[:8]]
            more = f" and {len(hits) - 8} more" if len(hits) > 8 else ""
            k = int(kind.offset[best])
            where = f" (k = {k})" if name in ("lagged", "shifted") else ""
            lines.append(
                f"{name.capitalize()}: {', '.join(heads)}{more}; {heads[0]} has"
                f" {kind.score[best]:.2f} against {kind.control[best]:.2f} by chance{where}."
            )
    if not (named != "").any():
        lines.append("No head is of any of these kinds.")
    lines += [f"No {name} score: {why}." for name, why in skipped.items()]
    return lines
