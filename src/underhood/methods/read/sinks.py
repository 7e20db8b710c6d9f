"""Attention sinks: tokens that many heads look at for want of anything better.

Three marks of a sink token `s` go together (Guo et al. 2024): heads look at it (`mean over later
queries of a[q, s]`), it has little to say there (*value drain*: `||v_s|| / median_t ||v_t||` well
below 1), and its residual stream is huge (*peak*: `||h_s|| / median_t ||h_t||`). A head that spends
over 0.9 on the sink is dormant on this text, one under 0.5 active. Each number stands beside the
same for a random token that is not the first.

`decorrelation_loss` is the term of Llama-AVSR that keeps other tokens from becoming sinks.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.edit import Plan
from underhood.core.errors import NotOffered, UsageError
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.provenance import describe
from underhood.core.run import Run
from underhood.methods.read._attention import attending, batches, bos_of, id_rows, pad_heads, site
from underhood.methods.registry import method
from underhood.view import Result, View, grid, group, lines, sentences, table

__all__ = ["decorrelation_loss", "sinks"]

DORMANT, ACTIVE = 0.9, 0.5
LATER = 4  # queries after a token below which its received attention says little


@dataclass(slots=True)
class _Sums:
    """Sums over prompts; every entry of a list is one layer."""

    prompts: int = 0
    sink: list[Tensor] = field(default_factory=list)
    control: list[Tensor] = field(default_factory=list)
    detected: list[Tensor] = field(default_factory=list)
    drain: list[Tensor] = field(default_factory=list)
    drain_control: list[Tensor] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    peak_control: list[float] = field(default_factory=list)
    tokens: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)


@method
def sinks(
    model: Model, prompts: list[str], *, threshold: float = 0.3, edits: Plan | None = None
) -> Result:
    """Attention sinks: how much each head spends on them, what they carry, and which tokens.

    Args:
        prompts: Texts of at least six tokens (BOS included), of one domain, since heads are called
            active or dormant on it. They are read with BOS in front where the model has one.
        threshold: Share of a layer's attention (mean over its heads and over the queries that
            follow, at least four) from which on a token counts as a sink.
        edits: A plan in force while reading.

    Returns:
        Over `layer` and `head` (NaN in layers without attention): `sink`, mean attention of
        queries from the second on to the first token; `sink_detected`, to all sinks found in that
        layer; `drain` (value length of the first token over the median); each with `_control`, the
        expected value for a random token that is not the first. Over `layer`: `peak` and
        `peak_control` (residual length over the median, after each block). `*_no_bos` of `sink`
        and `peak`: the same texts without their BOS token. `label[layer, head]`: "dormant" over
        0.9, "active" under 0.5, else "". Over `node`: the sinks found (`prompt`, `pos`, `token`,
        `layers` in which, `received` at most).

    Raises:
        NotOffered: The model has no attention.
        UsageError: No prompts, or too short ones.

    Cost: one forward over the prompts, and one more without BOS.

    Source: scores from Guo et al. 2024 ("Active-Dormant Attention Heads"); sinks away from the
        first token as in Llama-AVSR (2025). Adapted: the 0.3, 0.9 and 0.5 are ours.

    Misleads: on a short text the first token gets much of every query for lack of others. Without
        BOS the first token is often still the sink. In layers with a sliding window late queries
        cannot see it, which lowers their score. Grouped heads share values, hence drains.

    Example:
        >>> import underhood as uh
        >>> result = uh.read.sinks(uh.load(), ["The capital of France is"])
        >>> result["sink"].dims
        ('layer', 'head')
    """
    if not 0 < threshold < 1:
        raise UsageError("the threshold is a share", given=threshold, do="use e.g. 0.3")
    layers = attending(model)
    bos = bos_of(model)
    rows = [row[1:] if row[0] == bos else row for row in id_rows(model, prompts)]
    _long_enough(prompts, rows, 6 - (bos is not None))
    with_bos = [[bos, *row] if bos is not None else row for row in rows]
    main = _collect(model, with_bos, layers, threshold, edits)
    bare = _collect(model, rows, layers, threshold, edits) if bos is not None else None
    data = _dataset(model, layers, main, bare)
    note = "" if bos is not None else "the model has no BOS token: only the bare texts were read"
    if not main.drain:
        note = "; ".join(n for n in (note, "this family's values are not offered: no drain") if n)
    facts = describe(model, prompts=len(prompts), threshold=threshold, note=note)
    return Result("sinks", data, _view(data, layers, threshold, note), facts)


def decorrelation_loss(
    hidden_states: Float[Tensor, "layer batch pos d_model"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared cosine between the first token's state and every other one's; differentiable.

    Args:
        hidden_states: Streams after each block whose sinks are to be kept away.
        mask: True where a token takes part (prompt, audio or video tokens, no outputs or padding);
            the first column must be a real token.

    Source: Llama-AVSR 2025, where it is added to the task loss with factor 1e4. The first state is
        not detached.
    """
    first = hidden_states[:, :, :1]
    cosine = torch.nn.functional.cosine_similarity(first, hidden_states[:, :, 1:], dim=-1)
    if mask is None:
        return cosine.pow(2).mean()
    keep = mask[:, 1:].to(cosine)
    return (cosine.pow(2) * keep).sum() / (keep.sum() * len(hidden_states)).clamp(min=1)


def _long_enough(prompts: list[str], rows: list[list[int]], least: int) -> None:
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) < least:
            raise UsageError(
                f"a prompt has {len(row)} tokens besides BOS",
                given=repr(prompt),
                why=f"a sink shows in what later queries do: {least} tokens are needed",
                do="use longer prompts",
            )


# Measuring


def _collect(
    model: Model, rows: list[list[int]], layers: list[int], threshold: float, edits: Plan | None
) -> _Sums:
    record = [site(model, "pattern", layer) for layer in layers]
    try:
        values = model.resolve([site(model, "v", layer) for layer in layers])
    except NotOffered:
        values = []
    sums = _Sums()
    streams = [site(model, "resid_post", layer) for layer in range(model.n_layers)]
    for chunk, tokens in batches(model, rows):
        run = model.run(tokens, record=[*record, *values, *streams], edits=edits)
        for row, i in enumerate(chunk):
            _add_row(model, run, row, i, len(rows[i]), layers, sums, threshold, bool(values))
    return sums


def _add_row(
    model: Model, run: Run, row: int, prompt: int, n: int, layers: list[int], sums: _Sums,
    threshold: float, values: bool,
) -> None:  # fmt: skip
    """One prompt's part; padding lies behind its first `n` columns and is cut off."""
    sums.prompts += 1
    for at, layer in enumerate(layers):
        pattern = run[site(model, "pattern", layer)][row, :, :n, :n].double().cpu()
        received = _received(pattern)
        shared = received.mean(0)
        shared[n - LATER :] = torch.nan
        places = (shared > threshold).nonzero()[:, 0].tolist()
        _note_tokens(run, row, prompt, layer, places, shared, sums)
        _add(sums.sink, at, pattern[:, 1:, 0].mean(-1))
        _add(sums.control, at, received[:, 1:-1].mean(-1))
        _add(sums.detected, at, pattern[:, 1:][..., places].sum(-1).mean(-1))
        if values:
            value = run[site(model, "v", layer)][row, :n].double().cpu()
            wide = value.repeat_interleave(pattern.shape[0] // value.shape[1], 1)
            length = wide.norm(dim=-1)
            ratio = length / length.median(0).values
            _add(sums.drain, at, ratio[0])
            _add(sums.drain_control, at, ratio[1:].mean(0))
    for layer in range(model.n_layers):
        length = run[site(model, "resid_post", layer)][row, :n].double().cpu().norm(dim=-1)
        ratio = length / length.median()
        if len(sums.peak) <= layer:
            sums.peak.append(0.0)
            sums.peak_control.append(0.0)
        sums.peak[layer] += float(ratio[0])
        sums.peak_control[layer] += float(ratio[1:].mean())


def _received(pattern: Float[Tensor, "head query key"]) -> Float[Tensor, "head key"]:
    """Mean attention that each token gets from the queries after it; NaN for the last."""
    after = torch.ones(pattern.shape[-2:], dtype=torch.bool).tril(-1)
    count = after.sum(0)
    total = (pattern * after).sum(-2)
    return torch.where(count > 0, total / count, torch.nan)


def _add(sums: list[Tensor], at: int, part: Tensor) -> None:
    if len(sums) <= at:
        sums.append(torch.zeros_like(part))
    sums[at] = sums[at] + part


def _note_tokens(
    run: Run, row: int, prompt: int, layer: int, places: list[int], shared: Tensor, sums: _Sums
) -> None:
    for pos in places:
        entry = sums.tokens.setdefault((prompt, pos), {"token": "", "layers": [], "received": 0.0})
        if run.tokens is not None and run.tokens.strings:
            entry["token"] = run.tokens.strings[row][pos]
        entry["layers"].append(layer)
        entry["received"] = max(entry["received"], float(shared[pos]))


# Result


def _plane(model: Model, layers: list[int], per_layer: list[Tensor], count: int) -> np.ndarray:
    """`[every layer, head]`, NaN where there is no attention."""
    found = pad_heads(per_layer) / count
    full = np.full((model.n_layers, found.shape[1]), np.nan)
    full[layers] = found
    return full


def _dataset(model: Model, layers: list[int], main: _Sums, bare: _Sums | None) -> Any:
    import xarray

    plane = ("layer", "head")
    parts = {"sink": main.sink, "sink_control": main.control, "sink_detected": main.detected}
    if main.drain:
        parts |= {"drain": main.drain, "drain_control": main.drain_control}
    values: dict[str, Any] = {
        name: (plane, _plane(model, layers, part, main.prompts)) for name, part in parts.items()
    }
    values["peak"] = ("layer", np.array(main.peak) / main.prompts)
    values["peak_control"] = ("layer", np.array(main.peak_control) / main.prompts)
    if bare is not None:
        values["sink_no_bos"] = (plane, _plane(model, layers, bare.sink, bare.prompts))
        values["peak_no_bos"] = ("layer", np.array(bare.peak) / bare.prompts)
    score = values["sink"][1]
    label = np.where(score > DORMANT, "dormant", np.where(score < ACTIVE, "active", ""))
    found = sorted(main.tokens)
    entries = [main.tokens[key] for key in found]
    values["received"] = ("node", np.array([e["received"] for e in entries]))
    coords = {
        "layer": range(model.n_layers), "head": range(score.shape[1]), "label": (plane, label),
        "prompt": ("node", np.array([p for p, _ in found], dtype=int)),
        "pos": ("node", np.array([s for _, s in found], dtype=int)),
        "token": ("node", np.array([e["token"] for e in entries], dtype=str)),
        "layers": ("node", np.array([_ranges(e["layers"]) for e in entries], dtype=str)),
    }  # fmt: skip
    return xarray.Dataset(values, coords=coords)


def _ranges(numbers: list[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _view(data: Any, layers: list[int], threshold: float, note: str) -> View:
    labels = [str(n) for n in layers]
    columns = [str(h) for h in data["head"].values]

    def plane(name: str, title: str, about: str, control: View | None = None) -> View:
        return grid(
            data[name].values[layers], rows=labels, cols=columns, row_name="layer",
            col_name="head", scale="probability", title=title, about=about, control=control,
        )  # fmt: skip

    control = plane("sink_control", "To a random other token", "Expected attention it receives.")
    shown = plane(
        "sink", "Attention to the first token",
        "Mean over later queries. Over 0.9 a head is dormant on this text, under 0.5 active.",
        control,
    )  # fmt: skip
    series = {"first token": data["peak"].values, "a random other": data["peak_control"].values}
    if "peak_no_bos" in data:
        series["first token, no BOS"] = data["peak_no_bos"].values
    peaks = lines(
        range(len(data["peak"])), series, x_name="layer", y_name="length over the median",
        title="Residual peak", about="Length of the residual stream after each block.",
    )  # fmt: skip
    rows = [
        [str(data["token"].values[i]), int(data["prompt"].values[i]), int(data["pos"].values[i]),
         float(data["received"].values[i]), str(data["layers"].values[i])]
        for i in np.argsort(-data["received"].values)[:50]
    ]  # fmt: skip
    found = table(
        ["token", "prompt", "position", {"name": "received at most", "format": ".2f"}, "in layers"],
        rows, title="Sink tokens",
        about=f"Tokens that get over {threshold:g} of a layer's attention from the queries after"
        " them (at least four), the strongest 50.",
    )  # fmt: skip
    return group([sentences(_facts(data, layers, note)), shown, peaks, found], title="Sinks")


def _facts(data: Any, layers: list[int], note: str) -> list[str]:
    sink = data["sink"].values
    i, head = np.unravel_index(int(np.nanargmax(sink)), sink.shape)
    most = part_name("head", int(i), int(head))
    total = int(np.isfinite(sink).sum())
    dormant = int((data["label"].values == "dormant").sum())
    away = int((data["pos"].values > 0).sum())
    peak = data["peak"].values
    lines = [
        f"Heads spend {np.nanmean(sink):.0%} of their attention on the first token (a random other"
        f" token gets {np.nanmean(data['sink_control'].values):.0%}); {most} the most,"
        f" {sink[i, head]:.0%}.",
        f"{dormant} of {total} heads are dormant here: over 90% goes to the first token.",
        f"The first token's residual stream is at most {np.nanmax(peak):.1f} times the median"
        f" length, after layer {int(np.nanargmax(peak))}.",
        f"{len(data['pos'])} tokens are sinks in some layer; {away} of them are not the first.",
    ]
    if "sink_no_bos" in data:
        lines.append(
            f"Without BOS the first token gets {np.nanmean(data['sink_no_bos'].values):.0%}."
        )
    if "drain" in data:
        place = data["drain"].values[i, head]
        lines.append(f"In {most} its value is {place:.2f} times the median length.")
    return [*lines, f"Note: {note}."] if note else lines
