"""Edge attribution: an estimate for every edge at once, from a few backward passes.

    score(u -> v) = sum over prompts and positions of  (a_u(clean) - a_u(contrast)) . dm/d in_v

`in_v` is the stream as v reads it, before its norm. Positive: the edge supports the answer (cutting
it lowers the metric). This is the first-order estimate of what `circuits.exact` measures.

Nothing of width `d_model` is kept per head. Of the sources only the heads' z and the MLPs' outputs
are kept, of the destinations only the gradients at the projections; both ends are then taken
through W_O and through W_Q, W_K, W_V and the norm's own derivative for a few positions at a time:

    a_u = z_h W_O,h        dm/d in_v = J_norm^T W_h^T g_h,
    J_norm^T y = (centre(gain y) - x^ mean(x^ . centre(gain y))) / scale

So memory is that of one backward pass, grouped heads need no copies, and any attention kernel will
do. Where a mixture's experts and its router are two readers of one activation, each gets a branch
and so a gradient of its own.

A norm between heads and stream (Gemma 2, OLMo 2) is taken with its scale as each run has it,
which makes heads add up exactly.

Sources: EAP (Syed et al., 2023); EAP-IG (Hanna et al., 2024); the factored form is ours.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.circuits.ablation import Ablation
from underhood.circuits.graph import Graph
from underhood.circuits.wiring import Wiring, Writes, last_logits
from underhood.core.edit import Edit
from underhood.core.errors import NotFinite
from underhood.core.growing import why_not
from underhood.core.head import NormForm
from underhood.core.model import Model
from underhood.core.ops import call
from underhood.core.parts import Reader, Writer
from underhood.core.relevance import relevance_rules
from underhood.core.site import Site
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Metric

__all__ = ["POINTS", "Attributor", "frozen"]

POINTS = ("clean", "contrast", "both", "inputs", "activations")
"""Where gradients are taken: at one run or the mean of both; along the straight line between their
embeddings (EAP-IG inputs); for each sub-layer's edges along the line between its own two outputs
(EAP-IG activations)."""

SPAN = 1 << 24  # bytes of sources that are unfolded at once


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
class _Ends:
    """What one backward pass leaves: streams before the norms, and gradients behind them."""

    streams: dict[Site, Tensor] = field(default_factory=dict)
    grads: dict[Site, Tensor] = field(default_factory=dict)
    inputs: dict[Site, Tensor] = field(default_factory=dict)  # what experts and router both read


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
        self._prefix: Any = None  # keys and values of columns that are not run again
        width = self.model.d_model or 0
        forms = {r.norm: r.form(self.model, width) for r in self.graph.readers if r.norm}
        self.forms: dict[str, NormForm | None] = {"": None} | forms

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
        self.passes[0] += 2
        start = self._start(pairs, cut)
        if not start:
            ends = [self.wiring.writes(pairs.clean), cut.writes(pairs)]
            return self._summed(pairs, ends, at, steps)
        self._prefix = self._cache(pairs.clean, start)
        pairs = _late(pairs, start)
        try:
            ends = [
                self.wiring.writes(tokens, cache=_copied(self._prefix))
                for tokens in (pairs.clean, pairs.contrast)
            ]
            return self._summed(pairs, ends, at, steps)
        finally:
            self._prefix = None

    def _start(self, pairs: EncodedPairs, cut: Ablation) -> int:
        """How many columns can be left to a cache: there both prompts hold the same tokens."""
        start = min(pairs.first_difference)
        whole = bool(pairs.clean.mask.all()) and cut.kind == "resample"
        if not whole or self.wiring.freeze_routing or why_not(self.model, []) is not None:
            return 0
        return min(start, pairs.clean.ids.shape[1] - 1)

    def _cache(self, tokens: Tokens, start: int) -> Any:
        """Keys and values of the first columns."""
        given = {"input_ids": tokens.ids[:, :start].to(self.model.device), "use_cache": True}
        self.passes[0] += 1
        with torch.no_grad():
            return self.model.run(given | {"logits_to_keep": 1}).output.past_key_values

    def _summed(
        self, pairs: EncodedPairs, ends: list[Writes], at: str, steps: int
    ) -> Float[Tensor, "source destination"]:
        clean, contrast = ends
        ends.clear()
        deltas = self._deltas(clean, contrast, pairs)
        if at != "activations":  # of the rest only the differences are needed
            for writes in (clean, contrast):
                writes.values[:] = [writes.values[0].clone()]
        total = torch.zeros(self.graph.real.shape, dtype=torch.float64)
        if at == "activations":
            return self._by_writer(pairs, clean, contrast, deltas, steps)
        points = list(self._points(pairs, clean, contrast, at, steps))
        for tokens, edits in points:
            total += self._score(deltas, self._backward(pairs, tokens, edits, clean.logits))
        return total / len(points)

    def _by_writer(
        self, pairs: EncodedPairs, clean: Writes, contrast: Writes, deltas: list[Tensor], steps: int
    ) -> Float[Tensor, "source destination"]:
        """Each writer's output on its own line between the two runs, all else as in the clean run.

        Only the writer's own edges are read off: what it writes there is a constant, so that
        gradients do not reach the readers before it. (EAP-IG's published code adds these up too.)
        """
        total = torch.zeros(self.graph.real.shape, dtype=torch.float64)
        for number in range(len(self.graph.writers)):
            cut = self.graph.written(number)
            mine = [d if i == number else torch.zeros_like(d) for i, d in enumerate(deltas)]
            for step in range(1, steps + 1):
                edits = [self._between(number, clean, contrast, step / steps)]
                edits += [self._put(0, clean.values[0])] if number else []
                scores = self._score(mine, self._backward(pairs, pairs.clean, edits, clean.logits))
                total[cut.start : cut.stop] += scores[cut.start : cut.stop] / steps
        return total

    # Where gradients are taken -------------------------------------------------------------------

    def _points(
        self, pairs: EncodedPairs, clean: Writes, contrast: Writes, at: str, steps: int
    ) -> Iterator[tuple[Tokens, list[Edit]]]:
        if at in ("clean", "both"):
            yield pairs.clean, [self._put(0, clean.values[0])]
        if at in ("contrast", "both"):
            yield pairs.contrast, [self._put(0, contrast.values[0])]
        if at == "inputs":
            for step in range(steps):
                yield pairs.clean, [self._between(0, clean, contrast, step / steps)]

    def _between(self, number: int, clean: Writes, contrast: Writes, share: float) -> Edit:
        ends = contrast.values[number], clean.values[number]
        return self._put(number, ends[0] + share * (ends[1] - ends[0]))

    def _put(self, number: int, value: Tensor) -> Edit:
        """A writer's output replaced by a value that gradients start from."""

        value = self.wiring.whole(number, value)

        def put(now: Tensor) -> Tensor:
            return value.detach().reshape(now.shape).requires_grad_().clone()

        return Edit(self.graph.writers[number].site, call(put))

    # One backward pass ---------------------------------------------------------------------------

    def _backward(
        self, pairs: EncodedPairs, tokens: Tokens, edits: list[Edit], reference: Tensor
    ) -> _Ends:
        seen = _Ends()
        ends = {_end(r): r for r in self.graph.readers}
        streams = {Site("module_in", path=r.norm) if r.inside else r.tap
                   for r in self.graph.readers if r.inside or r.module}  # fmt: skip
        watch = [Edit(site, call(_watch(site, seen, ends.get(site), site in streams)))
                 for site in sorted(ends.keys() | streams, key=str)]  # fmt: skip
        watch += self.wiring.routing(tokens)
        with frozen(self.model.module), self._backward_rules():
            cache = _copied(self._prefix)
            logits, _ = last_logits(self.model, tokens, [*edits, *watch], grad=True, cache=cache)
            kept = reference if self.metric.uses_reference else None
            value = self.metric(logits, pairs.answers, pairs.wrong, reference=kept)
            grads = torch.autograd.grad(value.sum(), list(seen.grads.values()), allow_unused=True)
        self.passes = [self.passes[0] + 1, self.passes[1] + 1]
        for (site, end), grad in zip(seen.grads.items(), grads, strict=True):
            seen.grads[site] = torch.zeros_like(end) if grad is None else grad
        if not all(bool(torch.isfinite(g).all()) for g in seen.grads.values()):
            raise NotFinite(
                "the metric's gradient is not finite",
                given=f"metric {self.metric.name}, value {float(value.detach().mean()):+.3g}",
                why="an activation overflowed, or the metric has no derivative there",
                do="use logit_diff, or a higher precision",
            )
        return seen

    def _backward_rules(self) -> AbstractContextManager[object]:
        return relevance_rules(self.model, self.rules) if self.rules else nullcontext()

    # Both ends put together ----------------------------------------------------------------------

    def _deltas(self, clean: Writes, contrast: Writes, pairs: EncodedPairs) -> list[Tensor]:
        """What each writer writes more in the clean run, folded: `[positions, ...]`, real ones."""
        mask = pairs.clean.mask.to(self.model.device)
        folded = []
        for number, writer in enumerate(self.graph.writers):
            a, b = (self._folded(number, writer, w.values[number]) for w in (clean, contrast))
            folded.append((a - b)[mask])
        return folded

    def _folded(self, number: int, writer: Writer, value: Tensor) -> Tensor:
        """Heads under a norm: z over the norm's scale, so that what is left is linear."""
        if writer.norm is None:
            return value
        path, form = writer.norm
        bias = getattr(self.model.module.get_submodule(writer.o_proj), "bias", None)
        whole = self.wiring.split(number, value).sum(2)
        whole = whole if bias is None else whole + bias
        return value / form.scale(whole).to(value.dtype)

    def _score(self, deltas: list[Tensor], ends: _Ends) -> Float[Tensor, "source destination"]:
        positions, width = deltas[0].shape
        total = torch.zeros(self.graph.real.shape, dtype=torch.float64)
        step = max(1, SPAN // (4 * width * len(self.graph.sources)))
        # Positions where the runs agree write nothing different: they add exactly nothing.
        apart = torch.stack([d.abs().amax(1) for d in deltas]).amax(0).nonzero()[:, 0]
        for some in apart.split(step):
            sources = self._sources(deltas, some)
            for number, reader in enumerate(self.graph.readers):
                known = self.graph.before(number)
                last = self.graph.written(known - 1).stop if known else 0
                cut = self.graph.read(number)
                made = self._destination(reader, ends, some)
                part = sources[:last].flatten(1) @ made.flatten(1).T
                total[:last, cut.start : cut.stop] += part.double().cpu()
        return total

    def _sources(self, deltas: list[Tensor], some: Tensor) -> Float[Tensor, "source n d_model"]:
        parts = []
        for number, writer in enumerate(self.graph.writers):
            value = deltas[number][some].unflatten(-1, (writer.heads, -1))
            weight = self.wiring._weights[number]
            if weight is None:
                parts.append(value.transpose(0, 1))
                continue
            value = torch.einsum("nhd,hdm->hnm", value, weight)
            if writer.norm is not None:
                form = writer.norm[1]
                value = form.centre(value) * form.gain.to(value.dtype)
            parts.append(value)
        return torch.cat(parts)

    def _destination(
        self, reader: Reader, ends: _Ends, some: Tensor
    ) -> Float[Tensor, "destination n d_model"]:
        """The gradient at the stream as the reader takes it."""
        grad = _flat(ends.grads[_end(reader)])[some]
        if not reader.module:
            if not reader.inside:
                return grad[None]
            stream = _flat(ends.streams[Site("module_in", path=reader.norm)])[some]
            return self._back(self.forms[reader.norm], stream, grad[None])
        weight, _ = self.wiring.columns(reader)
        columns = torch.tensor(reader.columns, device=grad.device)
        each = torch.einsum("nhd,hmd->hnm", grad[:, columns], weight)
        return self._back(self.forms[reader.norm], _flat(ends.streams[reader.tap])[some], each)

    def _back(self, form: NormForm | None, stream: Tensor, grad: Tensor) -> Tensor:
        """A gradient behind a norm as the gradient before it."""
        if form is None:
            return grad
        scale = form.scale(stream).to(grad.dtype)
        out = form.centre(grad * form.gain.to(grad.dtype))
        if "ln" not in self.rules:
            unit = form.centre(stream) / scale
            out = out - unit * (unit * out).mean(-1, keepdim=True)
        return out / scale


def _end(reader: Reader) -> Site:
    """Where a reader's gradient is taken: behind its projection, or on its own branch."""
    return Site("module", path=reader.module) if reader.module else reader.tap


def _watch(site: Site, seen: _Ends, end: Reader | None, stream: bool) -> Callable[[Tensor], Tensor]:
    """Keep an activation: its value, or a point of the graph where a gradient is taken.

    What is kept and what the model goes on with are two tensors: some models change theirs in place
    (OLMo clips what its projections make), and an input that two parts share gets a branch each.
    """

    def watch(value: Tensor) -> Tensor:
        if stream:
            seen.streams[site] = value.detach().clone()
        if end is None:
            return value
        if end.choice is not None and end.beside is None:
            seen.inputs[site] = value
        if end.beside is not None:  # past the experts' branch
            value = seen.inputs[end.beside].reshape(value.shape)
        seen.grads[site] = value.view_as(value) if site.name == "module_in" else value
        return seen.grads[site] if site.name == "module_in" else value.clone()

    return watch


def _late(pairs: EncodedPairs, start: int) -> EncodedPairs:
    """The pairs without their first columns, which hold the same tokens."""
    sides = [Tokens(t.ids[:, start:], t.mask[:, start:]) for t in (pairs.clean, pairs.contrast)]
    first = [n - start for n in pairs.first_difference]
    return EncodedPairs(sides[0], sides[1], pairs.answers, pairs.wrong, first)


def _copied(cache: Any) -> Any:
    """A cache that may grow without the first one growing; tensors are shared."""
    if cache is None:
        return None
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])
