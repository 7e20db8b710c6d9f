"""Anatomy: where a given model keeps what the site names mean.

For each block a `Point` per site, and what its attention, experts and scan are: data, which
`core.discovery` finds and `core.check` proves on the running model.
"""

from dataclasses import dataclass, field, replace

__all__ = ["SUMS", "Anatomy", "Attention", "Block", "Experts", "Point", "Scan", "Stack"]

# What is claimed of a block only where all that its forward does with the stream is known.
SUMS = ("resid_mid", "attn_out", "cross_attn_out", "mlp_out")


@dataclass(frozen=True, slots=True)
class Point:
    """One place in the module tree: `site = scale * module.(input|output)[chunk of chunks] + plus`.

    `plus` is another module's output, one that has run before in the same block: two parts that
    read the same input and are added up (a shared MLP beside experts, a scan beside attention).
    """

    path: str
    side: str = "out"
    scale: float = 1.0
    chunk: tuple[int, int] | None = None
    plus: "Point | None" = None

    def under(self, path: str) -> "Point":
        """The same place, seen from a module that has this one at `path`."""
        plus = self.plus.under(path) if self.plus else None
        return replace(self, path=f"{path}.{self.path}".strip("."), plus=plus)


@dataclass(frozen=True, slots=True)
class Attention:
    """A softmax attention.

    Attributes:
        core: Path of the module that calls the attention function.
        o_proj: Path of the output projection.
        heads: Query heads (from the config; None when it does not say).
        kv_heads: Key/value heads.
        interface: Whether the core calls transformers' attention interface.
        late_norm: Whether queries and keys are normalised after their rotation.
        rotary: Names of the module-level functions that rotate q and k.
        projections: Paths of separate q, k and v projections (and of q and k norms).
    """

    core: str
    o_proj: str | None
    heads: int | None
    kv_heads: int | None
    interface: bool
    rotary: tuple[str, ...] = ()
    projections: dict[str, str] = field(default_factory=dict)
    late_norm: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: paths of its router and of its batched experts."""

    router: str | None
    experts: str | None
    count: int


@dataclass(frozen=True, slots=True)
class Scan:
    """A state-space mixer: its path and the module-level functions that scan."""

    path: str
    scan: str
    step: str | None


@dataclass(frozen=True, slots=True)
class Block:
    """One block.

    Attributes:
        path: Where it is.
        points: A `Point` for each site found by structure.
        attention, cross, experts, scan: Its parts that need more than a point.
        parallel: Attention and MLP read the same input.
        mid_is_shared: `resid_mid` is an input that the skip connection does not pass through.
        norm_first: Sub-layers read a norm's output (pre-norm).
        post_norms: For post-norm blocks, `(site that is added, norm of the sum)` in order.
        unknown: What its forward uses and nobody knows: what its parts add is not claimed.
        odd_attention: It has an attention, of a kind that the sites cannot describe.
    """

    path: str
    points: dict[str, Point]
    attention: Attention | None = None
    cross: Attention | None = None
    experts: Experts | None = None
    scan: Scan | None = None
    parallel: bool = False
    mid_is_shared: bool = True
    norm_first: bool = True
    post_norms: tuple[tuple[str, str], ...] = ()
    unknown: tuple[str, ...] = ()
    odd_attention: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """One tower of blocks.

    Attributes:
        name: Prefix of its sites ("" for the main one).
        root: Path of the module that owns the tower.
        blocks: Its blocks in order.
        points: Points without a layer (`embed`, `pos_embed`, `ln_final`).
    """

    name: str
    root: str
    blocks: tuple[Block, ...]
    points: dict[str, Point]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """All stacks of a model, and the path of its unembedding."""

    stacks: dict[str, Stack]
    head: str | None

    @property
    def main(self) -> Stack | None:
        """The stack whose sites have no prefix, if there is one."""
        return self.stacks.get("")
