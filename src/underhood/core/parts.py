"""Who writes to the residual stream, and who reads it: the ends of every edge.

A *writer* is what one part adds to the stream: the embedding, an attention head, a mixer of another
kind, an MLP. A *reader* is what one part takes from it: the queries, keys or values of a head (one
each per key/value head), a mixer, an MLP, the logits. Both are found from the anatomy and say
where they can be tapped; nothing is run here but norms on probes.

A head's q, k and v read the stream through a norm and their columns of a projection. `Reader` keeps
these, so that a head can be given a stream of its own without copying weights:

    q_h = norm(stream_h) @ W[:, columns_h] + b[columns_h]

A mixture of experts is one MLP, or, if asked for, its parts: as writers each routed expert (its
weight in, nothing where a token is not routed to it) and the rest (shared experts); as readers the
experts and, by itself, the router that chooses among them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from underhood.core.anatomy import Block
from underhood.core.columns import columns_of
from underhood.core.errors import NotOffered
from underhood.core.families import NAMES
from underhood.core.head import NormForm, norm_form
from underhood.core.model import Model
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.taps.experts import router_logits
from underhood.core.taps.modules import weight_in_out

__all__ = ["Reader", "Writer", "norm_after_heads", "readers", "writers"]


@dataclass(frozen=True, slots=True)
class Writer:
    """What one part adds to the stream.

    Attributes:
        kind: "input", "heads", "mixer", "mlp" or "experts".
        layer: Its block (-1 for the input).
        site: Where it is read: what is added, or for heads the input of the output projection.
        heads: Number of heads or experts (1 for whatever has none), the rest counted as one.
        o_proj: For heads, the path of the output projection.
        norm: For heads, path and form of a norm between them and the stream, if there is one.
        scale: For heads and experts, what the block multiplies their sum by.
        rest: For experts, whether the MLP adds something else too.
        slots: For experts, the sites of what each slot adds and of the expert in it; `site` is
            their sum.
    """

    kind: str
    layer: int
    site: Site
    heads: int = 1
    o_proj: str = ""
    norm: tuple[str, NormForm] | None = None
    scale: float = 1.0
    rest: bool = False
    slots: tuple[Site, Site] | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """What must be recorded to know what it writes."""
        return (self.site, *(self.slots or ()))

    def written(self, run: Run) -> Float[Tensor, "batch pos written"]:
        """What it writes in a run: `[batch, pos, d_model]`, for experts `[.., source*d_model]`."""
        if self.slots is None:
            return run[self.site]
        out, index = self.slots
        return self.spread(run[out], run[index], run[self.site])

    def spread(
        self,
        out: Float[Tensor, "batch pos slot d_model"],
        index: Int[Tensor, "batch pos slot"],
        whole: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos written"]:
        """What each expert adds, one after the other, and the rest of what the MLP adds.

        Args:
            out: What each slot adds.
            index: Which expert is in it; one that is out of range adds nothing.
            whole: What the MLP adds in all.
        """
        experts = self.heads - self.rest
        if self.scale != 1.0:
            out = out * self.scale
        index = torch.where((index >= 0) & (index < experts), index, experts)
        each = out.new_zeros(*out.shape[:-2], experts + 1, out.shape[-1])
        each = each.scatter_add(-2, index[..., None].expand_as(out), out)[..., :experts, :]
        if self.rest:
            each = torch.cat([each, (whole - each.sum(-2))[..., None, :]], -2)
        return each.flatten(-2)

    def weight(self, model: Model) -> Float[Tensor, "head d_head d_model"]:
        """The output projection, head by head, scale included."""
        weight = weight_in_out(model.module.get_submodule(self.o_proj)).detach()
        weight = weight.unflatten(0, (self.heads, -1))
        return weight * self.scale if self.scale != 1.0 else weight


@dataclass(frozen=True, slots=True)
class Reader:
    """What one part takes from the stream.

    Attributes:
        kind: "q", "k", "v", "mixer", "mlp", "router" or "logits".
        layer: Its block (the number of blocks for the logits).
        tap: `module_in:` site where the stream (or what `norm` made of it) passes.
        norm: Path of the norm between stream and part ("" where there is none).
        inside: Whether `tap` comes after the norm.
        heads: Number of heads (1 for whatever has none).
        module: For q, k and v, the path of the projection.
        columns: For q, k and v, the projection's columns, head by head.
        beside: For a router, the tap of the experts: its own input is made from theirs.
        choice: For a router and its experts, the site of the router's logits.
        experts: For a router, how many experts it chooses from.
    """

    kind: str
    layer: int
    tap: Site
    norm: str = ""
    inside: bool = False
    heads: int = 1
    module: str = ""
    columns: tuple[tuple[int, ...], ...] = ()
    beside: Site | None = None
    choice: Site | None = None
    experts: int = 0

    def logits(self, model: Model, normed: Tensor) -> Float[Tensor, "batch pos expert"]:
        """A router's logits for an input of its own, past any hooks."""
        router = model.module.get_submodule(self.tap.path)
        found = router_logits(router, self.experts, normed.flatten(0, 1))
        return found.view(*normed.shape[:2], -1)

    def normed(self, model: Model, stream: Tensor) -> Tensor:
        """A stream through the part's norm, past any hooks."""
        return model.module.get_submodule(self.norm).forward(stream) if self.norm else stream

    def form(self, model: Model, width: int) -> NormForm | None:
        """The norm's linear form; None where there is no norm, or one that does nothing.

        Raises:
            NotOffered: The norm has no such form.
        """
        if not self.norm:
            return None
        module = model.module.get_submodule(self.norm)
        return None if isinstance(module, nn.Identity) else norm_form(module, width)

    def weight(self, model: Model) -> tuple[Tensor, Tensor | None]:
        """For q, k and v: weight `[head, d_model, d_head]` and bias `[head, d_head]`.

        The weight is no copy where the columns lie side by side.
        """
        module = model.module.get_submodule(self.module)
        index = torch.tensor(self.columns, device=model.device)
        first, weight = int(index[0, 0]), weight_in_out(module).detach()
        if torch.equal(index.flatten(), torch.arange(index.numel(), device=index.device) + first):
            weight = weight[:, first : first + index.numel()].unflatten(1, index.shape)
        else:
            weight = weight[:, index]
        weight = weight.permute(1, 0, 2)
        bias = getattr(module, "bias", None)
        return weight, bias.detach()[index] if isinstance(bias, Tensor) else None


def writers(model: Model, *, experts: bool = False) -> list[Writer]:
    """Everything that adds to the main stream, in order.

    Args:
        model: The model.
        experts: Take mixtures apart.

    Raises:
        NotOffered: The stream is not a sum of what its parts write, or (with `experts`) there are
            no mixtures, or such that cannot be taken apart.
    """
    stack = _stack(model, experts=experts)
    found = [Writer("input", -1, Site("resid_pre", 0, stack=model.main))]
    for number, block in enumerate(stack):
        found += _block_writers(model, number, block, experts=experts)
    return found


def _stack(model: Model, *, experts: bool) -> tuple[Block, ...]:
    stack = model.anatomy.stacks.get(model.main)
    if stack is None or len(model.anatomy.stacks) > 1:
        raise NotOffered(
            "edges are defined for models with one stack of blocks",
            given=repr(model),
            why="it has no recognisable blocks"
            if stack is None
            else f"it has {len(model.anatomy.stacks)}, and cross-attention is no edge of one graph",
            do="use activation_patching or attribution_patching, which work on single nodes",
        )
    if any(block.post_norms for block in stack.blocks):
        raise NotOffered(
            "edges are not defined in this model",
            given=repr(model),
            why="its blocks normalise the stream itself (post-norm), so that it is not a sum of"
            " what its parts write",
            do="use activation_patching or attribution_patching, which work on single nodes",
        )
    if unknown := next((block.unknown for block in stack.blocks if block.unknown), ()):
        raise NotOffered(
            "edges are not defined in this model",
            given=repr(model),
            why="its blocks also use what the anatomy does not know: " + ", ".join(unknown),
            do="use activation_patching or attribution_patching, which work on single nodes",
        )
    if experts and not any(block.experts for block in stack.blocks):
        raise NotOffered(
            "there are no experts in this model",
            given=repr(model),
            why="its MLPs are dense, or mixtures of a kind that is not recognised",
            do="use experts=False",
        )
    return stack.blocks


def _block_writers(model: Model, number: int, block: Block, *, experts: bool) -> list[Writer]:
    found: list[Writer] = []
    site = Site("attn_out", number, stack=model.main)
    if model.offers(site):
        found.append(_heads(model, number, block) or Writer("mixer", number, site))
    site = Site("mlp_out", number, stack=model.main)
    if model.offers(site):
        split = experts and block.experts is not None
        found.append(_mixture(model, number, block) if split else Writer("mlp", number, site))
    return found


def _mixture(model: Model, number: int, block: Block) -> Writer:
    """The experts of a block.

    Raises:
        NotOffered: They cannot be taken apart, or what they add enters the stream otherwise.
    """
    modules = dict(model.module.named_modules())
    spec, point, mlp = block.experts, block.points["mlp_out"], _mlp(block, modules)
    why = None
    if spec is None or spec.experts is None or spec.router is None or not spec.count:
        why = "its router, or its experts one by one, cannot be tapped"
    elif point.path != mlp or point.plus is not None:
        why = "a norm of their sum, or another module, stands between the experts and the stream"
    elif not all(path.startswith(f"{mlp}.") for path in (spec.router, spec.experts)):
        why = "its router is no part of the MLP, and may read something else"
    elif not _mlp_norm(block, modules):
        why = "the norm between the stream and the experts is not known"
    if spec is None or why:
        raise NotOffered(
            f"the mixture in layer {number} cannot be taken apart into edges",
            given=repr(model),
            why=why or "it is no mixture",
            do="use experts=False: the mixture is then one node",
        )
    inner = tuple(
        f"{path.removeprefix(f'{mlp}.')}." for path in (spec.router, spec.experts) if path
    )
    rest = any(not name.startswith(inner) for name, _ in modules[mlp].named_parameters())
    whole, *slots = (Site(n, number, stack=model.main)
                     for n in ("mlp_out", "expert_out", "router_index"))  # fmt: skip
    return Writer("experts", number, whole, spec.count + rest, scale=point.scale, rest=rest,
                  slots=(slots[0], slots[1]))  # fmt: skip


def _heads(model: Model, number: int, block: Block) -> Writer | None:
    """The heads of a block, or None when what they write is not a sum over them."""
    spec = block.attention
    if spec is None or spec.o_proj is None or spec.heads is None:
        return None
    path = norm_after_heads(model, block)
    if path is None:
        return None
    norm = None
    if path:
        width = weight_in_out(model.module.get_submodule(spec.o_proj)).shape[1]
        norm = path, norm_form(model.module.get_submodule(path), width)
    site = Site("module_in", path=spec.o_proj)
    scale = block.points["attn_out"].scale
    return Writer("heads", number, site, spec.heads, spec.o_proj, norm, scale)


def norm_after_heads(model: Model, block: Block) -> str | None:
    """Path of the norm between a block's heads and the stream; "" where there is none.

    None: they do not write into the stream by themselves: into another sub-layer (Zamba 2), beside
    a scan (Falcon-H1), or through a norm and a factor (HyperCLOVA X).
    """
    spec, point = block.attention, block.points["attn_out"]
    path = point.path
    if point.plus is not None:
        return None  # a scan beside the heads is in the same sum: they are one mixer
    if spec is not None and f"{spec.o_proj}.".startswith(f"{path}."):
        return ""
    module = model.module.get_submodule(path)
    is_norm = "norm" in type(module).__name__.lower()
    return path if is_norm and point.scale == 1.0 else None


def readers(model: Model, *, experts: bool = False) -> list[Reader]:
    """Everything that reads the main stream, in order; the logits come last.

    Args:
        model: The model.
        experts: Let a mixture's router read by itself.

    Raises:
        NotOffered: The stream is not a sum of what its parts write, or (with `experts`) there are
            no mixtures.
    """
    blocks = _stack(model, experts=experts)
    found: list[Reader] = []
    for number, block in enumerate(blocks):
        found += _block_readers(model, number, block)
        if "mlp_out" in block.points:
            found += _mlp_readers(model, number, block, experts=experts)
    norm = model.anatomy.stacks[model.main].points.get("ln_final")
    path = norm.path if norm else model.anatomy.head
    if path is None:
        raise NotOffered(
            "this model has neither a final norm nor an unembedding",
            given=repr(model),
            why="the last reader of its stream cannot be tapped",
            do="use a model with a head",
        )
    tap = Site("module_in", path=path)
    found.append(Reader("logits", len(blocks), tap, norm.path if norm else ""))
    return found


def _block_readers(model: Model, number: int, block: Block) -> list[Reader]:
    modules = dict(model.module.named_modules())
    first = block.points["ln1"].path if "ln1" in block.points else ""
    found: list[Reader] = []
    if "attn_out" in block.points:
        spec = block.attention if _heads(model, number, block) else None
        outer = spec.core if spec else (block.scan.path if block.scan else "")
        outer = outer or _outer(block, modules)
        tap = Site("module_in", path=first or outer)
        split = columns_of(model, spec) if spec else None
        if split is None:
            found.append(Reader("mixer", number, *_alone(tap, first, block, outer)))
        for kind, (path, columns) in (split or {}).items():
            found.append(Reader(kind, number, tap, first, False, len(columns), path, columns))
    return found


def _mlp_readers(model: Model, number: int, block: Block, *, experts: bool) -> list[Reader]:
    modules = dict(model.module.named_modules())
    norm, spec = _mlp_norm(block, modules), block.experts
    first = block.points["ln1"].path if "ln1" in block.points else ""
    inner = Site("module_in", path=_mlp(block, modules))
    if experts and spec is not None and spec.router:
        choice = Site("router_logits", number, stack=model.main)
        tap = Site("module_in", path=spec.router)
        return [
            Reader("mlp", number, inner, norm, bool(norm), choice=choice),
            Reader("router", number, tap, norm, bool(norm), beside=inner, choice=choice,
                   experts=spec.count),
        ]  # fmt: skip
    if norm and norm != first:
        return [Reader("mlp", number, Site("module_in", path=norm), norm)]
    return [Reader("mlp", number, inner, norm, bool(norm))]


def _mlp_norm(block: Block, modules: dict[str, nn.Module]) -> str:
    """Path of the norm before the MLP, perhaps that of the attention; "" where there is none."""
    if "ln2" in block.points:
        return block.points["ln2"].path
    paths = [f"{block.path}.{n}" for n in NAMES["ln2"]] if block.norm_first else []
    second = next((p for p in paths if p in modules), "")
    return second or (block.points["ln1"].path if "ln1" in block.points else "")


def _alone(tap: Site, norm: str, block: Block, outer: str) -> tuple[Site, str, bool]:
    """Tap of a mixer that is read as a whole: before its norm, unless an MLP shares the norm."""
    if norm and block.parallel:
        return Site("module_in", path=outer), norm, True
    return tap, norm, False


def _outer(block: Block, modules: dict[str, nn.Module]) -> str:
    """Path of the block's mixer."""
    names = (*NAMES["mixer"], *NAMES["attn"])
    return next(p for n in names if (p := f"{block.path}.{n}") in modules)


def _mlp(block: Block, modules: dict[str, nn.Module]) -> str:
    """Path of the block's MLP."""
    paths = [f"{block.path}.{n}" for n in NAMES["mlp"]]
    return next((p for p in paths if p in modules), block.points["mlp_out"].path)
