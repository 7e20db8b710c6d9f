"""Causal tracing of one target: states of a contrast run written into the clean run, cell by cell.

A *stage* is a set of prompts with one target token each (the bridge entity, or the answer). Every
cell (layer, position) gets the contrast's state there; what is read is how much log-probability and
reciprocal rank the target loses. The target may be read by the lens of an inner layer: then the
model is stopped after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.ops import patch
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass
from underhood.core.tokens import Tokens
from underhood.methods.locate._trace import (
    log_prob_and_rank,
    random_like,
    stopped,
    streams,
    sweep_columns,
)

__all__ = ["Stage", "Traced", "readable", "trace"]

_NOISE = 1e-5  # relative difference of two states that are equal but for the kernels


@dataclass(frozen=True, slots=True)
class Stage:
    """What is traced.

    Attributes:
        clean: The clean prompts, all of one length.
        contrast: The contrast prompts, of the same length.
        targets: The token that is read, per prompt.
        positions: Positions to write at.
        layer: The block after which the target is read; the last one is the model's output.
        draws: Random directions per cell.
        seed: Of these.
        batch_size: Rows of one pass.
    """

    clean: Tokens
    contrast: Tokens
    targets: Int[Tensor, " batch"]
    positions: tuple[int, ...]
    layer: int
    draws: int
    seed: int
    batch_size: int | None


@dataclass(slots=True)
class Traced:
    """Log-probability (nats) and reciprocal rank of the target, on the last axis.

    Attributes:
        clean: In the clean run.
        contrast: In the contrast run.
        values: With a cell written; layer 0 is the stream before the first block.
        control: With a random change of the same length, draw by draw.
        acted: Where the two runs differ; elsewhere nothing was run.
        passes: Forward passes of the sweeps.
        how: How they ran.
    """

    clean: Float[Tensor, "batch 2"]
    contrast: Float[Tensor, "batch 2"]
    values: Float[Tensor, "layer pos batch 2"]
    control: Float[Tensor, "draw layer pos batch 2"]
    acted: Bool[Tensor, "layer pos batch"]
    passes: int = 0
    how: str = "nothing to run"


def trace(model: Model, stage: Stage) -> Traced:
    """Every cell of a stage, one at a time."""
    batch, size = len(stage.clean), stage.batch_size or rows_per_pass(stage.clean.ids.shape[1])
    layers, spots = stage.layer + 2, len(stage.positions)
    ends = torch.zeros(2, batch, 2, dtype=torch.float64)
    found = Traced(
        ends[0],
        ends[1],
        torch.zeros(layers, spots, batch, 2, dtype=torch.float64),
        torch.zeros(stage.draws, layers, spots, batch, 2, dtype=torch.float64),
        torch.zeros(layers, spots, batch, dtype=torch.bool),
    )
    for rows in stage.clean.blocks(size):
        _block(model, stage, rows, found)
    return found


def _block(model: Model, stage: Stage, rows: range, found: Traced) -> None:
    """Some rows of every cell."""
    sites, cut = streams(model)[: stage.layer + 2], slice(rows.start, rows.stop)
    tokens = [side.rows(rows) for side in (stage.clean, stage.contrast)]
    targets, stop = stage.targets[cut], stopped(model, stage.layer)
    runs = [model.run(side, record=sites, edits=stop or None) for side in tokens]
    ends = [log_prob_and_rank(r.last_logits, targets.to(r.logits.device)) for r in runs]
    found.clean[cut], found.contrast[cut] = (end.double().cpu() for end in ends)
    before, after = ({s: r.aligned(s) for s in sites} for r in runs)
    found.values[:, :, cut] = found.clean[cut]
    found.control[:, :, :, cut] = found.clean[cut]
    cells = []
    for layer, site in enumerate(sites):
        change = (after[site].float() - before[site].float()).norm(dim=-1)
        acts = (change > _NOISE * before[site].float().norm(dim=-1)).cpu()
        for index, pos in enumerate(stage.positions):
            found.acted[layer, index, cut] = acts[:, pos]
            if bool(acts[:, pos].any()):
                cells.append((layer, index, pos))
    if not cells:
        return

    def read(logits: Tensor) -> Tensor:
        times = len(logits) // len(rows)
        return log_prob_and_rank(logits, targets.to(logits.device).repeat(times))

    # One sweep for the contrast's states and all random ones: they share their passes.
    sides = [after, *(_noisy(stage, d, rows.start, before, after) for d in range(stage.draws))]
    plans = [
        Plan([Edit(sites[layer], patch(states[sites[layer]]), pos), *stop])
        for states in sides
        for layer, _, pos in cells
    ]
    values, swept = sweep_columns(model, tokens[0], plans, read, batch_size=stage.batch_size)
    places = [found.values, *found.control]
    for into, side in zip(places, values.view(len(sides), len(cells), len(rows), 2), strict=True):
        for (layer, index, _), value in zip(cells, side, strict=True):
            into[layer, index, cut] = value
    found.how, found.passes = swept.how, found.passes + swept.passes


def _noisy(
    stage: Stage, draw: int, first_row: int, before: dict[Site, Tensor], after: dict[Site, Tensor]
) -> dict[Site, Tensor]:
    """The clean states plus random changes as long as those that the contrast makes."""
    found = {}
    for number, (site, old) in enumerate(before.items()):
        change = after[site].float() - old.float()
        noise = random_like(change, hash((stage.seed, number)), draw, first_row=first_row)
        found[site] = (old.float() + noise).to(old.dtype)
    return found


def readable(
    model: Model,
    head: Head,
    tokens: Tokens,
    targets: Sequence[Int[Tensor, "batch pos"]],
    *,
    batch_size: int | None = None,
) -> Float[Tensor, "target layer pos batch"]:
    """Reciprocal rank of target tokens, by the lens, at every layer and position.

    Args:
        model: The model.
        head: Its unembedding.
        tokens: Prompts of one length.
        targets: Sets of tokens, each `[batch, pos]`.
        batch_size: Rows of one pass.

    Returns:
        Layer 0 is the stream before the first block.
    """
    sites, size = streams(model), batch_size or rows_per_pass(tokens.ids.shape[1])
    blocks = []
    for rows in tokens.blocks(size):
        run = model.run(tokens.rows(rows), record=sites)
        layers = []
        for site in sites:
            logits = head.logits(run.aligned(site)).float().flatten(0, 1)  # [rows * pos, vocab]
            ids = [t[rows.start : rows.stop].flatten().to(logits.device) for t in targets]
            ranks = [log_prob_and_rank(logits, each)[:, 1].view(len(rows), -1) for each in ids]
            layers.append(torch.stack(ranks).cpu())
        blocks.append(torch.stack(layers, 1).permute(0, 1, 3, 2))  # [target layer pos rows]
    return torch.cat(blocks, -1).double()
