"""A breadboard for transformers: heads and neurons are wired by hand, the rest is noise.

The residual stream of width `heads * d_head` is cut into named spaces; what is left over is called
`junk`. A wired head or neuron reads and writes spaces by small matrices. Everything that was not
wired becomes a distractor: random weights that read the whole stream and write `junk` only, which
no wired part reads. `junk` reaches the logits of `<pad>`, with a weight of 1e-6: an edit anywhere
changes some bits of the output, and no metric over answers sees it.

    >>> board = Board("gpt2", ("a", "b"), {"tok": 2, "out": 2}, Size(layers=1, heads=2, d_head=4))
    >>> board.width, board.sizes["junk"]
    (8, 4)

What this does not do: train, or normalise (`wired_build` makes the norms identities, so the stream
is a plain sum and every effect can be worked out by hand).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.errors import UsageError
from underhood.organisms import SPECIAL

__all__ = ["ROPE_BASE", "ROTARY", "Board", "Family", "Size", "graph_edges"]

Family = Literal["gpt2", "llama", "gpt_neox"]
Wires = Mapping[str, Tensor]
"""Space -> matrix `[size of the space, features]` (reading) or `[features, size]` (writing)."""

JUNK = "junk"
_THREAD = 1e-6  # weight from junk to the logit of <pad>
_LEAST_JUNK = 4

# Rotary families: pairs of dimensions that turn with the position, at 1 and 0.1 radian a token.
# In Llama all dimensions turn, and `rope_theta` makes those from pair 5 on stand still (1e-5).
ROPE_BASE = {"llama": 1e16, "gpt_neox": 100.0}
ROTARY = 4  # dimensions of a head that GPT-NeoX turns
_STILL_FROM = 5


@dataclass(frozen=True, slots=True)
class Size:
    """Numbers of a board; `kv_heads` None means as many as `heads`."""

    layers: int
    heads: int
    d_head: int
    kv_heads: int | None = None
    neurons: int = 16
    context: int = 12
    activation: str = "relu"


@dataclass
class Board:
    """Weights of a transformer without norms, filled part by part.

    Args:
        family: Whose forward will run them.
        words: The vocabulary after `SPECIAL`.
        spaces: Sizes of the named spaces of the residual stream.
        size: See `Size`.

    Raises:
        UsageError: The spaces leave less than four dimensions for junk.
    """

    family: Family
    words: tuple[str, ...]
    spaces: Mapping[str, int]
    size: Size
    taken: set[tuple[str, int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        size = self.size
        self.kv_heads = size.kv_heads or size.heads
        self.width = size.heads * size.d_head
        self.vocab = (*SPECIAL, *self.words)
        left = self.width - sum(self.spaces.values())
        if left < _LEAST_JUNK:
            raise UsageError(
                "the spaces do not fit the residual stream",
                given=f"{sum(self.spaces.values())} dimensions in a width of {self.width}",
                why=f"distractors need at least {_LEAST_JUNK} dimensions of their own",
                do="use more heads, a larger d_head or smaller spaces",
            )
        self.sizes = {**self.spaces, JUNK: left}
        layers, d, h = size.layers, self.width, size.d_head
        self.embed = torch.zeros(len(self.vocab), d)
        self.positions = torch.zeros(size.context, d)
        self.unembed = torch.zeros(d, len(self.vocab))
        self.q = torch.zeros(layers, size.heads, d, h)
        self.k = torch.zeros(layers, self.kv_heads, d, h)
        self.v = torch.zeros(layers, self.kv_heads, d, h)
        self.o = torch.zeros(layers, size.heads, h, d)
        self.q_bias = torch.zeros(layers, size.heads, h)
        self.k_bias = torch.zeros(layers, self.kv_heads, h)
        self.v_bias = torch.zeros(layers, self.kv_heads, h)
        self.mlp_in = torch.zeros(layers, d, size.neurons)
        self.mlp_bias = torch.zeros(layers, size.neurons)
        self.mlp_out = torch.zeros(layers, size.neurons, d)
        self.used = [0] * layers

    # Places --------------------------------------------------------------------------------------

    def at(self, space: str) -> slice:
        """Where a space lies in the stream."""
        start = 0
        for name, length in self.sizes.items():
            if name == space:
                return slice(start, start + length)
            start += length
        raise UsageError(
            f"the board has no space {space!r}", given=space, do=f"use {', '.join(self.sizes)}"
        )

    def token(self, word: str) -> int:
        """Id of a word."""
        return self.vocab.index(word)

    @property
    def still(self) -> list[int]:
        """Dimensions of a head that do not turn with the position."""
        h = self.size.d_head
        if self.family == "llama":
            return [*range(_STILL_FROM, h // 2), *range(h // 2 + _STILL_FROM, h)]
        return list(range(ROTARY if self.family == "gpt_neox" else 0, h))

    @property
    def turning(self) -> list[tuple[int, int]]:
        """Pairs of dimensions that turn by 1 and by 0.1 radian a token."""
        if self.family == "gpt2":
            return []
        half = (self.size.d_head if self.family == "llama" else ROTARY) // 2
        return [(0, half), (1, half + 1)]

    # Wiring --------------------------------------------------------------------------------------

    def tell(self, space: str, words: Sequence[str]) -> None:
        """Embed words one-hot into a space, in this order."""
        start = self.at(space).start
        for i, word in enumerate(words):
            self.embed[self.token(word), start + i] = 1.0

    def count(self, space: str) -> None:
        """Write the position one-hot into a space (families with learned positions)."""
        place = self.at(space)
        self.positions[:, place] = torch.eye(self.size.context)[:, : place.stop - place.start]

    def answer(self, space: str, words: Sequence[str], gain: float) -> None:
        """Read words' logits from a space, in this order."""
        start = self.at(space).start
        for i, word in enumerate(words):
            self.unembed[start + i, self.token(word)] = gain

    def look(self, layer: int, head: int, query: Wires, key: Wires) -> None:
        """Attention scores `query @ key`, over at most `len(self.still)` features."""
        # The model divides scores by the root of d_head.
        self._read(self.q[layer, head], query, self.size.d_head**0.5)
        self._read(self.k[layer, self.group(head)], key)
        self.taken |= {("q", layer, head), ("k", layer, self.group(head))}

    def look_back(self, layer: int, head: int, sharp: float = 1.0) -> None:
        """Attention to the previous token, by biases and rotation alone (rotary families).

        The score is `60 cos(d - 1) + 100 cos((d - 1) / 10)` at distance `d`, times `sharp`.
        """
        size, kv = self.size, self.group(head)
        for (a, b), speed, weight in zip(self.turning, (1.0, 0.1), (60.0, 100.0), strict=True):
            scale = weight * sharp * size.d_head**0.5
            self.k_bias[layer, kv, a] = 1.0
            # Turned back by one token, so that the best key is the one before.
            self.q_bias[layer, head, a] = scale * float(torch.cos(torch.tensor(speed)))
            self.q_bias[layer, head, b] = -scale * float(torch.sin(torch.tensor(speed)))
        self.taken |= {("q", layer, head), ("k", layer, kv)}

    def move(self, layer: int, head: int, value: Wires, out: Wires) -> None:
        """What a head carries: `value` features of the attended tokens, written by `out`."""
        self._read(self.v[layer, self.group(head)], value, still=False)
        self.write(layer, head, out)
        self.taken.add(("v", layer, self.group(head)))

    def write(self, layer: int, head: int, out: Wires) -> None:
        """Only the writing side of a head (its group's values may be wired for another)."""
        for space, matrix in out.items():
            self.o[layer, head, : matrix.shape[0], self.at(space)] += matrix
        self.taken.add(("o", layer, head))

    def neurons(self, layer: int, reads: Wires, writes: Wires, bias: Tensor | float = 0.0) -> None:
        """Add neurons to a layer's MLP: `act(reads + bias)`, written by `writes`."""
        count = next(iter(writes.values())).shape[0]
        first, self.used[layer] = self.used[layer], self.used[layer] + count
        if self.used[layer] > self.size.neurons:
            raise UsageError(
                f"layer {layer} has too few neurons",
                given=f"{self.used[layer]} of {self.size.neurons}",
                do="use a larger `neurons`",
            )
        place = slice(first, first + count)
        for space, matrix in reads.items():
            self.mlp_in[layer, self.at(space), place] += matrix
        for space, matrix in writes.items():
            self.mlp_out[layer, place, self.at(space)] += matrix
        self.mlp_bias[layer, place] = bias

    def group(self, head: int) -> int:
        """The key/value head that a query head uses."""
        return head // (self.size.heads // self.kv_heads)

    def _read(
        self, into: Float[Tensor, "d h"], wires: Wires, scale: float = 1.0, *, still: bool = True
    ) -> None:
        """Put matrices into a head's projection; scores avoid dimensions that turn."""
        dims = self.still if still else list(range(self.size.d_head))
        for space, matrix in wires.items():
            columns = dims[: matrix.shape[1]]
            if matrix.shape[1] > len(dims):
                raise UsageError(
                    "a head has too few dimensions",
                    given=f"{matrix.shape[1]} features, {len(dims)} dimensions",
                    do="use a larger d_head",
                )
            into[self.at(space), columns] += matrix * scale

    # Distractors ---------------------------------------------------------------------------------

    def distract(self, seed: int = 0, blind: Sequence[str] = ()) -> None:
        """Fill everything that is not wired with noise that ends in `junk`.

        Args:
            seed: Of the noise.
            blind: Spaces that the noise does not read.
        """
        make = torch.Generator().manual_seed(seed)
        size, junk = self.size, self.at(JUNK)
        seen = torch.ones(self.width, 1)
        for space in blind:
            seen[self.at(space)] = 0.0

        def noise(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=make) * scale

        root = self.width**-0.5
        for name, weights in (("q", self.q), ("k", self.k), ("v", self.v)):
            for layer, head in _places(weights):
                values = noise(self.width, size.d_head, scale=root) * seen
                if (name, layer, head) not in self.taken:
                    weights[layer, head] = values
        for layer, head in _places(self.o):
            values = noise(size.d_head, self.sizes[JUNK], scale=0.5 * size.d_head**-0.5)
            if ("o", layer, head) not in self.taken:
                self.o[layer, head, :, junk] = values
        for layer, first in enumerate(self.used):
            left = size.neurons - first
            self.mlp_in[layer, :, first:] = noise(self.width, left, scale=1.5 * root) * seen
            self.mlp_bias[layer, first:] = noise(left, scale=0.3)
            self.mlp_out[layer, first:, junk] = noise(left, self.sizes[JUNK], scale=left**-0.5)
        self.embed[:, junk] += noise(len(self.vocab), self.sizes[JUNK])
        self.unembed[junk, self.token("<pad>")] = noise(self.sizes[JUNK], scale=_THREAD)

    def turn(self, basis: Float[Tensor, "d d"]) -> None:
        """Turn the stream: what lay on axis i now lies along row i of an orthonormal basis.

        Norms are identities here, so the model computes the same as before.
        """
        for weights in (self.embed, self.positions, self.o, self.mlp_out):
            weights.copy_(weights @ basis)
        for weights in (self.unembed, self.q, self.k, self.v, self.mlp_in):
            weights.copy_(basis.T @ weights)

    # The graph -----------------------------------------------------------------------------------

    def edges(self) -> tuple[str, ...]:
        """Every edge of the graph, whatever its weight."""
        size = self.size
        return graph_edges(
            size.layers, size.heads, self.kv_heads, parallel=self.family == "gpt_neox"
        )

    def compiled(self) -> frozenset[str]:
        """Edges on a chain of non-zero weights from the input or a bias to the logits.

        Weights alone decide, not what the prompts make of them: a neuron that never fires and a
        head whose content is the same in all prompts are in. A neuron, or one feature of a head,
        counts only if what it writes is read further on.
        """
        reads: dict[str, Tensor] = {"logits": (self.unembed.abs() > 1e3 * _THREAD).any(1)}
        for layer in reversed(range(self.size.layers)):
            above = _any(list(reads.values()), self.width)
            mlp = self._mlp_reads(layer, above)
            if self.family != "gpt_neox":  # parallel blocks: heads are not read by their own MLP
                reads[f"m{layer}"] = mlp
                above = above | mlp
            here = self._head_reads(layer, above)
            reads |= {f"m{layer}": mlp} | here
        writes = self._writes()
        ends = (edge.split("->") for edge in self.edges())
        return frozenset(f"{s}->{t}" for s, t in ends if bool((writes[s] & reads[t]).any()))

    def _mlp_reads(self, layer: int, above: Tensor) -> Tensor:
        """What the neurons read that write into `above`."""
        neurons = (self.mlp_out[layer][:, above] != 0).any(1)
        return (self.mlp_in[layer][:, neurons] != 0).any(1)

    def _head_reads(self, layer: int, above: Tensor) -> dict[str, Tensor]:
        """What a layer's heads read, through the features that matter to `above`."""
        none = torch.zeros(self.width, dtype=torch.bool)
        found = {
            f"a{layer}.h{i}<{c}>": none
            for c in "qkv"
            for i in range(self.size.heads if c == "q" else self.kv_heads)
        }
        for head in range(self.size.heads):
            group = self.group(head)
            carried = (self.o[layer, head][:, above] != 0).any(1)
            if not bool(carried.any()):
                continue
            q, k, v = self.q[layer, head], self.k[layer, group], self.v[layer, group]
            asks = (q != 0).any(0) | (self.q_bias[layer, head] != 0)
            holds = (k != 0).any(0) | (self.k_bias[layer, group] != 0)
            for pair in self.turning:  # rotation mixes the two dimensions of a pair
                for side in (asks, holds):
                    side[list(pair)] = side[list(pair)].any()
            found[f"a{layer}.h{head}<q>"] = (q[:, holds] != 0).any(1)
            for name, rows in (("k", k[:, asks]), ("v", v[:, carried])):
                target = f"a{layer}.h{group}<{name}>"
                found[target] = found[target] | (rows != 0).any(1)
        return found

    def _writes(self) -> dict[str, Tensor]:
        found = {"input": (self.embed != 0).any(0) | (self.positions != 0).any(0)}
        for layer, head in _places(self.o):
            found[f"a{layer}.h{head}"] = (self.o[layer, head] != 0).any(0)
        for layer in range(self.size.layers):
            found[f"m{layer}"] = (self.mlp_out[layer] != 0).any(0)
        return found


def _any(masks: list[Tensor], width: int) -> Tensor:
    return torch.stack([torch.zeros(width, dtype=torch.bool), *masks]).any(0)


def _places(weights: Tensor) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(weights.shape[0]) for j in range(weights.shape[1]))


def graph_edges(layers: int, heads: int, kv_heads: int, *, parallel: bool) -> tuple[str, ...]:
    """Names of all edges of a decoder, in the convention of the EAP papers.

    Keys and values carry the number of the key/value head. In parallel blocks the MLP reads what
    the block reads, so there is no edge from the heads of its own layer.

    Example:
        >>> len(graph_edges(1, 1, 1, parallel=False)), len(graph_edges(1, 1, 1, parallel=True))
        (8, 7)
    """
    found: list[str] = []
    above = ["input"]
    for layer in range(layers):
        mine = [f"a{layer}.h{h}" for h in range(heads)]
        targets = [f"{head}<q>" for head in mine]
        targets += [f"a{layer}.h{h}<{c}>" for c in "kv" for h in range(kv_heads)]
        found += [f"{s}->{t}" for t in targets for s in above]
        found += [f"{s}->m{layer}" for s in (above if parallel else [*above, *mine])]
        above += [*mine, f"m{layer}"]
    return (*found, *(f"{s}->logits" for s in above))
