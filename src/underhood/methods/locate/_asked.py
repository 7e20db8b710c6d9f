"""What a grid of patches is made of, and the numbers it is filled with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass
from underhood.data import Metric
from underhood.methods.locate._places import Spots, Units
from underhood.methods.locate._written import Learning

__all__ = ["Asked", "Found"]

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a grid is made of.

    Attributes:
        names: Sites without layers.
        direction: "denoise" edits the contrast run, "noise" the clean run.
        metric: What is measured.
        positions: "each", "all", "last", or numbers.
        value: "resample" (the other run's activation), "mean", "mean-position", "zero", "optimal".
        draws: Random directions per cell.
        seed: Of these.
        batch_size: Rows of one pass; None: the sweep's default.
        units: Which units of a site are cells of their own; see `places_of`.
        chosen: Units per site and layer, where they were searched for.
        learning: How optimal constants are learned.
    """

    names: tuple[Site, ...]
    direction: str
    metric: Metric
    positions: Spots
    value: str
    draws: int
    seed: int
    batch_size: int | None
    units: Units = "auto"
    chosen: Mapping[Site, tuple[int, ...]] | None = None
    learning: Learning = field(default_factory=Learning)

    @property
    def denoises(self) -> bool:
        """Whether the contrast run is edited."""
        return self.direction == "denoise"

    @property
    def sign(self) -> float:
        """What a change of the metric is multiplied by, so that positive supports the answer."""
        return 1.0 if self.denoises else -1.0

    def size(self, columns: int) -> int:
        """Rows of one pass."""
        return self.batch_size or rows_per_pass(columns)


@dataclass(slots=True)
class Found(Generic[C]):
    """Numbers per row, in the metric's unit.

    Attributes:
        cells: The cells, in order: places, or the ends of paths.
        clean: The metric of the clean run.
        contrast: The metric of the contrast run.
        values: The metric with a cell patched; NaN where a row has no such position.
        control: The same for random directions, draw by draw.
        acted: Whether the patch changed anything there (a path: at its receivers); where not, the
            value is that of the unedited run.
        how: How the cells were run.
        passes: Forward passes, without those that read the activations.
    """

    cells: list[C]
    clean: Float[Tensor, " batch"]
    contrast: Float[Tensor, " batch"]
    values: Float[Tensor, "cell batch"]
    control: Float[Tensor, "draw cell batch"]
    acted: Bool[Tensor, "cell batch"]
    how: str = "nothing to run"
    passes: int = 0

    @classmethod
    def empty(cls, cells: list[C], batch: int, draws: int = 0) -> "Found[C]":
        """Nothing filled in yet."""
        ends = torch.zeros(2, batch, dtype=torch.float64)
        values = torch.full((1 + draws, len(cells), batch), torch.nan, dtype=torch.float64)
        acted = torch.zeros(len(cells), batch, dtype=torch.bool)
        return cls(cells, ends[0], ends[1], values[0], values[1:], acted)
