"""Exact edge effects: what the metric loses when one edge alone carries the other run's value.

Each edge is one cell, so all of them are one sweep: the reader's norm and projection are applied to
its changed stream, and the model runs on from there. Edges into the logits need no pass at all. An
edge into a mixture's experts holds the router to its own choice, one into the router moves nothing
else; with frozen routing all later routers are held too.
This is the truth that attribution scores estimate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.circuits.wiring import Wiring, Writes, last_logits
from underhood.core.edit import Edit, Plan
from underhood.core.ops import call
from underhood.core.parts import Reader
from underhood.core.site import Site
from underhood.core.sweep import sweep
from underhood.core.tokens import Where
from underhood.data import EncodedPairs, Metric

__all__ = ["Effects", "edge_effects"]

Edge = tuple[int, int]
"""Number of the source and of the destination."""


@dataclass(slots=True)
class Effects:
    """Exact effects of some edges.

    Attributes:
        values: What the metric loses when the edge is cut, per edge and prompt.
        how: How the cells were run.
        passes: Forward passes.
    """

    values: Float[Tensor, "edge batch"]
    how: str
    passes: int


def edge_effects(
    wiring: Wiring,
    pairs: EncodedPairs,
    metric: Metric,
    edges: Sequence[Edge],
    *,
    other: Writes | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """The exact effect of each edge on each prompt.

    Args:
        wiring: The model and its graph.
        pairs: The prompts; each is run by itself.
        metric: What is measured.
        edges: Which edges.
        other: What a cut edge carries, one row per prompt; the contrast's values if not given.
        batch_size: Rows of one pass.
        progress: Called with the cells done and the cells in all.
    """
    found = torch.zeros(len(edges), len(pairs), dtype=torch.float64)
    passes, how = 0, "no pass needed: these edges lead into the logits"
    for row in range(len(pairs)):
        done = row * len(edges)
        job = _Prompt(wiring, pairs, metric, row, other)
        swept = job.effects(
            edges, found[:, row], batch_size, _shifted(progress, done, found.numel())
        )
        passes += 3 + (swept[1] if swept else 0)
        how = swept[0] if swept else how
    return Effects(found, how, passes)


def _shifted(
    progress: Callable[[int, int], None] | None, done: int, total: int
) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda now, _all: progress(done + now, total)


class _Prompt:
    """One prompt: its streams, and what each source writes more in the other run."""

    def __init__(
        self, wiring: Wiring, pairs: EncodedPairs, metric: Metric, row: int, other: Writes | None
    ) -> None:
        self.wiring, self.graph, self.row = wiring, wiring.graph, row
        self.tokens = pairs.clean.row(row)
        contrast = pairs.contrast.row(row)
        self.now = wiring.writes(self.tokens)
        if other is None:
            self.other = wiring.writes(contrast)
        else:
            start, length = pairs.clean.starts[row], pairs.clean.lengths[row]
            part = other.rows([row])
            part.values = [v[:, start : start + length] for v in part.values]
            self.other = part
        self.metric, self.pair = metric, pairs.rows([row])
        self.base = float(self.read(self.now.logits))
        self.mixed = [wiring.mixed(i, self.now, self.other) for i in range(len(self.now.values))]
        taps = [Site("module_in", path=r.norm) if r.inside else r.tap for r in self.graph.readers]
        choices = {r.choice for r in self.graph.readers if r.choice is not None}
        _, run = last_logits(
            wiring.model, self.tokens, record=list(dict.fromkeys([*taps, *choices]))
        )
        self.choices = {site: run[site] for site in choices}
        self.held = wiring.choices(self.tokens)
        shape = (1, self.tokens.ids.shape[1], -1)
        # OPT flattens rows and positions before its MLPs: an edit there cannot tell rows apart.
        self.flat = [run[tap].ndim < 3 for tap in taps]
        self.streams = [run[tap].view(shape) for tap in taps]
        self.places = self._places()

    def read(
        self, logits: Tensor, columns: Int[Tensor, " column"] | None = None
    ) -> Float[Tensor, " rows"]:
        """The metric of this prompt in each row; `columns`: those that the logits hold."""
        n, pair = len(logits), self.pair
        kept = self.now.logits.expand(n, -1) if self.metric.uses_reference else None
        ids = self.metric.numbered(columns, pair.answers.expand(n, -1), pair.wrong.expand(n, -1))
        return self.metric(logits, *ids, reference=kept).double().cpu()

    def _places(self) -> tuple[tuple[int, int], ...]:
        """Writer and number within it, for each source."""
        return tuple(
            (w, i) for w in range(len(self.graph.writers))
            for i in range(len(self.graph.written(w)))
        )  # fmt: skip

    def effects(
        self,
        edges: Sequence[Edge],
        into: Tensor,
        batch_size: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> tuple[str, int] | None:
        """Fill in the effects of this prompt; how they were swept, and in how many passes."""
        reader_of = {d: r for r in range(len(self.graph.readers)) for d in self.graph.read(r)}
        last = len(self.graph.readers) - 1
        cells: list[Plan] = []
        numbers: list[int] = []
        ends: list[tuple[int, Tensor]] = []
        masked: list[int] = []
        for number, (source, destination) in enumerate(edges):
            reader = reader_of[destination]
            delta = self._delta(source)
            apart = delta.abs().amax((0, 2)).nonzero()[:, 0]
            if not len(apart):
                continue  # both runs write the same: exactly no effect
            if self.graph.readers[reader].beside is not None and self.held:
                continue  # a router that is held
            if reader == last:
                ends.append((number, (self.streams[reader] + delta)[:, -1]))
                continue
            if self.flat[reader] and not self.graph.readers[reader].module:
                masked.append(number)
                continue
            head = destination - self.graph.read(reader).start
            cells.append(self._cut(reader, head, delta, range(int(apart[0]), delta.shape[1])))
            numbers.append(number)
        for some in range(0, len(ends), 64):
            part = ends[some : some + 64]
            logits = self.wiring.model.unembed(torch.cat([stream for _, stream in part]))
            into[[n for n, _ in part]] = self.base - self.read(logits)
        self._mask(edges, masked, into)
        if not cells:
            return None
        columns = self.metric.needs_columns(self.pair.answers, self.pair.wrong)
        swept = sweep(
            self.wiring.model, self.tokens, cells, partial(self.read, columns=columns),
            columns=columns, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        into[numbers] = self.base - swept.values[:, 0]
        return swept.how, swept.passes

    def _mask(self, edges: Sequence[Edge], numbers: Sequence[int], into: Tensor) -> None:
        """The same by one mask per edge, in whole passes."""
        for some in range(0, len(numbers), 32):
            part = numbers[some : some + 32]
            keep = torch.ones(len(part), *self.graph.real.shape)
            for row, number in enumerate(part):
                keep[row][edges[number]] = 0
            rows = [0] * len(part)
            logits = self.wiring.logits(self.tokens.rows(rows), self.other.rows(rows), keep)
            into[list(part)] = self.base - self.read(logits)

    def _delta(self, source: int) -> Float[Tensor, "1 pos d_model"]:
        """What readers get when one source carries the other run's value."""
        writer, number = self.places[source]
        cut = torch.zeros(len(self.graph.written(writer)), 1, device=self.wiring.model.device)
        cut[number] = 1
        return self.mixed[writer].change(cut)[:, :, 0]

    def _cut(self, number: int, head: int, delta: Tensor, where: range) -> Plan:
        """The edits that give one reader its changed stream, and routers what they are held to."""
        reader = self.graph.readers[number]
        stream, spots = self.streams[number] + delta, Where(tuple(where))
        if reader.beside is not None and reader.choice is not None:
            moved = reader.logits(self.wiring.model, reader.normed(self.wiring.model, stream))
            return Plan([Edit(reader.choice, call(lambda h: _tail(moved, h)), spots)])
        held = {s: v for s, v in self.held.items() if (s.layer or 0) >= reader.layer}
        if reader.choice is not None:
            held[reader.choice] = self.choices[reader.choice]
        edits = [Edit(s, call(lambda h, v=v: _tail(v, h)), spots) for s, v in held.items()]
        return Plan([self._instead(reader, stream, head, spots), *edits])

    def _instead(self, reader: Reader, stream: Tensor, head: int, spots: Where) -> Edit:
        """The edit that gives one reader a stream of its own."""
        if not reader.module and not reader.inside:
            return Edit(reader.tap, call(lambda h: _tail(stream, h)), spots)
        normed = reader.normed(self.wiring.model, stream)
        if not reader.module:
            return Edit(reader.tap, call(lambda h: _tail(normed, h)), spots)
        weight, bias = self.wiring.columns(reader)
        made = normed @ weight[head] if bias is None else normed @ weight[head] + bias[head]
        columns = torch.tensor(reader.columns[head], device=made.device)

        def put(h: Tensor) -> Tensor:
            return h.index_copy(-1, columns, _tail(made, h[..., columns]))

        return Edit(Site("module", path=reader.module), call(put), spots)


def _tail(value: Tensor, like: Tensor) -> Tensor:
    """The last positions of a prompt's values, in the shape of a pass that starts later."""
    pos = like.shape[-2]
    return value[:, -pos:].reshape(like.shape)
