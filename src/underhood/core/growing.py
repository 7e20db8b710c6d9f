"""The shared-prefix engine: many single edits on one prompt, each layer walked once.

All cells of a sweep agree with the unedited run until their edit. So one pass serves them all:

- positions before the first edited one are run once and kept as a KV cache, shared by all rows;
- the pass starts with one row, the unedited run; a cell's row is split off from it on entering the
  layer where the cell's first edit stands, so the batch grows while it walks the layers;
- cells are grouped by position, since an edit at a late position needs few columns;
- only the last position's logits are computed.

Everything is exact: the same modules run on the same numbers, in other company. The unedited row
goes all the way through, and its logits must equal those of a bare pass; where they do not (a
family that couples rows, or hides state that we do not see), the sweep falls back to plain batching
and says so.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.core.anatomy import Stack
from underhood.core.edit import Edit, Fired, Plan, in_rows
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.sweep_tail import Tail
from underhood.core.taps import Session, current_session
from underhood.core.taps.modules import first_tensor, replace_first
from underhood.core.taps.patches import evaluating
from underhood.core.tokens import Tokens

__all__ = ["CannotShare", "Growing", "groups", "pays", "why_not"]

TOLERANCE = 1e-4  # of the largest logit: the unedited row against a bare pass
ROUNDINGS = 4  # the same in steps of the model's own precision, where that is coarser
MARGIN = 1.5  # whole rows must be this much cheaper to be preferred
OVERHEAD = 300  # what a pass costs by itself, in row-columns of one layer


class CannotShare(Exception):
    """The engine met something at run time that rows cannot share; the message says what."""


def why_not(model: Model, plans: Sequence[Plan], lengths: Sequence[int] = ()) -> str | None:
    """Why cells of a model cannot share their prefix; None when they can.

    Args:
        model: The model.
        plans: The cells, concrete.
        lengths: Tokens of each prompt.
    """
    stack = model.anatomy.stacks.get("")
    if stack is None or len(model.anatomy.stacks) > 1 or model.main != "":
        return "the model has other stacks than one decoder"
    names = model.forward_names
    if "past_key_values" not in names or "logits_to_keep" not in names:
        return "the model's forward takes no cache, or computes all logits"
    for block in stack.blocks:
        if block.attention is None or not block.attention.interface or block.scan is not None:
            return "some layers keep a state that is not a key/value cache"
        if not block.norm_first and block.post_norms:
            return "the model is an encoder"
    if getattr(model.config, "kv_lora_rank", None) is not None:
        return "its cache holds latents"
    for plan in plans:
        for edit in plan:
            if edit.gate is not None or not _inside(edit.site, stack):
                return "some edits stand outside the layers, or are gated"
            if "key" in edit.site.kind.axes and len(set(lengths)) > 1:
                return "patterns of prompts of different length are edited"
    return None


def _inside(site: Site, stack: Stack) -> bool:
    """Whether a site lies in one of the blocks, and `_layer` tells which."""
    if not site.path:
        return site.layer is not None
    layer = _layer(site)
    return layer < len(stack.blocks) and f"{site.path}.".startswith(f"{stack.blocks[layer].path}.")


def _layer(site: Site) -> int:
    """The block of a site; of a module's path, the first number in it."""
    if not site.path:
        return site.layer or 0
    return next((int(part) for part in site.path.split(".") if part.isdecimal()), 0)


def _first_layer(plan: Plan) -> int:
    return min(_layer(edit.site) for edit in plan)


def _first_position(plan: Plan, length: int) -> int:
    """The first position at which a cell can differ from the unedited run."""
    first = length - 1
    for edit in plan:
        if edit.where.pos is None:
            return 0
        first = min(first, *(p % length for p in edit.where.pos))
    return first


def groups(plans: Sequence[Plan], length: int, layers: int, rows: int) -> list[list[int]]:
    """Cells that share a pass: neighbours in position, so that none carries columns in vain.

    The cut minimises the modelled cost: a pass over cells with first position p and depths d costs
    (length - p) * (sum of d + layers) row-columns, plus a constant.
    """
    spots = [_first_position(plan, length) for plan in plans]
    depth = [layers - _first_layer(plan) for plan in plans]
    by_spot: dict[int, list[int]] = {}
    for cell in sorted(range(len(plans)), key=lambda i: (spots[i], _first_layer(plans[i]))):
        by_spot.setdefault(spots[cell], []).append(cell)
    keys = sorted(by_spot)
    work = [sum(depth[c] for c in by_spot[k]) for k in keys]
    best: list[float] = [0.0] + [float("inf")] * len(keys)
    cut = [0] * (len(keys) + 1)
    for end in range(1, len(keys) + 1):
        for start in range(end):
            cost = (length - keys[start]) * (sum(work[start:end]) + layers) + OVERHEAD * layers
            if best[start] + cost < best[end]:
                best[end], cut[end] = best[start] + cost, start
    found: list[list[int]] = []
    end = len(keys)
    while end:
        cells = [c for k in keys[cut[end] : end] for c in by_spot[k]]
        cells.sort(key=lambda c: -depth[c])
        found = [cells[i : i + rows] for i in range(0, len(cells), rows)] + found
        end = cut[end]
    return found


def pays(plans: Sequence[Plan], lengths: Sequence[int], layers: int, rows: int) -> bool:
    """Whether sharing is worth it: many prompts with few cells each are quicker as whole rows.

    Prompts go through the engine one by one, and a pass has its price; both ways are priced as in
    `groups`, and whole rows are preferred where they cost clearly less.
    """
    length, batch = max(lengths), len(lengths)
    shared = 0
    for cells in groups(plans, length, layers, rows):
        start = min(_first_position(plans[c], length) for c in cells)
        depth = sum(layers - _first_layer(plans[c]) for c in cells)
        shared += (length - start) * (depth + layers) + OVERHEAD * layers
    whole = len(plans) * batch
    passes = -(-whole // rows)
    return shared * batch <= MARGIN * layers * (whole * length + passes * OVERHEAD)


class Growing:
    """Runs cells of one sweep on single prompts.

    Args:
        model: A model for which `why_not` is None.
        tokens: The prompts.
        plans: The cells, concrete.
        tail: Which logits are made; default all.
        before: Called before each forward; it may raise.
        room: Bytes that caches of prefixes may hold between passes; the newest one always stays.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        plans: Sequence[Plan],
        *,
        tail: Tail | None = None,
        before: Callable[[], None] | None = None,
        room: int | None = None,
    ) -> None:
        self.model, self.plans, self.batch = model, plans, len(tokens)
        self.prompts = [tokens.row(i).to(model.device) for i in range(len(tokens))]
        self.tail, self._before = tail or Tail(model), before or (lambda: None)
        self.passes = 0
        self.places: Counter[tuple[int, int]] = Counter()
        self.moved = torch.zeros(len(plans))
        self._bare: dict[int, tuple[Tensor, float]] = {}
        self._prefixes: dict[tuple[int, int], Any] = {}
        self._room = room
        stack = model.anatomy.stacks[""]
        text = getattr(model.config, "text_config", None) or model.config
        self._windowed = getattr(text, "sliding_window", None) is not None
        self._lends = bool(getattr(text, "num_kv_shared_layers", None))
        self._blocks = [model.module.get_submodule(block.path) for block in stack.blocks]
        self._tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(model.dtype).eps)

    def start(self, cells: Sequence[int], prompt: int) -> int:
        """The first position that a pass over some cells runs."""
        if self._windowed and any("key" in e.site.kind.axes for c in cells for e in self.plans[c]):
            return 0  # a windowed cache drops keys, and the edit counts all of them
        length = self.prompts[prompt].ids.shape[1]
        return min(_first_position(self.plans[c], length) for c in cells)

    def concerned(self, cells: Sequence[int], prompt: int) -> list[int]:
        """The cells that edit anything in a prompt, in the order in which their rows join."""
        rows = range(prompt, prompt + 1)
        order = sorted(cells, key=lambda c: _first_layer(self.plans[c]))
        return [
            c for c in order
            if any(in_rows(e, rows, 0, self.batch) is not None for e in self.plans[c])
        ]  # fmt: skip

    def depths(self, cells: Sequence[int]) -> list[int]:
        """Layers that each cell's row walks."""
        return [len(self._blocks) - _first_layer(self.plans[c]) for c in cells]

    def logits(self, cells: Sequence[int], prompt: int) -> Float[Tensor, "cell column"]:
        """Last-position logits of one prompt under each of some cells.

        Raises:
            CannotShare: The unedited row did not come out as a bare pass does.
        """
        joins: Counter[int] = Counter()
        row: dict[int, int] = {}
        edits: dict[tuple[int, int], Edit] = {}
        for cell in self.concerned(cells, prompt):
            own = [in_rows(e, range(prompt, prompt + 1), 1 + len(row), self.batch)
                   for e in self.plans[cell]]  # fmt: skip
            joins[_first_layer(self.plans[cell])] += 1
            row[cell] = 1 + len(row)
            edits |= {(cell, n): e for n, e in enumerate(own) if e is not None}
        found = self._pass(prompt, self.start(cells, prompt), joins, edits)
        bare, size = self._bare_logits(prompt)
        gap = float((found[0] - bare).abs().max())
        if not gap <= self._tolerance * size:
            raise CannotShare(f"the unedited row came out {gap:.1e} beside a bare pass")
        return found[[row.get(cell, 0) for cell in cells]]

    def _bare_logits(self, prompt: int) -> tuple[Float[Tensor, " column"], float]:
        """Last-position logits of the unedited run, and the size of the largest of them all."""
        if prompt not in self._bare:
            logits = self._forward(self.prompts[prompt].ids).logits[0, -1].float()
            size = max(float(logits.abs().max()), 1.0)
            self._bare[prompt] = self.tail.pick(logits), size
        return self._bare[prompt]

    def _prefix(self, prompt: int, start: int) -> Any:
        """The cache of a prompt's first `start` tokens."""
        key = (prompt, start)
        if key not in self._prefixes:
            ids = self.prompts[prompt].ids[:, :start]
            made = self._forward(ids, narrow=True, use_cache=True).past_key_values
            while self._prefixes and not self._fits(made):
                del self._prefixes[next(iter(self._prefixes))]
            self._prefixes[key] = made
        return self._prefixes[key]

    def _fits(self, made: Any) -> bool:
        """Whether one more prefix may be kept beside those that are."""
        return self._room is None or sum(map(_held, [*self._prefixes.values(), made])) <= self._room

    def _forward(self, ids: Tensor, *, narrow: bool = False, **options: Any) -> Any:
        self._before()
        self.passes += 1
        options = {"use_cache": False} | options
        narrowed = self.tail.narrowed() if narrow else nullcontext()
        with evaluating(self.model.module), torch.no_grad(), narrowed:
            return self.model.module(input_ids=ids, logits_to_keep=1, **options)

    def _pass(
        self,
        prompt: int,
        start: int,
        joins: Counter[int],
        edits: dict[tuple[int, int], Edit],
    ) -> Float[Tensor, "row column"]:
        """One growing pass; row 0 is the unedited run."""
        ids = self.prompts[prompt].ids[:, start:]
        options: dict[str, Any] = {}
        if start:
            cache = _spreading(self._prefix(prompt, start), keep=self._lends)
            options = {"past_key_values": cache, "use_cache": True}
        session = Session(self.model.module, self.model.anatomy, Plan(edits.values()))
        with session, ExitStack() as stack:
            for layer, count in joins.items():
                hook = _split(session, count)
                block = self._blocks[layer]
                # Put before the session's own hooks: they must find the new rows in place.
                handle = block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            found = self._forward(ids, narrow=True, **options).logits[:, -1]
        found = self.tail.pick(found).float()
        self._note(edits, session.close_report(must_fire=False))
        return found

    def _note(self, edits: dict[tuple[int, int], Edit], fired: list[Fired]) -> None:
        for (cell, number), entry in zip(edits, fired, strict=True):
            self.places[cell, number] += entry.places
            self.moved[cell] = max(float(self.moved[cell]), entry.moved)


def _split(session: Session, count: int) -> Any:
    """A pre-hook that adds `count` copies of the unedited row before a block runs."""

    def grow(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if current_session() is not session:
            return None
        inside = first_tensor(args) is not None
        hidden = first_tensor(args) if inside else kwargs["hidden_states"]
        assert hidden is not None
        grown = torch.cat([hidden, hidden[:1].expand(count, *hidden.shape[1:])])
        frame = session.frames[""]
        frame.batch = len(grown)
        frame.ids = frame.ids[:1].expand(len(grown), -1) if frame.ids is not None else None
        frame.cache.clear()
        if inside:
            return replace_first(args, grown), kwargs
        return args, kwargs | {"hidden_states": grown}

    return grow


def _held(cache: Any) -> int:
    """Bytes of a cache."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def _spreading(prefix: Any, *, keep: bool) -> Any:
    """A copy of a one-row cache that gives its keys and values to as many rows as ask.

    Nobody comes back for what the rows add, so it is let go of layer by layer, unless other layers
    borrow it (`keep`).
    """
    cache = copy.deepcopy(prefix)

    def update(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = cache.layers[layer_idx]
        before = layer.keys, layer.values
        if layer.keys is not None and layer.keys.shape[0] != key.shape[0]:
            layer.keys = layer.keys.expand(key.shape[0], *layer.keys.shape[1:])
            layer.values = layer.values.expand(value.shape[0], *layer.values.shape[1:])
        # By way of the class, where a session may be listening.
        found = type(cache).update(cache, key, value, layer_idx, *args, **kwargs)
        if not keep:
            layer.keys, layer.values = before
        return found

    cache.update = update
    return cache
