"""The graph of a model: who writes to the stream, who reads it, and which pairs are edges.

Sources are `input`, the heads `a3.h5` and the MLPs `m3`; destinations are a head's queries, keys
and values `a3.h5<q>`, the MLPs `m3`, and `logits`. An edge reads `a1.h0->a3.h5<k>`. Keys and values
exist once per key/value head: in a model with grouped heads, `a3.h1<k>` is the second key/value
head. A mixer without heads is one node `a3`.

A mixture of experts is one node `m3`, or, with `experts=True`, its parts: sources `m3.e0`, `m3.e1`,
... (what each routed expert adds, its weight in; nothing where a token is not routed to it) and
`m3.s` (what else the MLP adds: shared experts; only where there are such); destinations `m3` (what
experts read) and `m3<router>` (what the router reads).

An edge leads from every writer to every later reader, because the stream is a sum and everything
reads the sum. In a parallel block the MLP does not read the heads of its own block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from underhood.core.errors import SiteNotFound, nearest
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.parts import Reader, Writer, readers, writers

__all__ = ["Graph"]

MLPS = ("mlp", "experts", "router")  # kinds of parts that stand at the MLP's place in a block


@dataclass(frozen=True, eq=False)
class Graph:
    """All nodes and edges of a model.

    Attributes:
        writers: What adds to the stream, in order; one entry may hold several heads.
        readers: What reads it, in order; the logits come last.
        parallel: For each block, whether its MLP reads what its attention reads.
        name: The model's name.

    Example:
        >>> import underhood as uh
        >>> graph = Graph.of(uh.load())
        >>> graph.sources[:3], graph.edge(0, 0)
        (('input', 'a0.h0', 'a0.h1'), 'input->a0.h0<q>')
    """

    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    parallel: tuple[bool, ...]
    name: str = ""

    @classmethod
    def of(cls, model: Model, *, experts: bool = False) -> "Graph":
        """The graph of a model.

        Args:
            model: The model.
            experts: Whether a mixture's experts are nodes of their own. A pass then keeps what
                each expert writes at each position, chosen or not.

        Raises:
            NotOffered: Its stream is not a sum of what its parts write, or (with `experts`) it has
                no mixtures, or such that cannot be taken apart.
        """
        # These refuse models without such a stack.
        reads, writes = readers(model, experts=experts), writers(model, experts=experts)
        blocks = model.anatomy.stacks[model.main].blocks
        parallel = tuple(block.parallel for block in blocks)
        return cls(tuple(writes), tuple(reads), parallel, model.name)

    # Nodes ---------------------------------------------------------------------------------------

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(name for w in self.writers for name in _source_names(w))

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names of the destinations."""
        return tuple(name for r in self.readers for name in _destination_names(r))

    def written(self, writer: int) -> range:
        """Numbers of the sources that a writer stands for."""
        start = sum(w.heads for w in self.writers[:writer])
        return range(start, start + self.writers[writer].heads)

    def read(self, reader: int) -> range:
        """Numbers of the destinations that a reader stands for."""
        start = sum(r.heads for r in self.readers[:reader])
        return range(start, start + self.readers[reader].heads)

    def before(self, reader: int) -> int:
        """How many of the writers come before a reader: it reads these."""
        stage = self._reads_at(self.readers[reader])
        return sum(self._writes_at(w) < stage for w in self.writers)

    def _writes_at(self, part: Writer) -> int:
        if part.kind == "input":
            return -1
        late = part.kind in MLPS and not self.parallel[part.layer]
        return 2 * part.layer + late

    def _reads_at(self, part: Reader) -> int:
        if part.kind == "logits":
            return 2 * len(self.parallel)
        late = part.kind in MLPS and not self.parallel[part.layer]
        return 2 * part.layer + late

    # Edges ---------------------------------------------------------------------------------------

    @cached_property
    def real(self) -> Bool[Tensor, "source destination"]:
        """Which pairs are edges."""
        found = torch.zeros(len(self.sources), len(self.destinations), dtype=torch.bool)
        for number in range(len(self.readers)):
            known = self.before(number)
            last = self.written(known - 1).stop if known else 0
            cut = self.read(number)
            found[:last, cut.start : cut.stop] = True
        return found

    @property
    def experts(self) -> bool:
        """Whether mixtures are taken apart."""
        return any(w.kind == "experts" for w in self.writers)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.real.sum())

    def edge(self, source: int, destination: int) -> str:
        """Name of an edge."""
        return f"{self.sources[source]}->{self.destinations[destination]}"

    def find(self, edge: str) -> tuple[int, int]:
        """Source and destination number of an edge by its name.

        Raises:
            SiteNotFound: No such edge; the nearest names are given.
        """
        source, _, destination = edge.partition("->")
        if source in self._source_numbers and destination in self._destination_numbers:
            pair = self._source_numbers[source], self._destination_numbers[destination]
            if bool(self.real[pair]):
                return pair
            raise SiteNotFound(
                f"{edge} is not an edge of this model",
                given=edge,
                why="its source does not come before its destination",
                do="name an edge that leads onwards",
            )
        wrong, known = (
            (source, self.sources) if source not in self._source_numbers
            else (destination, self.destinations)
        )  # fmt: skip
        raise SiteNotFound(
            f"this model's graph has no node {wrong!r}",
            given=edge,
            do=f"use one of the nearest names: {nearest(wrong, known)}",
        )

    def mask(self, edges: Sequence[str]) -> Bool[Tensor, "source destination"]:
        """The named edges as a mask."""
        found = torch.zeros_like(self.real)
        for name in edges:
            found[self.find(name)] = True
        return found

    def names(self, mask: Bool[Tensor, "source destination"]) -> list[str]:
        """Names of the edges of a mask, in order of their destinations."""
        pairs = (mask & self.real).T.nonzero().tolist()
        return [self.edge(source, destination) for destination, source in pairs]

    @cached_property
    def _source_numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.sources)}

    @cached_property
    def _destination_numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.destinations)}

    # Nodes of destinations -----------------------------------------------------------------------

    @cached_property
    def feeds(self) -> Bool[Tensor, "destination source"]:
        """Which nodes a destination belongs to: a key/value head feeds all heads of its group.

        A router feeds its experts, and not what the MLP adds besides.
        """
        found = torch.zeros(len(self.destinations), len(self.sources), dtype=torch.bool)
        by_place = {(w.layer, w.kind in MLPS): i for i, w in enumerate(self.writers)}
        for number, reader in enumerate(self.readers):
            writer = by_place.get((reader.layer, reader.kind in MLPS))
            if reader.kind == "logits" or writer is None:
                continue
            mine, theirs = self.read(number), self.written(writer)
            if reader.kind == "router":
                theirs = range(theirs.start, theirs.start + reader.experts)
            share = max(1, len(theirs) // len(mine))
            for i, destination in enumerate(mine):
                first = theirs.start + i * share
                found[destination, first : first + share] = True
        return found

    def same(self, other: "Graph") -> bool:
        """Whether two graphs have the same nodes."""
        return self.sources == other.sources and self.destinations == other.destinations

    def __repr__(self) -> str:
        return f"Graph({self.name}: {len(self.sources)} sources, {self.n_edges} edges)"


def _source_names(writer: Writer) -> list[str]:
    if writer.kind == "input":
        return ["input"]
    if writer.kind == "mlp":
        return [part_name("mlp", writer.layer)]
    if writer.kind == "mixer":
        return [part_name("attention", writer.layer)]
    if writer.kind == "experts":
        experts = [
            part_name("expert", writer.layer, expert)
            for expert in range(writer.heads - writer.rest)
        ]
        return [*experts, f"m{writer.layer}.s"] if writer.rest else experts
    return [part_name("head", writer.layer, head) for head in range(writer.heads)]


def _destination_names(reader: Reader) -> list[str]:
    if reader.kind == "logits":
        return ["logits"]
    if reader.kind == "mlp":
        return [part_name("mlp", reader.layer)]
    if reader.kind == "router":
        return [f"m{reader.layer}<router>"]
    if reader.kind == "mixer":
        return [part_name("attention", reader.layer)]
    return [f"a{reader.layer}.h{head}<{reader.kind}>" for head in range(reader.heads)]
