"""What reads a place linearly, as a matrix: the read-out W of the illusion diagnostic.

    mlp_post.L            the MLP's output projection              everything that reads it
    z.L.H                 the head's share of the output projection    everything that reads it
    resid_*, *_out, ln1   queries, keys and values of the next attention, through its norm
    resid_mid, attn_out   the next MLP's input projections, through its norm
    last resid_post       the unembedding, through the final norm

Only the first two are the *whole* of what reads the place, so that swapping along the null space of
W does exactly nothing there; a stream goes on to later layers, and a norm divides by a length to
which every direction adds. Other read-outs of a stream are chosen by name: `q.9.6` (one head's
queries), `mlp_pre.8`, `logits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.core.anatomy import Block
from underhood.core.edit import Edit
from underhood.core.errors import NotOffered, ShapeMismatch, UsageError
from underhood.core.head import Head, NormForm, norm_form
from underhood.core.model import Model
from underhood.core.ops import patch
from underhood.core.site import Site
from underhood.core.taps.modules import weight_in_out

__all__ = ["Readout", "readout", "readout_of"]

_RANK = 1e-6  # singular values below this share of the largest count as zero
_LINEAR = 1e-3  # how far a probed map may be from linear
_STAGE = {
    "resid_pre": 0, "attn_out": 1, "head_out": 1, "resid_mid": 1, "mlp_out": 2, "resid_post": 2,
}  # fmt: skip
"""Where in its block a site of the stream lies: before attention, before the MLP, at the end."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear map from a site to whatever reads it.

    Attributes:
        name: What it is, in words.
        matrix: `site @ matrix` is what is read, in float64.
        whole: Whether nothing else reads the site, so that its null space does exactly nothing.
    """

    name: str
    matrix: Float[Tensor, "d out"]
    whole: bool

    @cached_property
    def space(self) -> Float[Tensor, "d r"]:
        """An orthonormal basis (columns) of the directions that are read: the row space."""
        left, sizes, _ = torch.linalg.svd(self.matrix.double().cpu(), full_matrices=False)
        return left[:, sizes > _RANK * sizes.max().clamp(min=1e-300)]

    @property
    def rank(self) -> int:
        """Number of independent directions that are read."""
        return self.space.shape[1]


def readout(matrix: Tensor, width: int, *, name: str = "the read-out given") -> Readout:
    """A read-out that the caller brings: `[width, out]`, applied as `h @ matrix`.

    Raises:
        ShapeMismatch: It does not fit the site.
    """
    if matrix.ndim != 2 or matrix.shape[0] != width:
        raise ShapeMismatch(
            "the read-out does not fit the site",
            given=f"shape {list(matrix.shape)}",
            why=f"the site has {width} on its last axis",
            do=f"give a matrix [{width}, out] that is applied as h @ matrix",
        )
    return Readout(name, matrix.detach().double().cpu(), whole=False)


def readout_of(model: Model, site: Site, named: Sequence[str] = ()) -> Readout:
    """What reads a site: the readers named, or what comes next.

    Raises:
        NotOffered: Nothing that reads this site is linear and known here.
        UsageError: A named reader does not read this site.
    """
    if named:
        return _named(model, site, [Site.parse(name) for name in named])
    block = model.anatomy.stacks[site.stack].blocks[site.layer or 0]
    if site.name == "mlp_post":
        point = block.points["mlp_post"]
        weight = weight_in_out(model.module.get_submodule(point.path))
        return Readout("the MLP's output projection", weight.detach().double(), whole=True)
    if site.name == "z" and site.unit is not None:
        return _of_head(model, site, block)
    if site.name in ("ln1", "ln2", "mlp_in"):
        readers = _attention(site) if site.name == "ln1" else _mlp(model, site)
        return _stacked(model, readers, None)
    if site.name not in _STAGE:
        raise NotOffered(
            f"what reads {site} is not known as a linear map",
            given=str(site),
            why=site.kind.about,
            do="name its readers, or give a matrix: illusion_report(..., reader=W)",
        )
    return _named(model, site, _next(model, site, block))


def _of_head(model: Model, site: Site, block: Block) -> Readout:
    spec = block.attention
    if spec is None or spec.o_proj is None or spec.heads is None:
        raise NotOffered(
            "this attention's output projection cannot be split by heads",
            given=str(site),
            do="use attn_out",
        )
    weight = weight_in_out(model.module.get_submodule(spec.o_proj)).detach().double()
    share = weight.unflatten(0, (spec.heads, -1))[site.unit or 0]
    return Readout("the head's share of the output projection", share, whole=True)


def _attention(site: Site) -> list[Site]:
    return [Site(name, site.layer, stack=site.stack) for name in ("q", "k", "v")]


def _mlp(model: Model, site: Site) -> list[Site]:
    both = [Site(name, site.layer, stack=site.stack) for name in ("mlp_pre", "mlp_gate")]
    return both[:1] + [s for s in both[1:] if model.offers(s)]


def _next(model: Model, site: Site, block: Block) -> list[Site]:
    """What reads a site of the stream first."""
    stage, layer = _STAGE[site.name], site.layer or 0
    if stage == 1 and not block.parallel:
        return _mlp(model, site)
    if stage == 0:
        return _attention(site) + (_mlp(model, site) if block.parallel else [])
    if layer + 1 < len(model.anatomy.stacks[site.stack].blocks):
        return _attention(site.at(layer + 1))
    return [Site("logits")]


def _named(model: Model, site: Site, readers: Sequence[Site]) -> Readout:
    """Readers of the stream, each through the norm that it reads it with."""
    if site.name not in _STAGE:
        raise UsageError(
            f"readers of {site} cannot be chosen",
            given=", ".join(map(str, readers)),
            why="readers are chosen for the stream, which many parts read",
            do="leave the option out",
        )
    last = len(model.anatomy.stacks[site.stack].blocks) - 1
    parts: dict[Site, list[Site]] = {}
    for reader in readers:
        stages = {"q": 0, "k": 0, "v": 0, "mlp_pre": 1, "mlp_gate": 1, "logits": 2}
        if reader.name not in stages or (reader.layer is None and reader.name != "logits"):
            raise UsageError(
                f"{reader} is not a reader of the stream",
                given=str(reader),
                do="name q.L.H, k.L.H or v.L.H (one head, or q.L for all), mlp_pre.L, mlp_gate.L,"
                " or logits",
            )
        model.resolve(reader)
        layer = last + 1 if reader.layer is None else reader.layer
        if (layer, stages[reader.name]) < (site.layer or 0, _STAGE[site.name]):
            raise UsageError(
                f"{reader} comes before {site} and cannot read it",
                given=str(reader),
                do="name a reader of a later layer",
            )
        norm = Site("ln_final", stack=site.stack) if reader.name == "logits" else Site(
            "ln2" if stages[reader.name] else "ln1", layer, stack=site.stack
        )  # fmt: skip
        parts.setdefault(norm, []).append(reader)
    found = [_stacked(model, group, _norm(model, norm)) for norm, group in parts.items()]
    names = ", ".join(part.name for part in found)
    return Readout(names, torch.cat([part.matrix for part in found], 1), whole=False)


def _norm(model: Model, site: Site) -> NormForm | None:
    """The linear form of the norm at a site; None where readers take the stream as it is."""
    stack = model.anatomy.stacks[site.stack]
    points = stack.points if site.layer is None else stack.blocks[site.layer].points
    point = points.get(site.name)
    module: nn.Module | None = model.module.get_submodule(point.path) if point else None
    return norm_form(module, int(model.d_model or 0)) if module is not None else None


def _stacked(model: Model, readers: Sequence[Site], form: NormForm | None) -> Readout:
    """Several readers of one input side by side, behind a norm with its scale frozen."""
    matrix = torch.cat([_weights(model, reader) for reader in readers], 1)
    if form is not None:
        matrix = form.gain.double().cpu()[:, None] * matrix
        matrix = matrix - matrix.mean(0) if form.centred else matrix
    return Readout(" ".join(map(str, readers)), matrix, whole=False)


def _weights(model: Model, reader: Site) -> Float[Tensor, "d out"]:
    """What a reader multiplies its (normalised) input with, found by probing the model.

    Families keep these weights apart, fused, interleaved or transposed. The input is set to each
    unit vector in turn, in as many prompts of one token; a random vector shows whether the reader
    is linear at all (heads that normalise their queries are not).
    """
    if reader.name == "logits":
        head = Head(model)
        return head.directions(list(range(weight_in_out(head.module).shape[1]))).T.detach().cpu()
    name = "ln1" if reader.name in ("q", "k", "v") else "mlp_in"
    entry = Site(name, reader.layer, stack=reader.stack)
    model.resolve([entry, reader])
    d = int(model.d_model or 0)
    make = torch.Generator().manual_seed(0)
    probes = torch.cat([torch.eye(d), torch.zeros(1, d), torch.randn(1, d, generator=make)])
    ids = torch.ones(len(probes), 1, dtype=torch.long)
    write = Edit(entry, patch(probes[:, None].to(model.device, model.dtype)))
    run = model.run(ids, record=[reader], edits=[write])
    found = run[reader].flatten(1).double().cpu()
    matrix = found[:d] - found[d]
    gap = (probes[-1].double() @ matrix - (found[d + 1] - found[d])).norm() / found[d + 1].norm()
    limit = _LINEAR if model.dtype in (torch.float32, torch.float64) else 30 * _LINEAR
    if float(gap) > limit:
        raise NotOffered(
            f"{reader} does not read the stream linearly",
            given=f"a random input is {float(gap):.1%} away from the linear map",
            why="a norm stands between the projection and this site",
            do="name other readers, e.g. v.L.H or mlp_pre.L",
        )
    return matrix
