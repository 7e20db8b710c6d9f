"""What a cut edge carries.

    resample         what the source writes in the contrast of the same prompt
    mean             its mean over all prompts (both sides) and positions, first tokens left out
    mean-position    its mean over all prompts (both sides) at that position
    zero             nothing: off-distribution, and so a weak claim

The choice is part of every result: circuits differ with it (Miller et al., 2024).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from underhood.circuits.wiring import Wiring, Writes
from underhood.core.errors import ShapeMismatch, UsageError
from underhood.data import EncodedPairs

__all__ = ["ABLATIONS", "Ablation", "cutting"]

ABLATIONS = ("resample", "mean", "mean-position", "zero")


def cutting(wiring: Wiring, ablation: str) -> dict[str, Any]:
    """What cutting an edge means: part of the `how` of every score and circuit."""
    return {
        "ablation": ablation,
        "experts": wiring.graph.experts,
        "freeze_routing": wiring.freeze_routing,
    }


class Ablation:
    """Values of cut edges for the prompts of one set.

    Args:
        wiring: The model and its graph.
        pairs: All prompts; means are taken over them.
        kind: One of `ABLATIONS`.
        batch_size: Prompts of one pass.

    Raises:
        UsageError: An unknown kind.
        ShapeMismatch: Means by position of prompts of different length.
    """

    def __init__(self, wiring: Wiring, pairs: EncodedPairs, kind: str, batch_size: int) -> None:
        if kind not in ABLATIONS:
            raise UsageError("no such ablation", given=kind, do=f"use {', '.join(ABLATIONS)}")
        self.wiring, self.kind, self.passes = wiring, kind, 0
        self._means: list[Tensor] = []
        if kind == "mean-position" and len(set(pairs.clean.lengths)) > 1:
            raise ShapeMismatch(
                "means by position need prompts of one structure",
                given=f"lengths {sorted(set(pairs.clean.lengths))}",
                why="position 5 of one prompt is another place in another",
                do='use prompts of one length, or ablation="mean"',
            )
        if kind.startswith("mean"):
            self._means = self._averages(pairs, batch_size)

    def writes(self, pairs: EncodedPairs) -> Writes:
        """What every writer's cut edges carry, one row per pair; the logits are the contrast's."""
        contrast = self.wiring.writes(pairs.contrast)
        if self.kind == "resample":
            return contrast
        if self.kind == "zero":
            return Writes([torch.zeros_like(v) for v in contrast.values], contrast.logits)
        ends = zip(self._means, contrast.values, strict=True)
        return Writes([m.to(v.dtype).expand_as(v) for m, v in ends], contrast.logits)

    def _averages(self, pairs: EncodedPairs, size: int) -> list[Tensor]:
        sums: list[Tensor] = []
        count = torch.zeros(1)
        for rows in pairs.blocks(size):
            part = pairs.rows(rows)
            for tokens in (part.clean, part.contrast):
                values = [v.double() for v in self.wiring.writes(tokens).values]
                self.passes += 1
                # The first token's activation is often hundreds of times longer than the others'.
                later = tokens.position_ids > 0 if self.kind == "mean" else tokens.mask
                keep = (tokens.mask & later).to(values[0].device)
                keep = keep if bool(keep.any()) else tokens.mask.to(keep.device)
                new = self._sums(values, keep)
                sums = new if not sums else [a + b for a, b in zip(sums, new, strict=True)]
                count = count + (len(tokens) if self.kind == "mean-position" else int(keep.sum()))
        total = float(count)
        return [s / total for s in sums]

    def _sums(self, values: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
        if self.kind == "mean-position":
            return [v.sum(0, keepdim=True) for v in values]
        return [v[keep].sum(0)[None, None] for v in values]
