"""Is a subspace what the model uses, or an illusion? (Makelov et al. 2023)

A swap along v moves what the next layer reads by `(v . dh) W'v`: the reading `v . dh` may come from
a part of v that nothing reads (disconnected, but it tells the two runs apart), and the writing may
go through a part that tells them apart in no run (dormant, but it can act). Such a v changes the
answer although the model does not use it. So v is split by the read-out W that reads the site:

    v = v_row + v_null,   v_null the part that W does not see

and both parts, made unit vectors, are swapped by themselves. With V the subspace (rows), P the
projection on W's row space and R the subspace's row part:

    disconnected = sum <V dh, V (1-P) dh> / sum |V dh|^2       of the reading, what W never sees
    dormant      = sum |P V'V dh - R'R dh|^2 / sum |P V'V dh|^2   of the writing, what the source
                                                                 run does not hold there
    FLDD         = 100 (1 - LD_swapped / LD_clean)             in percent

A read-out with a single output reads along one direction, and every row part is that direction: the
split says something only where W has several outputs.

The null part alone does exactly nothing where W is all that reads the site; that is asserted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Plan
from underhood.core.errors import SelfCheckFailed
from underhood.core.site import Site
from underhood.data import normalised
from underhood.methods.locate._interchange import Interchange
from underhood.methods.locate._readout import Readout

if TYPE_CHECKING:
    import xarray

__all__ = [
    "PARTS", "Arms", "Split", "arms", "dataset", "orthonormal", "random_basis", "shares", "split",
    "verdict",
]  # fmt: skip

PARTS = ("subspace", "row", "null", "full", "random", "permuted")
LARGE = 0.1  # of the way from clean to contrast: an effect worth explaining
LOST = 0.5  # of the effect: the row part keeps less than this
UNSEEN = 0.25  # of the squared length: a null part that matters
_SMALL = 1e-4  # parts shorter than this are float noise of the split
_EXACT = 1e-3  # of the logit difference's size: noise of a swap that does nothing
_EXACT_HALF = 5e-2


@dataclass(frozen=True, slots=True)
class Split:
    """A subspace's part that a read-out sees, and its part that it does not.

    Attributes:
        row: Orthonormal rows; none where the read-out sees nothing of the subspace.
        null: Orthonormal rows; none where it sees all.
        row_norms: Length of each basis vector's seen part.
        null_norms: Length of its unseen part.
    """

    row: Float[Tensor, "a d"]
    null: Float[Tensor, "b d"]
    row_norms: Float[Tensor, " k"]
    null_norms: Float[Tensor, " k"]

    @property
    def unseen(self) -> float:
        """Share of the subspace's squared length that the read-out does not see."""
        return float(self.null_norms.pow(2).mean())


def orthonormal(rows: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
    """An orthonormal basis of the span, in float64; one direction keeps its sign."""
    rows = rows.double()
    if len(rows) == 1:
        length = float(rows.norm())
        return rows / length if length > _SMALL else rows[:0]
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > _SMALL]


def split(basis: Float[Tensor, "k d"], reader: Readout) -> Split:
    """Split each direction of an orthonormal basis by a read-out."""
    basis = basis.double().cpu()
    row = (basis @ reader.space) @ reader.space.T
    null = basis - row
    return Split(orthonormal(row), orthonormal(null), row.norm(dim=1), null.norm(dim=1))


def shares(
    basis: Float[Tensor, "k d"], parts: Split, reader: Readout, delta: Float[Tensor, "n d"]
) -> tuple[float, float]:
    """The disconnected share of what is read and the dormant share of what is written.

    Args:
        basis: The subspace, orthonormal rows.
        parts: Its split.
        reader: The read-out it was split by.
        delta: Source minus base.
    """
    basis, delta = basis.double().cpu(), delta.double()
    read = delta @ basis.T
    unseen = delta - (delta @ reader.space) @ reader.space.T
    disconnected = (read * (unseen @ basis.T)).sum() / read.pow(2).sum()
    written = (read @ basis @ reader.space) @ reader.space.T
    held = (delta @ parts.row.T) @ parts.row
    dormant = (written - held).pow(2).sum() / written.pow(2).sum()
    return float(disconnected), float(dormant)


def verdict(effect: float, row: float, unseen: float, *, chance: float) -> str:
    """What the diagnostic says.

    Args:
        effect: Of the subspace, as a share of the way from clean to contrast.
        row: Of its row part by itself; NaN without a read-out.
        unseen: Share of its squared length in the null space.
        chance: The strongest effect of a random subspace of equal size.

    Returns:
        "no effect" (nothing to explain), "illusion" (a large effect that the seen part by itself
        lacks, while the unseen part is large), "cleared", or "undecided" without a read-out.
    """
    if not effect > max(LARGE, abs(chance)):
        return "no effect"
    if row != row:
        return "undecided"
    return "illusion" if row < LOST * effect and unseen > UNSEEN else "cleared"


@dataclass(slots=True)
class Arms:
    """What was swapped at one site, and what came of it.

    Attributes:
        site: Where.
        basis: The subspace.
        reader: The read-out; None where there is none.
        split: The parts; None without a read-out.
        values: Logit difference per row, by arm.
        hits: Whether the contrast's answer came out on top, by arm.
        disconnected, dormant: See the module.
    """

    site: Site
    basis: Float[Tensor, "k d"]
    reader: Readout | None
    split: Split | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    hits: dict[str, Tensor] = field(default_factory=dict)
    disconnected: float = float("nan")
    dormant: float = float("nan")

    def effect(self, arm: str, work: Interchange) -> float:
        """Share of the way from the clean run to the contrast; NaN where nothing was swapped."""
        if arm not in self.values:
            return float("nan")
        way = work.clean.mean() - work.contrast.mean()
        return float((work.clean.mean() - self.values[arm].mean()) / way)

    def verdict(self, work: Interchange) -> str:
        """What the diagnostic says of this subspace."""
        unseen = self.split.unseen if self.split is not None else float("nan")
        return verdict(
            self.effect("subspace", work), self.effect("row", work), unseen,
            chance=self.effect("random", work),
        )  # fmt: skip


def random_basis(k: int, d: int, make: torch.Generator) -> Float[Tensor, "k d"]:
    """A random subspace (uniform)."""
    return torch.linalg.qr(torch.randn(d, k, generator=make, dtype=torch.float64))[0].T


def arms(
    work: Interchange,
    found: Sequence[tuple[Site, Tensor, Readout | None]],
    *,
    draws: int,
    seed: int,
    more: dict[Site, dict[str, Tensor]] | None = None,
) -> list[Arms]:
    """Swap the subspace, its parts, random subspaces and the whole activation, site by site.

    Args:
        work: The pairs.
        found: Site, orthonormal basis, read-out.
        draws: Random subspaces of equal size; the strongest is kept.
        seed: Of these.
        more: Further subspaces by site and name.

    Raises:
        SelfCheckFailed: The null part alone changes the answer, although nothing reads it.
    """
    normalised(0.0, float(work.clean.mean()), float(work.contrast.mean()))  # refuses a flat metric
    results: list[Arms] = []
    cells: list[Plan] = []
    names: list[tuple[Arms, str]] = []
    for number, (site, basis, reader) in enumerate(found):
        arm = Arms(site, basis, reader)
        make = torch.Generator().manual_seed(seed * 10_007 + number)
        swaps: dict[str, Tensor | None] = {"subspace": basis}
        if reader is not None:
            arm.split = split(basis, reader)
            arm.disconnected, arm.dormant = shares(basis, arm.split, reader, work.differences(site))
            swaps |= {"row": arm.split.row, "null": arm.split.null}
        swaps["full"] = None
        for draw in range(draws):
            swaps[f"random {draw}"] = random_basis(basis.shape[0], basis.shape[1], make)
        swaps |= (more or {}).get(site, {})
        for name, rows in swaps.items():
            if rows is None or len(rows):
                names.append((arm, name))
                cells.append(work.swap(site, rows))
        results.append(arm)
    for (arm, name), values, hits in zip(names, work.values(cells), work.hits(cells), strict=True):
        arm.values[name], arm.hits[name] = values, hits
    for arm in results:
        _keep_strongest(arm, work, draws)
        _check_null(arm, work)
    return results


def _keep_strongest(arm: Arms, work: Interchange, draws: int) -> None:
    """Of the random subspaces, the one that did most stands for all."""
    drawn = [f"random {draw}" for draw in range(draws)]
    best = max(drawn, key=lambda name: abs(arm.effect(name, work)))
    arm.values["random"], arm.hits["random"] = arm.values[best], arm.hits[best]
    for name in drawn:
        del arm.values[name], arm.hits[name]


def _check_null(arm: Arms, work: Interchange) -> None:
    if arm.reader is None or not arm.reader.whole or "null" not in arm.values:
        return
    half = work.model.dtype in (torch.float16, torch.bfloat16)
    size = max(1.0, float(work.clean.abs().max()))
    moved = float((arm.values["null"] - work.clean).abs().max())
    if moved > (_EXACT_HALF if half else _EXACT) * size:
        raise SelfCheckFailed(
            "a swap that nothing reads changed the answer",
            given=f"{arm.site}: the logit difference moved by {moved:.3g} of {size:.3g} logits",
            why=f"{arm.reader.name} should be all that reads this site",
            do="run model.check(); this model's anatomy may be misread",
        )


# Numbers -----------------------------------------------------------------------------------------


def dataset(results: Sequence[Arms], work: Interchange) -> "xarray.Dataset":
    """The arms of several layers of one site as named axes."""
    import numpy as np
    import xarray

    parts = [p for p in PARTS if any(p in arm.values for arm in results)]
    missing = torch.full((len(work),), torch.nan, dtype=torch.float64)
    patched, hits = (
        torch.stack([torch.stack([table.get(p, missing) for p in parts]) for table in tables])
        for tables in ([arm.values for arm in results], [arm.hits for arm in results])
    )
    ways = work.clean - work.contrast
    moved = work.clean - patched
    effect = moved.mean(-1) / ways.mean()
    rest = moved - effect[..., None] * ways  # of a ratio of two means
    n = len(work)
    sem = (rest.pow(2).sum(-1) / max(n - 1, 1) / n).sqrt() / ways.mean().abs()
    plane, axis = ("layer", "part"), results[0].site.kind.axes[-1]
    widest = max(len(arm.basis) for arm in results)
    values: dict[str, Any] = {
        "effect": (plane, effect + 0.0),  # no minus before a zero
        "sem": (plane, sem if n > 1 else sem * torch.nan),
        "fldd": (plane, 100 * (1 - patched.mean(-1) / work.clean.mean()) + 0.0),
        "accuracy": (plane, hits.mean(-1)),
        "flipped": (
            plane,
            torch.where(patched.isnan(), torch.nan, (patched < 0).double()).mean(-1),
        ),
        "patched": ((*plane, "batch"), patched),
        "clean": ("batch", work.clean),
        "contrast": ("batch", work.contrast),
        "reached": ("batch", work.reached),
        "basis": (("layer", "feature", axis), _padded([a.basis for a in results], widest)),
        "size": ("layer", np.array([len(arm.basis) for arm in results])),
        "rank": ("layer", np.array([a.reader.rank if a.reader else -1 for a in results])),
        "disconnected": ("layer", np.array([arm.disconnected for arm in results])),
        "dormant": ("layer", np.array([arm.dormant for arm in results])),
    }
    for name in ("row_norms", "null_norms"):
        columns = [getattr(a.split, name) if a.split else missing[:0] for a in results]
        values[name] = (("layer", "feature"), _padded(columns, widest))
    verdicts = np.array([arm.verdict(work) for arm in results])
    values["illusion"] = ("layer", verdicts == "illusion")
    coords = {
        "layer": [arm.site.layer for arm in results], "part": parts, "verdict": ("layer", verdicts),
    }  # fmt: skip
    arrays = {
        key: (dims, v.numpy() if isinstance(v, Tensor) else v) for key, (dims, v) in values.items()
    }
    return xarray.Dataset(arrays, coords=coords, attrs={"unit": "logits", "metric": "logit_diff"})


def _padded(parts: Sequence[Tensor], length: int) -> Tensor:
    """Tensors stacked, shorter ones filled with NaN."""
    shape = (length, *parts[0].shape[1:])
    out = torch.full((len(parts), *shape), torch.nan, dtype=torch.float64)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part.double()
    return out
