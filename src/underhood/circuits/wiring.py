"""A model whose edges can be cut: every reader is given a stream of its own.

In a forward pass each reader v takes the stream as it is, plus, for every edge (u -> v) that is
cut, what u writes in another run minus what it writes in this one:

    in_v = stream + sum over cut edges (u -> v) of  (a_u(other) - a_u(now))

`a_u(now)` is what u writes in *this* pass, from inputs that were themselves changed; so kept edges
carry the circuit's own values, and the result is exact. With all edges kept it is the model's own
pass; with all cut it is the other run. Weights between 0 and 1 mix the two, and gradients flow
through them, which is how masks are trained.

The model's own modules run, whatever attention kernel they use. Only a head's q, k and v are made
again: from its own stream, through the model's norm, with its columns of the model's projection.

A mixture's experts and its router may be readers of their own (`Graph.of(model, experts=True)`);
what the router chooses follows from its own stream, as everything else does. With
`freeze_routing` every router keeps to the logits that it has in the unedited run of the prompts of
the pass: edges then act through what is computed, not through who computes it, and edges into
routers do nothing. Both ends stay what they are: all edges kept is the model's own run, all cut the
other run.

Where heads write through a norm of their sum (Gemma 2, OLMo 2), what they write is not additive:
a reader is then given the norm of the mixed sum, which is exact too.

Source: edge patching as in EAP-IG's `evaluate_graph` (Hanna et al., 2024), here for any family.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.circuits.graph import Graph
from underhood.circuits.mixtures import prove_mixtures, routers_of, stream_around
from underhood.core.edit import Edit
from underhood.core.errors import NotOffered
from underhood.core.model import Model
from underhood.core.ops import call
from underhood.core.parts import Reader, Writer
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.tokens import Tokens

__all__ = ["Mixed", "Wiring", "Writes", "last_logits"]

BUDGET = 1 << 28  # bytes that the sources and streams of one pass may take

Keep = Float[Tensor, "*rows source destination"]
"""1 where an edge carries this pass's own value, 0 where it carries the other run's."""


@dataclass(slots=True)
class Writes:
    """What every writer writes in some runs; heads are kept as the projection's input.

    Attributes:
        values: One tensor per writer: `[rows, pos, d_model]`, for heads `[rows, pos, head*d_head]`,
            for experts `[rows, pos, source*d_model]`.
        logits: The runs' logits at the last token.
        ids: The runs' tokens; None when the values are no runs of prompts (means, zeros).
    """

    values: list[Tensor]
    logits: Float[Tensor, "rows vocab"]
    ids: Int[Tensor, "rows pos"] | None = None

    def rows(self, index: Tensor | Sequence[int]) -> "Writes":
        """Some rows of it, perhaps repeated."""
        index = torch.as_tensor(index, device=self.logits.device)
        ids = None if self.ids is None else self.ids[index.to(self.ids.device)]
        return Writes([v[index] for v in self.values], self.logits[index], ids)


@dataclass(slots=True)
class Mixed:
    """What a writer's sources write now and in the other run, and how readers see the mixture."""

    now: Tensor  # [rows pos source d_model]
    other: Tensor
    norm: Callable[[Tensor], Tensor] | None = None
    rest: Tensor | None = None  # under a norm: what else enters it (a bias) [d_model]
    more: Tensor = field(init=False)  # what the other run writes more

    def __post_init__(self) -> None:
        self.more = self.other - self.now

    def change(self, cut: Float[Tensor, "*rows source destination"]) -> Tensor:
        """What readers get too much or too little: `[rows pos destination d_model]`."""
        share = cut.mT.to(self.now.dtype)  # [destination source], perhaps per row
        share = share[:, None] if share.ndim == 3 else share
        moved = share @ self.more
        if self.norm is None:
            return moved
        whole = self.now.sum(2, keepdim=True)
        whole = whole if self.rest is None else whole + self.rest
        return self.norm(whole + moved) - self.norm(whole)


@dataclass(slots=True)
class _Pass:
    """One pass: the streams seen so far and what has been written so far.

    Before column `start` both runs hold the same, so that cut edges carry nothing new there.
    """

    keep: Tensor
    other: Writes
    start: int = 0
    streams: dict[str, Tensor] = field(default_factory=dict)
    mixed: list[Mixed] = field(default_factory=list)


class Wiring:
    """Runs a model with some of its edges cut.

    Args:
        model: The model; it is not changed.
        graph: Its graph; made if not given.
        freeze_routing: Whether routers choose as in the unedited run of the same prompts, whatever
            is cut; else each chooses by its own stream.

    Attributes:
        outputs: Of each writer that stands for heads, the output projection, head by head
            `[head, d_head, d_model]`; None of the others.

    Raises:
        NotOffered: `freeze_routing`, and there are no routers. In the first run also: the stream is
            not the sum of what the known parts write.

    Example:
        >>> import underhood as uh
        >>> model = uh.load()
        >>> wiring = Wiring(model)
        >>> tokens = model.tokens("the capital of France is")
        >>> other = wiring.writes(model.tokens("the capital of Japan is"))
        >>> whole = torch.ones(wiring.graph.real.shape)
        >>> logits = wiring.logits(tokens, other, whole)
        >>> bool((logits - model.run(tokens).last_logits).abs().max() < 1e-3)
        True
    """

    def __init__(
        self, model: Model, graph: Graph | None = None, *, freeze_routing: bool = False
    ) -> None:
        self.model, self.graph = model, graph or Graph.of(model)
        self.freeze_routing = freeze_routing
        self._routers = routers_of(model) if freeze_routing else []
        self._held: tuple[Tokens, dict[Site, Tensor]] | None = None
        self._summed = False
        self._proven = not any(w.kind == "experts" for w in self.graph.writers)
        self.outputs = [w.weight(model) if w.kind == "heads" else None for w in self.graph.writers]
        self._columns = {
            (r.module, r.kind): r.weight(model) for r in self.graph.readers if r.module
        }

    def writes(self, tokens: Tokens, *, cache: Any = None) -> Writes:
        """What every writer writes in the unedited runs of some prompts.

        With `cache`, keys and values of what comes before the tokens, they are its continuation.
        """
        sites = [site for w in self.graph.writers for site in w.sites]
        if not self._proven:
            sites += [tap for r in self.graph.readers if r.beside for tap in (r.tap, r.beside)]
            ends = [site for w in self.graph.writers if w.slots for site in stream_around(w)]
            sites += [site for site in ends if self.model.offers(site)]
        end = self.graph.readers[-1].tap
        sites += [] if self._summed else [end]
        logits, run = last_logits(self.model, tokens, record=sites, cache=cache)
        if not self._proven:
            prove_mixtures(self.graph, run)
            self._proven = True
        values = [w.written(run) for w in self.graph.writers]
        if not self._summed:
            self._prove_sum(values, run[end], tokens.mask.to(logits.device))
        return Writes(values, logits, tokens.ids.to(logits.device))

    def _prove_sum(self, values: list[Tensor], stream: Tensor, mask: Tensor) -> None:
        """The final stream must be what the known parts write, and constants (biases).

        Raises:
            NotOffered: Something else writes to the stream, or rescales it.
        """
        parts = (self.additive(i, v).sum(2) for i, v in enumerate(values))
        total = sum(parts, torch.zeros_like(stream.view(*mask.shape, -1)))
        rest = (stream.view(total.shape) - total)[mask].float()
        gap = float((rest - rest.mean(0)).abs().max())
        slack = max(1e-4, 30 * torch.finfo(stream.dtype).eps) * float(stream.abs().max())
        self._summed = len(rest) > 1  # of a single position nothing can be told
        if gap > slack:
            raise NotOffered(
                "the stream of this model is not the sum of what its known parts write",
                given=f"{self.model!r}: off by {gap:.2g} of {float(stream.abs().max()):.2g}",
                why="another part writes to it, or its blocks rescale it",
                do="use activation_patching or attribution_patching, which need no sum",
            )

    def rows_per_pass(self, columns: int) -> int:
        """How many rows fit into `BUDGET` bytes."""
        width = self.model.d_model or 1
        widest = max(
            sum(r.heads for r in self.graph.readers if r.layer == layer)
            for layer in {r.layer for r in self.graph.readers}
        )
        size = columns * width * 4 * (2 * len(self.graph.sources) + 4 * widest)
        return max(1, BUDGET // max(size, 1))

    def logits(
        self, tokens: Tokens, other: Writes, keep: Keep, *, grad: bool = False
    ) -> Float[Tensor, "rows vocab"]:
        """Logits at each row's last token with edges cut.

        Args:
            tokens: The prompts, one row each.
            other: What cut edges carry; the same prompts' contrast, or one row for all.
            keep: `[source, destination]`, or one for each row. Pairs that are no edge are ignored.
            grad: Keep the graph, so that gradients reach `keep`.

        Cost: one forward, and the norms and projections of every head whose edges are cut. With
        frozen routing one more forward for new prompts.
        """
        state = _Pass(keep.to(self.model.device), other, self._start(tokens, other))
        edits = [e for number in range(len(self.graph.writers)) for e in self._watch(number, state)]
        edits += self._reroute(state)
        edits += self.routing(tokens)
        return last_logits(self.model, tokens, edits, grad=grad)[0]

    def _start(self, tokens: Tokens, other: Writes) -> int:
        """The first column where the runs differ, under a causal model; 0 where that is not known.

        The first column is always run, and padding on the left counts as equal.
        """
        causal = "logits_to_keep" in self.model.forward_names
        if other.ids is None or not causal or other.ids.shape != tokens.ids.shape:
            return 0
        apart = (other.ids != tokens.ids.to(other.ids.device)).any(0).nonzero()
        last = tokens.ids.shape[1] - 1
        return int(apart[0]) if len(apart) else last

    # What is written -----------------------------------------------------------------------------

    def _watch(self, number: int, state: _Pass) -> list[Edit]:
        """Keep what a writer writes in this pass (the activation itself stays as it is)."""
        writer = self.graph.writers[number]
        held: list[tuple[Tensor, Tensor]] = []

        def slots(value: Tensor, index: Tensor) -> Tensor:
            held.append((value, index))
            return value

        def watch(value: Tensor) -> Tensor:
            # A copy: Falcon adds to what its MLP wrote, in place.
            seen, theirs = value.clone(), state.other.values[number]
            seen = writer.spread(*held.pop(), seen) if held else seen
            seen = seen.view(-1, *theirs.shape[1:]) if seen.ndim != theirs.ndim else seen
            late = slice(state.start, None)
            state.mixed.append(self._mixed(number, seen[:, late], theirs[:, late]))
            return value

        edits = [Edit(writer.slots[0], call(slots, slots=True))] if writer.slots else []
        return [*edits, Edit(writer.site, call(watch))]

    def whole(self, number: int, value: Tensor) -> Tensor:
        """What a writer writes as its site has it: for experts, the sum of what each adds."""
        slots = self.graph.writers[number].slots
        return self.split(number, value).sum(2) if slots else value

    def mixed(self, number: int, now: Writes, other: Writes) -> Mixed:
        """A writer's outputs in two runs, ready to be mixed."""
        return self._mixed(number, now.values[number], other.values[number])

    def _mixed(self, number: int, now: Tensor, other: Tensor) -> Mixed:
        norm = self._norm(self.graph.writers[number])
        return Mixed(self.split(number, now), self.split(number, other), *norm)

    def columns(self, reader: Reader) -> tuple[Tensor, Tensor | None]:
        """A reader's share of its projection: `[head, d_model, d_head]`, `[head, d_head]`."""
        return self._columns[reader.module, reader.kind]

    def split(self, number: int, value: Tensor) -> Float[Tensor, "rows pos source d_model"]:
        """What each source of a writer writes, before any norm of the sum."""
        weight = self.outputs[number]
        if weight is None:
            return value.unflatten(-1, (self.graph.writers[number].heads, -1))
        return torch.einsum("bphd,hdm->bphm", value.unflatten(-1, (len(weight), -1)), weight)

    def additive(self, number: int, value: Tensor) -> Float[Tensor, "rows pos source d_model"]:
        """What each source adds to the stream; under a norm, its share with the scale as it is."""
        parts, writer = self.split(number, value), self.graph.writers[number]
        if writer.norm is None:
            return parts
        form, bias = writer.norm[1], self._norm(writer)[1]
        whole = parts.sum(2, keepdim=True)
        scale = form.scale(whole if bias is None else whole + bias).to(parts.dtype)
        return form.centre(parts) / scale * form.gain.to(parts.dtype)

    def _norm(self, writer: Writer) -> tuple[Callable[[Tensor], Tensor] | None, Tensor | None]:
        if writer.norm is None:
            return None, None
        bias = getattr(self.model.module.get_submodule(writer.o_proj), "bias", None)
        return self.model.module.get_submodule(writer.norm[0]).forward, bias

    # Who is chosen -------------------------------------------------------------------------------

    def choices(self, tokens: Tokens) -> dict[Site, Float[Tensor, "rows pos expert"]]:
        """With frozen routing: every router's logits in the unedited run of some prompts."""
        if not self.freeze_routing:
            return {}
        if self._held is None or not _same(self._held[0], tokens):
            _, run = last_logits(self.model, tokens, record=self._routers)
            self._held = tokens, {site: run[site] for site in self._routers}
        return self._held[1]

    def routing(self, tokens: Tokens) -> list[Edit]:
        """With frozen routing: edits that give routers the logits of the unedited run."""
        return [
            Edit(site, call(lambda h, value=value: value.view(h.shape)))
            for site, value in self.choices(tokens).items()
        ]

    # What is read --------------------------------------------------------------------------------

    def _reroute(self, state: _Pass) -> list[Edit]:
        edits: dict[Site, Edit] = {}
        tapped: dict[str, list[int]] = {}
        for number, reader in enumerate(self.graph.readers):
            before = Site("module_in", path=reader.norm) if reader.inside else reader.tap
            if reader.module or reader.inside:
                edits.setdefault(before, Edit(before, call(_keeper(before, state))))
            if reader.module:
                tapped.setdefault(reader.module, []).append(number)
            else:
                edits[reader.tap] = Edit(reader.tap, call(self._instead(number, state)))
        projected = [
            Edit(Site("module", path=path), call(self._project(numbers, state)))
            for path, numbers in tapped.items()
        ]
        return [*edits.values(), *projected]

    def _missing(self, number: int, state: _Pass) -> Tensor | None:
        """What a reader's streams differ by: `[rows late destination d_model]`; None: nothing.

        `late` are the positions from `state.start` on.
        """
        cut = self.graph.read(number)
        total: Tensor | None = None
        for writer in range(self.graph.before(number)):
            sources = self.graph.written(writer)
            gone = 1 - state.keep[..., sources.start : sources.stop, cut.start : cut.stop]
            if not gone.requires_grad and not bool(gone.any()):
                continue
            change = state.mixed[writer].change(gone)
            total = change if total is None else total + change
        return total

    def _instead(self, number: int, state: _Pass) -> Callable[[Tensor], Tensor]:
        """The stream that a reader without heads takes."""
        reader = self.graph.readers[number]

        def instead(value: Tensor) -> Tensor:
            missing = self._missing(number, state)
            # What comes to a router was made for the experts: it may be another stream.
            if missing is None and reader.beside is None:
                return value
            if missing is not None and not reader.inside:
                return _later(value, missing[:, :, 0])
            stream = state.streams[f"module_in:{reader.norm}"]
            if missing is not None:
                stream = _later(stream, missing[:, :, 0])
            return reader.normed(self.model, stream).reshape(value.shape)

        return instead

    def _project(self, numbers: list[int], state: _Pass) -> Callable[[Tensor], Tensor]:
        """A projection's output, each head's columns made from the head's own stream."""

        def project(value: Tensor) -> Tensor:
            whole, out = None, value
            for number in numbers:
                reader = self.graph.readers[number]
                missing = self._missing(number, state)
                if missing is None:
                    continue
                rows, late = missing.shape[:2]
                stream = state.streams[str(reader.tap)].view(rows, -1, missing.shape[-1])
                if whole is None:
                    whole = value.view(*stream.shape[:2], -1)
                    out = whole[:, -late:]
                normed = reader.normed(self.model, stream[:, -late:, None] + missing)
                weight, bias = self.columns(reader)
                made = torch.einsum("bphm,hmd->bphd", normed, weight)
                made = made if bias is None else made + bias
                columns = torch.tensor(reader.columns, device=value.device).flatten()
                out = out.index_copy(-1, columns, made.flatten(-2))
            if whole is None:
                return value
            return torch.cat([whole[:, : whole.shape[1] - out.shape[1]], out], 1).view(value.shape)

        return project


def _later(value: Tensor, more: Float[Tensor, "rows late d_model"]) -> Tensor:
    """A stream with more at its last positions."""
    whole = value.view(more.shape[0], -1, more.shape[-1])
    early = whole.shape[1] - more.shape[1]
    return torch.cat([whole[:, :early], whole[:, early:] + more], 1).view(value.shape)


def _keeper(tap: Site, state: _Pass) -> Callable[[Tensor], Tensor]:
    def keep(value: Tensor) -> Tensor:
        state.streams[str(tap)] = value.clone()
        return value

    return keep


def last_logits(
    model: Model,
    tokens: Tokens,
    edits: Sequence[Edit] = (),
    *,
    record: Sequence[Site] = (),
    grad: bool = False,
    cache: Any = None,
) -> tuple[Float[Tensor, "rows vocab"], Run]:
    """Logits at each row's last token, the others left out where the model can; and the run.

    With `cache`, keys and values of what comes before the tokens, they are its continuation.
    """
    given = model.batch(tokens)[1]
    given |= {} if cache is None else {"past_key_values": cache, "use_cache": True}
    last = torch.tensor([a + b - 1 for a, b in zip(tokens.starts, tokens.lengths, strict=True)])
    if "logits_to_keep" in model.forward_names:
        # As a tensor: a slice is strided, and a head on it runs row by row when nothing is trained.
        kept, last = last.unique(return_inverse=True)
        given = given | {"logits_to_keep": kept.to(model.device)}
    run = model.run(given, record=record, edits=edits, grad=grad)
    if run.logits.shape[1] == 1:  # nothing to choose: no copy, nor one of its gradient
        return run.logits[:, 0], run
    rows = torch.arange(len(last), device=run.logits.device)
    return run.logits[rows, last.to(run.logits.device)], run


def _same(one: Tokens, other: Tokens) -> bool:
    ids, mask = (torch.equal(a, b) for a, b in ((one.ids, other.ids), (one.mask, other.mask)))
    return ids and mask
