"""Edge attribution: an estimate for every edge at once, from a few backward passes.

    score(u -> v) = sum over prompts and positions of  (a_u(clean) - a_u(contrast)) . dm/d in_v

`in_v` is the stream as v reads it, before its norm. Positive: the edge supports the answer (cutting
it lowers the metric). This is the first-order estimate of what `circuits.exact` measures.

Nothing of width `d_model` is kept per head. Of the sources only the heads' z and the MLPs' outputs
are kept, and of these only what the two runs differ by; of the destinations only gradients at the
projections, summed over passes (`circuits.slopes`): the sources are the same for all passes, and a
score is linear in the gradient. Both ends are then unfolded for a few positions at a time:

    a_u = z_h W_O,h        dm/d in_v = J_norm^T W_h^T g_h

So memory is that of one backward pass, grouped heads need no copies, and any attention kernel will
do. Where a mixture's experts and its router are two readers of one activation, each gets a branch
and so a gradient of its own.

A norm between heads and stream (Gemma 2, OLMo 2) is taken with its scale as each run has it,
which makes heads add up exactly.

Sources: EAP (Syed et al., 2023); EAP-IG (Hanna et al., 2024); the factored form is ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from underhood.circuits.ablation import Ablation
from underhood.circuits.graph import Graph
from underhood.circuits.light import light, written_out
from underhood.circuits.prefix import Prefix
from underhood.circuits.slopes import Slopes
from underhood.circuits.wiring import Wiring, Writes, last_logits
from underhood.core.edit import Edit
from underhood.core.errors import NotFinite
from underhood.core.model import Model
from underhood.core.ops import call
from underhood.core.relevance import relevance_rules
from underhood.core.sweep_tail import Tail
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Metric

__all__ = ["POINTS", "Attributor", "frozen"]

POINTS = ("clean", "contrast", "both", "inputs", "activations")
"""Where gradients are taken: at one run or the mean of both; along the straight line between their
embeddings (EAP-IG inputs); for each sub-layer's edges along the line between its own two outputs
(EAP-IG activations)."""

SPAN = 1 << 24  # bytes of sources that are unfolded at once
TOGETHER = 3  # passes whose gradients are summed before they meet the sources


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for weights inside the block: nothing is kept for them."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(slots=True)
class _Two:
    """What is kept of the two runs of some pairs.

    Attributes:
        apart: By writer, what it writes more in the clean run `[rows*pos, written]`; 0 at padding.
        inputs: What the embedding writes in the clean run and in the other.
        reference: The clean run's logits; None where the pass itself is the clean run.
    """

    apart: list[Tensor]
    inputs: tuple[Tensor, ...] = ()
    reference: Tensor | None = None


class Attributor:
    """Edge scores of pairs of prompts.

    Args:
        wiring: The model and its graph.
        metric: What is measured.
        rules: Relevance rules to go backward by (see `core.relevance`); none: gradients.
    """

    def __init__(self, wiring: Wiring, metric: Metric, *, rules: Sequence[str] = ()) -> None:
        self.wiring, self.metric, self.rules = wiring, metric, tuple(rules)
        self.model: Model = wiring.model
        self.graph: Graph = wiring.graph
        self.passes = [0, 0]  # forward, backward
        self._slopes = Slopes(wiring, still="ln" in self.rules)
        # Rules go back through activations in a way of their own.
        self._activations = [] if self.rules else written_out(self.model)
        self._prefix: Prefix | None = None  # columns that are not run again
        self._tail = Tail(self.model)  # logits that the metric reads

    def scores(
        self, pairs: EncodedPairs, cut: Ablation, *, at: str = "clean", steps: int = 5
    ) -> Float[Tensor, "source destination"]:
        """Summed over these pairs, in the metric's unit; 0 where there is no edge.

        Args:
            pairs: The pairs of one pass.
            cut: What a cut edge carries.
            at: One of `POINTS`.
            steps: Points on each line, for "inputs" (from the contrast on, the clean end left out,
                as EAP-IG's code has it) and "activations" (the clean end included).

        Raises:
            NotFinite: The metric or its gradient is not a number.
        """
        fresh = cut.kind == "resample" and not self.wiring.freeze_routing
        start = Prefix.columns(self.model, pairs) if fresh else 0
        self._tail = Tail(self.model, self.metric.needs_columns(pairs.answers, pairs.wrong))
        try:
            with self._tail.narrowed():
                if start:
                    self.passes[0] += 1
                    self._prefix = Prefix(self.model, pairs, start)
                    pairs = self._prefix.pairs
                return self._summed(pairs, cut, at, steps)
        finally:
            self._prefix = None
            self._slopes.clear()

    def _cache(self) -> Any:
        return None if self._prefix is None else self._prefix.cache()

    def _writes(self, tokens: Tokens) -> Writes:
        self.passes[0] += 1
        return self.wiring.writes(tokens, cache=self._cache())

    def _other(self, pairs: EncodedPairs, cut: Ablation) -> Writes:
        """What cut edges carry."""
        if cut.kind == "resample":
            return self._writes(pairs.contrast)
        self.passes[0] += 1
        return cut.writes(pairs)

    def _summed(
        self, pairs: EncodedPairs, cut: Ablation, at: str, steps: int
    ) -> Float[Tensor, "source destination"]:
        total = torch.zeros(self.graph.real.shape, dtype=torch.float64)
        if at == "activations":
            return self._by_writer(pairs, self._writes(pairs.clean), self._other(pairs, cut), steps)
        two, number = _Two([torch.empty(0)] * len(self.graph.writers)), 0
        for number, (tokens, edits) in enumerate(self._points(two, pairs, cut, at, steps), 1):
            if number > 1 and number % TOGETHER == 1:
                self._add_scores(total, two.apart)
            self._backward(pairs, tokens, edits, two.reference)
        self._add_scores(total, two.apart)
        return total / number

    def _by_writer(
        self, pairs: EncodedPairs, clean: Writes, contrast: Writes, steps: int
    ) -> Float[Tensor, "source destination"]:
        """Each writer's output on its own line between the two runs, all else as in the clean run.

        Only the writer's own edges are read off: what it writes there is a constant, so that
        gradients do not reach the readers before it. (EAP-IG's published code adds these up too.)
        """
        total = torch.zeros(self.graph.real.shape, dtype=torch.float64)
        two = _Two([], reference=clean.logits)
        for number, ends in enumerate(zip(clean.values, contrast.values, strict=True)):
            two.apart.append(self._apart(pairs, number, *ends))
            start = [self._put(0, clean.values[0])] if number else []
            for step in range(1, steps + 1):
                edits = [self._between(number, ends, step / steps), *start]
                self._backward(pairs, pairs.clean, edits, two.reference)
                if step % TOGETHER == 0 or step == steps:
                    self._add_scores(total, two.apart, first=number)
        return total / steps

    # Where gradients are taken -------------------------------------------------------------------

    def _points(
        self, two: _Two, pairs: EncodedPairs, cut: Ablation, at: str, steps: int
    ) -> Iterator[tuple[Tokens, list[Edit]]]:
        """Tokens and edits of each pass; `two` is complete when the first has gone forward."""
        own = at == "clean"  # the first pass is the clean run, else the contrast's
        first = pairs.clean if own else pairs.contrast
        known = self._other(pairs, cut) if own else self._writes(pairs.clean)
        two.reference = known.logits if self.metric.uses_reference and not own else None
        if self._is_a_run(own, cut):
            edits = self._compared(two, pairs, dict(enumerate(known.values)), own=own)
            del known
            yield first, edits
        else:
            other = self._writes(pairs.clean) if own else self._other(pairs, cut)
            for number, ends in enumerate(zip(known.values, other.values, strict=True)):
                self._meet(two, pairs, number, ends, own=own)
            del known, other
            tokens = pairs.clean if at == "inputs" else first
            yield tokens, [self._put(0, two.inputs[0 if own else 1])]
        if at == "both":
            yield pairs.clean, [self._put(0, two.inputs[0])]
        for step in range(1, steps if at == "inputs" else 0):
            yield pairs.clean, [self._between(0, two.inputs, step / steps)]

    def _is_a_run(self, own: bool, cut: Ablation) -> bool:
        """Whether the first pass is the very run that edges are cut to or from."""
        mixtures = any(w.slots for w in self.graph.writers)
        return not (self.wiring.freeze_routing or mixtures) and (own or cut.kind == "resample")

    def _compared(
        self, two: _Two, pairs: EncodedPairs, known: dict[int, Tensor], *, own: bool
    ) -> list[Edit]:
        """Edits that change nothing, and compare what is written with another run's."""

        def write(number: int, value: Tensor) -> Tensor:
            # Gradients start from the input. A copy: some models change theirs in place.
            value = value if number else value.detach().requires_grad_().clone()
            theirs = known.pop(number)
            self._meet(two, pairs, number, (theirs, value.detach().reshape(theirs.shape)), own=own)
            return value

        return [Edit(w.site, call(partial(write, n))) for n, w in enumerate(self.graph.writers)]

    def _meet(
        self, two: _Two, pairs: EncodedPairs, number: int, ends: tuple[Tensor, Tensor], *, own: bool
    ) -> None:
        """What a writer writes in the known run, and in the other."""
        clean, other = ends[::-1] if own else ends
        two.apart[number] = self._apart(pairs, number, clean, other)
        if number == 0:
            two.inputs = clean.clone(), other.clone()

    def _between(self, number: int, ends: tuple[Tensor, ...], share: float) -> Edit:
        clean, contrast = ends
        return self._put(number, contrast + share * (clean - contrast))

    def _put(self, number: int, value: Tensor) -> Edit:
        """A writer's output replaced by a value that gradients start from."""
        value = self.wiring.whole(number, value)

        def put(now: Tensor) -> Tensor:
            return value.detach().reshape(now.shape).requires_grad_().clone()

        return Edit(self.graph.writers[number].site, call(put))

    # One pass ------------------------------------------------------------------------------------

    def _backward(
        self, pairs: EncodedPairs, tokens: Tokens, edits: list[Edit], reference: Tensor | None
    ) -> None:
        """Forward and backward; what it leaves is in the slopes."""
        self._value(pairs, tokens, edits, reference).backward()
        self.passes = [self.passes[0] + 1, self.passes[1] + 1]

    def _value(
        self, pairs: EncodedPairs, tokens: Tokens, edits: list[Edit], reference: Tensor | None
    ) -> Float[Tensor, ""]:
        edits = [*edits, *self._slopes.watch(), *self.wiring.routing(tokens)]
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model.module))
            if self.rules:
                stack.enter_context(relevance_rules(self.model, self.rules))
            stack.enter_context(light(self._activations))
            options = {"grad": True, "cache": self._cache()}
            logits = self._tail.pick(last_logits(self.model, tokens, edits, **options)[0])
            kept = logits.detach() if reference is None else reference
            kept = kept if self.metric.uses_reference else None
            ids = self.metric.numbered(self._tail.columns, pairs.answers, pairs.wrong)
            return self.metric(logits, *ids, reference=kept).sum()

    # Both ends put together ----------------------------------------------------------------------

    def _apart(
        self, pairs: EncodedPairs, number: int, clean: Tensor, other: Tensor
    ) -> Float[Tensor, "n written"]:
        """What a writer writes more in the clean run, folded; nothing at padding."""
        more = self._folded(number, clean) - self._folded(number, other)
        padding = ~pairs.clean.mask.to(more.device)
        return more.masked_fill_(padding[..., None], 0).flatten(0, 1)

    def _folded(self, number: int, value: Tensor) -> Tensor:
        """Heads under a norm: z over the norm's scale, so that what is left is linear."""
        writer = self.graph.writers[number]
        if writer.norm is None:
            return value
        path, form = writer.norm
        bias = getattr(self.model.module.get_submodule(writer.o_proj), "bias", None)
        whole = self.wiring.split(number, value).sum(2)
        whole = whole if bias is None else whole + bias
        return value / form.scale(whole).to(value.dtype)

    def _add_scores(self, total: Tensor, apart: list[Tensor], *, first: int = 0) -> None:
        """Add the scores of the writers from `first` on, and begin new sums of gradients.

        Raises:
            NotFinite: A score is not a number.
        """
        rows = range(self.graph.written(first).start, self.graph.written(len(apart) - 1).stop)
        # Positions where the runs agree write nothing different: they add exactly nothing.
        spots = torch.stack([d.abs().amax(1) for d in apart[first:]]).amax(0).nonzero()[:, 0]
        size = 4 * (self.model.d_model or 1) * len(rows) * len(spots)
        for some in spots.tensor_split(1 + size // SPAN):
            sources = self._sources(apart, first, some)
            for number in range(len(self.graph.readers)):
                known = min(self.graph.before(number), len(apart))
                made = self._slopes.at(number, some) if known > first else None
                if made is None:
                    continue
                last, cut = self.graph.written(known - 1).stop, self.graph.read(number)
                part = sources[: last - rows.start].flatten(1) @ made.flatten(1).T
                total[rows.start : last, cut.start : cut.stop] += part.double().cpu()
            del sources  # before the next are made
        self._slopes.clear()
        if not bool(torch.isfinite(total).all()):
            raise NotFinite(
                "the metric's gradient is not finite",
                given=f"metric {self.metric.name}",
                why="an activation overflowed, or the metric has no derivative there",
                do="use logit_diff, or a higher precision",
            )

    def _sources(
        self, apart: list[Tensor], first: int, some: Int[Tensor, " n"]
    ) -> Float[Tensor, "source n d_model"]:
        """What the sources of all writers from `first` on write more, unfolded."""
        start, stop = self.graph.written(first).start, self.graph.written(len(apart) - 1).stop
        sources = apart[0].new_empty(stop - start, len(some), self.model.d_model or 1)
        for number in range(first, len(apart)):
            writer, weight = self.graph.writers[number], self.wiring.outputs[number]
            value = apart[number][some].unflatten(-1, (writer.heads, -1)).transpose(0, 1)
            value = value if weight is None else value @ weight
            if writer.norm is not None:
                form = writer.norm[1]
                value = form.centre(value) * form.gain.to(value.dtype)
            mine = self.graph.written(number)
            sources[mine.start - start : mine.stop - start] = value
        return sources
