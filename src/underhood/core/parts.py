"""Who writes to the residual stream, and who reads it: the ends of every edge.

A *writer* is what one part adds to the stream: the embedding, an attention head, a mixer of another
kind, an MLP. A *reader* is what one part takes from it: the queries, keys or values of a head (one
each per key/value head), a mixer, an MLP, the logits. Both are found from the anatomy and say
where they can be tapped; nothing is run here but norms on probes.

A head's q, k and v read the stream through a norm and their columns of a projection. `Reader` keeps
these, so that a head can be given a stream of its own without copying weights:

    q_h = norm(stream_h) @ W[:, columns_h] + b[columns_h]
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.core.anatomy import NAMES, Attention, Block
from underhood.core.errors import NotOffered
from underhood.core.head import NormForm, norm_form
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.taps.modules import weight_in_out

__all__ = ["Reader", "Writer", "readers", "writers"]

# How a fused projection's columns lie: all queries, keys, values one after the other, or head by
# head. `core.check` compares them with the values that the attention really uses.
FUSED = {"c_attn": "sections", "qkv_proj": "sections", "query_key_value": "heads"}


@dataclass(frozen=True, slots=True)
class Writer:
    """What one part adds to the stream.

    Attributes:
        kind: "input", "heads", "mixer" or "mlp".
        layer: Its block (-1 for the input).
        site: Where it is read: what is added, or for heads the input of the output projection.
        heads: Number of heads (1 for whatever has none).
        o_proj: For heads, the path of the output projection.
        norm: For heads, path and form of a norm between them and the stream, if there is one.
        scale: For heads, what the block multiplies their sum by.
    """

    kind: str
    layer: int
    site: Site
    heads: int = 1
    o_proj: str = ""
    norm: tuple[str, NormForm] | None = None
    scale: float = 1.0

    def weight(self, model: Model) -> Float[Tensor, "head d_head d_model"]:
        """The output projection, head by head, scale included."""
        weight = weight_in_out(model.module.get_submodule(self.o_proj)).detach()
        weight = weight.unflatten(0, (self.heads, -1))
        return weight * self.scale if self.scale != 1.0 else weight


@dataclass(frozen=True, slots=True)
class Reader:
    """What one part takes from the stream.

    Attributes:
        kind: "q", "k", "v", "mixer", "mlp" or "logits".
        layer: Its block (the number of blocks for the logits).
        tap: `module_in:` site where the stream (or what `norm` made of it) passes.
        norm: Path of the norm between stream and part ("" where there is none).
        inside: Whether `tap` comes after the norm.
        heads: Number of heads (1 for whatever has none).
        module: For q, k and v, the path of the projection.
        columns: For q, k and v, the projection's columns, head by head.
    """

    kind: str
    layer: int
    tap: Site
    norm: str = ""
    inside: bool = False
    heads: int = 1
    module: str = ""
    columns: tuple[tuple[int, ...], ...] = ()

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
        """For q, k and v: weight `[head, d_model, d_head]` and bias `[head, d_head]`."""
        module = model.module.get_submodule(self.module)
        index = torch.tensor(self.columns, device=model.device)
        weight = weight_in_out(module).detach()[:, index].permute(1, 0, 2)
        bias = getattr(module, "bias", None)
        return weight, bias.detach()[index] if isinstance(bias, Tensor) else None


def writers(model: Model) -> list[Writer]:
    """Everything that adds to the main stream, in order.

    Raises:
        NotOffered: The stream is not a sum of what its parts write.
    """
    stack = _stack(model)
    found = [Writer("input", -1, Site("resid_pre", 0, stack=model.main))]
    for number, block in enumerate(stack):
        found += _block_writers(model, number, block)
    return found


def _stack(model: Model) -> tuple[Block, ...]:
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
    return stack.blocks


def _block_writers(model: Model, number: int, block: Block) -> list[Writer]:
    found: list[Writer] = []
    site = Site("attn_out", number, stack=model.main)
    if model.offers(site):
        found.append(_heads(model, number, block) or Writer("mixer", number, site))
    site = Site("mlp_out", number, stack=model.main)
    if model.offers(site):
        found.append(Writer("mlp", number, site))
    return found


def _heads(model: Model, number: int, block: Block) -> Writer | None:
    """The heads of a block, or None when what they write is not a sum over them."""
    spec = block.attention
    if spec is None or spec.o_proj is None or spec.heads is None:
        return None
    outer = block.points["attn_out"]
    norm = None
    if not f"{spec.o_proj}.".startswith(f"{outer.path}."):
        module = model.module.get_submodule(outer.path)
        if "norm" not in type(module).__name__.lower():
            return None  # Zamba 2: the attention writes into the mixer, not into the stream
        width = weight_in_out(model.module.get_submodule(spec.o_proj)).shape[1]
        norm = outer.path, norm_form(module, width)
    site = Site("module_in", path=spec.o_proj)
    return Writer("heads", number, site, spec.heads, spec.o_proj, norm, outer.scale)


def readers(model: Model) -> list[Reader]:
    """Everything that reads the main stream, in order; the logits come last.

    Raises:
        NotOffered: The stream is not a sum of what its parts write.
    """
    blocks = _stack(model)
    found: list[Reader] = []
    for number, block in enumerate(blocks):
        found += _block_readers(model, number, block)
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
        split = _projections(model, spec) if spec else None
        if split is None:
            found.append(Reader("mixer", number, *_alone(tap, first, block, outer)))
        for kind, (path, columns) in (split or {}).items():
            found.append(Reader(kind, number, tap, first, False, len(columns), path, columns))
    if "mlp_out" in block.points:
        second = next(
            (p for n in NAMES["ln2"] if (p := f"{block.path}.{n}") in modules), ""
        ) if block.norm_first else ""  # fmt: skip
        second = block.points["ln2"].path if "ln2" in block.points else second
        if second and second != first:
            found.append(Reader("mlp", number, Site("module_in", path=second), second))
        else:
            inner = Site("module_in", path=_mlp(block, modules))
            found.append(Reader("mlp", number, inner, first, bool(first)))
    return found


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


def _projections(
    model: Model, spec: Attention
) -> dict[str, tuple[str, tuple[tuple[int, ...], ...]]] | None:
    """Paths and columns of a head's q, k and v; None when they are not known."""
    if spec.heads is None:
        return None
    kv = spec.kv_heads or spec.heads
    counts = {"q": spec.heads, "k": kv, "v": kv}
    if all(f"{letter}_proj" in spec.projections for letter in "qkv"):
        found = {}
        for letter, heads in counts.items():
            path = spec.projections[f"{letter}_proj"]
            width = weight_in_out(model.module.get_submodule(path)).shape[1]
            if width % heads:
                return None
            found[letter] = path, _rows(torch.arange(width), heads)
        return found
    for name, layout in FUSED.items():
        path = f"{spec.core}.{name}"
        try:
            module = model.module.get_submodule(path)
        except AttributeError:
            continue
        return (
            _fused(path, weight_in_out(module).shape[1], counts, layout) if spec.interface else None
        )
    return None


def _fused(
    path: str, width: int, counts: dict[str, int], layout: str
) -> dict[str, tuple[str, tuple[tuple[int, ...], ...]]] | None:
    """Columns of a fused projection."""
    total = sum(counts.values())
    if width % total or (layout == "heads" and counts["q"] != counts["k"]):
        return None
    columns = torch.arange(width)
    if layout == "heads":
        parts = columns.view(counts["q"], 3, -1).unbind(1)
    else:
        size = width // total
        parts = columns.split([n * size for n in counts.values()])
    return {
        letter: (path, _rows(part.flatten(), counts[letter]))
        for letter, part in zip("qkv", parts, strict=True)
    }


def _rows(columns: Tensor, heads: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in columns.view(heads, -1).tolist())
