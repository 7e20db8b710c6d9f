"""Taps on attention: q, k, v, z, scores and pattern.

Families on transformers' attention interface hand over `(module, q, k, v, mask, ...)` at one
place, `AttentionInterface.get_interface`; wrapping that method for the time of a session gives all
of them, bit for bit and without touching the model's configuration. Scores and pattern live inside
a softmax: a model that runs a fused kernel keeps running it, and the family's own eager function is
called on the side for the layers and query rows that are read; a layer whose scores or pattern are
*edited* takes the eager result instead. Everybody else (GPT-J, BLOOM, Falcon, plain code) is
watched through the torch functions that it calls inside its attention module.

Keys and values are edited where they are born, before the cache keeps them, so an edit in the
prompt persists through generation.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from underhood.core.anatomy import Attention
from underhood.core.errors import NotOffered
from underhood.core.site import Site
from underhood.core.taps.modules import first_tensor, replace_first
from underhood.core.taps.patches import patched
from underhood.core.taps.session import Session, current_session

__all__ = ["AttentionTap", "install"]

INSIDE = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z")
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass(slots=True)
class _Rotation:
    """One call of a rotary function: what went in, what came out, how to do it again."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: tuple[Tensor, ...]


@dataclass(slots=True)
class AttentionTap:
    """One attention module in one session."""

    session: Session
    stack: str
    layer: int
    prefix: str
    spec: Attention
    latent_cache: bool
    wanted: frozenset[str]
    written: frozenset[str]
    born: tuple[Tensor, Tensor] | None = None
    inside: bool = False
    rotations: list[_Rotation] = field(default_factory=list)

    def site(self, name: str) -> Site:
        """The site of this attention."""
        return Site(self.prefix + name, self.layer, stack=self.stack)

    def wants(self, *names: str) -> bool:
        """Whether any of these sites matters."""
        return not self.wanted.isdisjoint(names)

    def writes(self, *names: str) -> bool:
        """Whether any of these sites is edited."""
        return not self.written.isdisjoint(names)

    def heads_last(self, name: str, value: Tensor) -> Tensor:
        """Visit `[batch head pos d]` as `[batch pos head d]` and give it back in its own order."""
        turned = value.transpose(1, 2)
        new = self.session.visit(self.site(name), turned)
        return value if new is turned else new.transpose(1, 2)

    # Queries and keys before rotation ----------------------------------------------------------

    def before_rotation(
        self, which: int, after: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What `after` (post-rotation, `[batch head pos d]`) was before, and the way back.

        Only part of the dimensions may be rotated: first ones or last ones, cut inside the rotary
        function or outside it; that is found by comparing its output with `after`.
        """
        if not self.rotations:
            return after, lambda x: x
        call = self.rotations[-1]
        rotated, plain = call.out[which], call.args[which]
        flip = rotated.shape[1] != after.shape[1] or rotated.shape[2] != after.shape[2]
        if flip:
            rotated, plain = rotated.transpose(1, 2), plain.transpose(1, 2)
        width = rotated.shape[-1]
        if rotated.shape[:3] != after.shape[:3]:
            raise self._unrotated()
        if torch.equal(rotated, after[..., :width]):
            head, tail = after[..., :0], after[..., width:]
        elif torch.equal(rotated, after[..., -width:]):
            head, tail = after[..., :-width], after[..., :0]
        else:
            raise self._unrotated()
        before = torch.cat([head, plain, tail], -1)
        cut = head.shape[-1]

        def back(new: Tensor) -> Tensor:
            part = new[..., cut : cut + width]
            args = list(call.args)
            args[which] = part.transpose(1, 2) if flip else part
            out = call.function(*args, **call.kwargs)[which]
            out = out.transpose(1, 2) if flip else out
            return torch.cat([new[..., :cut], out, new[..., cut + width :]], -1)

        return before, back

    def _unrotated(self) -> NotOffered:
        return NotOffered(
            f"q and k before rotation cannot be told apart in {self.stack}{self.layer}",
            given=self.spec.core,
            why="all heads share one rotated part (multi-head latent attention)",
            do=f"use {self.site('q_rot')} and {self.site('k_rot')}",
        )

    def pre_rotary(self, name: str, which: int, after: Tensor) -> Tensor:
        """Visit q or k before rotation; returns the tensor after rotation."""
        if not self.wants(name):
            return after
        before, back = self.before_rotation(which, after)
        turned = before.transpose(1, 2)
        new = self.session.visit(self.site(name), turned)
        return after if new is turned else back(new.transpose(1, 2))

    # Keys and values ---------------------------------------------------------------------------

    def keys_born(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Visit new keys and values (`[batch head pos d]`), before a cache takes them."""
        key = self.pre_rotary("k", 1, key)
        if self.wants("k_rot"):
            key = self.heads_last("k_rot", key)
        if self.wants("v"):
            value = self.heads_last("v", value)
        return key, value

    def _late_keys(self, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Visit keys and values at the attention call: fine to read, to edit only without cache."""
        if self.born is not None or not self.wants("k", "k_rot", "v"):
            return key, value
        new = length if not self.prefix else key.shape[2]
        tail = slice(key.shape[2] - new, None)
        k, v = self.keys_born(key[:, :, tail], value[:, :, tail])
        if k is key[:, :, tail] and v is value[:, :, tail]:
            return key, value
        frame = self.session.frames.get(self.stack)
        if frame is not None and frame.cached and self.writes("k", "k_rot", "v"):
            raise NotOffered(
                "keys and values of this model cannot be edited under its cache",
                given=self.spec.core,
                why="its cache holds latents, or replaces transformers' update",
                do="edit z or pattern instead, or generate with use_cache=False",
            )
        if key.shape[2] == new:
            return k, v
        old = slice(0, key.shape[2] - new)
        return torch.cat([key[:, :, old], k], 2), torch.cat([value[:, :, old], v], 2)

    # The attention call ------------------------------------------------------------------------

    def call(
        self,
        function: Callable[..., Any],
        eager: Callable[..., Any],
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Run one attention call with its taps; `function` is what the model would have run."""
        query, key, value = qkv
        query = self.pre_rotary("q", 0, query)
        if self.wants("q_rot"):
            query = self.heads_last("q_rot", query)
        key, value = self._late_keys(key, value, query.shape[2])
        self.born, self.rotations = None, []
        native = function is eager
        if self.writes("scores", "pattern") or (native and self.wants("scores", "pattern")):
            plain = mask if native else _additive(mask, query, key, module, kwargs)
            with _SoftmaxTap(self, key.shape[2]):
                out, weights = eager(module, query, key, value, plain, **kwargs)
            weights = weights if native else None
        else:
            out, weights = function(module, query, key, value, mask, **kwargs)
            if self.wants("scores", "pattern"):
                self._look_aside(eager, module, (query, key, value), mask, kwargs)
        if self.wants("z"):
            out = self.session.visit(self.site("z"), out)
        return out, weights

    def _look_aside(
        self,
        eager: Callable[..., Any],
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Read scores and pattern from the eager function, for the query rows that are needed."""
        query, key, value = qkv
        plain = _additive(mask, query, key, module, kwargs)
        columns = self._columns(query)
        if columns is not None:
            query = query[:, :, columns]
            plain = plain[:, :, columns] if plain is not None and plain.shape[2] > 1 else plain
            bias = kwargs.get("position_bias")
            if isinstance(bias, Tensor):
                kwargs = kwargs | {"position_bias": bias[:, :, columns]}
        keep_graph = self.session.grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(keep_graph), _SoftmaxTap(self, key.shape[2], columns):
            eager(module, query, key, value, plain, **kwargs)

    def _columns(self, query: Tensor) -> Tensor | None:
        frame = self.session.frame_for(self.stack, query.shape[0], query.shape[2])
        sites = [self.site(n) for n in ("scores", "pattern") if self.wants(n)]
        wanted = [self.session.wanted_columns(s, frame, query.device) for s in sites]
        if any(w is None for w in wanted):
            return None
        return torch.cat([w for w in wanted if w is not None]).unique()


def _additive(
    mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The mask as the eager function wants it: a float to add to the scores."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    rows, columns = query.shape[2], key.shape[2]
    # Numbers of the query's own precision: a plain float would be float32, and overflow in float64.
    zero, low = query.new_zeros(()), query.new_full((), torch.finfo(query.dtype).min)
    if mask is not None and mask.ndim == 4:
        return torch.where(mask, zero, low) if mask.dtype == torch.bool else mask
    visible = None
    if causal and rows > 1:
        reach = torch.arange(columns, device=query.device)
        # Aligned at the end: the last query sees the last key.
        last = torch.arange(rows, device=query.device) + (columns - rows)
        visible = (reach[None] <= last[:, None])[None, None]
    if mask is not None and mask.ndim == 2:  # flash attention passes the padding mask
        padding = mask[:, None, None, :columns].bool()
        visible = padding if visible is None else visible & padding
    return None if visible is None else torch.where(visible, zero, low)


class _SoftmaxTap(TorchFunctionMode):
    """Visits the scores that enter the softmax over keys and the pattern that leaves it."""

    def __init__(self, tap: AttentionTap, keys: int | None, columns: Tensor | None = None) -> None:
        super().__init__()
        self.tap, self.keys, self.columns = tap, keys, columns

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SOFTMAX or not args or args[0].ndim not in (3, 4):
            return func(*args, **kwargs)
        if args[0].ndim == 3:  # XGLM has batch and heads in one axis
            if not self.tap.spec.heads or args[0].shape[0] % self.tap.spec.heads:
                return func(*args, **kwargs)
            apart = args[0].unflatten(0, (-1, self.tap.spec.heads))
            return self.__torch_function__(func, types, (apart, *args[1:]), kwargs).flatten(0, 1)
        # Attention sinks (gpt-oss) add one column that belongs to no key.
        keys = args[0].shape[-1] if self.keys is None else self.keys
        scores = self._scores(args[0], keys)
        pattern = func(scores, *args[1:], **kwargs)
        return self._visit("pattern", pattern, keys)

    def _scores(self, scores: Tensor, keys: int) -> Tensor:
        if not self.tap.wants("scores"):
            return scores
        masked = scores <= torch.finfo(scores.dtype).min / 2
        shown = torch.where(masked, -torch.inf, scores)
        new = self._visit("scores", shown, keys)
        # What the mask hid stays hidden, whatever an edit wrote there.
        return scores if new is shown else torch.where(masked, scores, new)

    def _visit(self, name: str, value: Tensor, keys: int) -> Tensor:
        if not self.tap.wants(name):
            return value
        own = value[..., :keys]
        forgotten = self._forgotten(keys)
        if forgotten:
            own = F.pad(own, (forgotten, 0), value=-torch.inf if name == "scores" else 0.0)
        new = self.tap.session.visit(self.tap.site(name), own, columns=self.columns)
        if new is own:
            return value
        return torch.cat([new[..., forgotten:], value[..., keys:]], -1)

    def _forgotten(self, keys: int) -> int:
        """Earlier keys that a sliding-window cache has dropped; key numbers stay absolute."""
        frame = self.tap.session.frames.get(self.tap.stack)
        if frame is None or not frame.cached or self.tap.prefix:
            return 0
        return max(frame.start + frame.length - keys, 0)


# Installing --------------------------------------------------------------------------------------


def _taps(session: Session) -> dict[int, AttentionTap]:
    """Attention modules that matter in this session, by identity."""
    config = getattr(session.module, "config", None)
    latent = getattr(config, "kv_lora_rank", None) is not None
    asked: dict[tuple[str, int, str], set[str]] = defaultdict(set)
    for site in session.sites:
        prefix = "cross_" if site.name.startswith("cross_") else ""
        name = site.name.removeprefix(prefix)
        if name in INSIDE and site.layer is not None:
            asked[site.stack, site.layer, prefix].add(name)
    found: dict[int, AttentionTap] = {}
    for (stack, layer, prefix), names in sorted(asked.items()):
        tower = session.anatomy.stacks.get(stack)
        if tower is None or layer >= len(tower.blocks):
            continue
        block = tower.blocks[layer]
        spec = block.cross if prefix else block.attention
        if spec is None:
            continue
        sites = {n: Site(prefix + n, layer, stack=stack) for n in names}
        written = frozenset(n for n, s in sites.items() if session.writes(s))
        core = session.module.get_submodule(spec.core)
        found[id(core)] = AttentionTap(
            session, stack, layer, prefix, spec, latent, frozenset(names), written
        )
    return found


_BY_SESSION: dict[int, dict[int, AttentionTap]] = {}


def _tap_of(module: nn.Module) -> AttentionTap | None:
    session = current_session()
    return None if session is None else _BY_SESSION.get(id(session), {}).get(id(module))


def _inside() -> AttentionTap | None:
    """The attention whose forward is running in this thread."""
    session = current_session()
    taps = _BY_SESSION.get(id(session), {}) if session is not None else {}
    return next((t for t in taps.values() if t.inside), None)


def install(session: Session, stack: ExitStack) -> None:
    """Install what the requested attention sites need, and nothing else."""
    taps = _taps(session)
    if not taps:
        return
    _BY_SESSION[id(session)] = taps
    stack.callback(_BY_SESSION.pop, id(session))
    for tap in taps.values():
        module = session.module.get_submodule(tap.spec.core)
        if not tap.spec.interface:
            _install_plain(tap, module, stack)
        elif tap.wants("q", "k") or tap.writes("k_rot", "v"):
            stack.enter_context(patched(module, "forward", _wrap_forward))
    if any(t.spec.interface for t in taps.values()):
        from transformers import AttentionInterface

        stack.enter_context(patched(AttentionInterface, "get_interface", _wrap_interface))
    if any(t.writes("k", "k_rot", "v") for t in taps.values()):
        from transformers import Cache

        stack.enter_context(patched(Cache, "update", _wrap_cache_update))
    if any(t.wants("q", "k") for t in taps.values()):
        for tap in taps.values():
            scope = sys.modules[type(session.module.get_submodule(tap.spec.core)).__module__]
            for name in tap.spec.rotary:
                stack.enter_context(patched(scope, name, _wrap_rotary))


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the attention that is running, so that rotations and cache updates find it."""
    module = getattr(original, "__self__", None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tap = _tap_of(module) if module is not None else None
        if tap is None:
            return original(*args, **kwargs)
        tap.inside, tap.born, tap.rotations = True, None, []
        try:
            return original(*args, **kwargs)
        finally:
            tap.inside = False

    return forward


def _wrap_interface(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(registry: Any, implementation: Any, default: Callable[..., Any]) -> Any:
        function = original(registry, implementation, default)
        session = current_session()
        if session is None or id(session) not in _BY_SESSION:
            return function

        def tapped(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
            attention_mask: Tensor | None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            tap = _tap_of(module)
            if tap is None:
                return function(module, query, key, value, attention_mask, **kwargs)
            return tap.call(function, default, module, (query, key, value), attention_mask, kwargs)

        return tapped

    return get_interface


def _wrap_cache_update(original: Callable[..., Any]) -> Callable[..., Any]:
    def update(cache: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        tap = _inside()
        # A latent cache (MLA) holds no keys or values; they are refused at the attention call.
        if tap is not None and not tap.latent_cache and tap.born is None:
            key, value = tap.keys_born(key, value)
            tap.born = (key, value)
        return original(cache, key, value, *args, **kwargs)

    return update


def _wrap_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        tap = _inside()
        if tap is not None and isinstance(out, tuple):
            tap.rotations.append(_Rotation(original, args, kwargs, out))
        return out

    return rotate


# Families that are not on the interface ---------------------------------------------------------


class _TorchAttention(_SoftmaxTap):
    """Watches the torch functions inside one attention module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.tap.wants("scores", "pattern"):
            return super().__torch_function__(func, types, args, kwargs)
        return self._fused(func, args, kwargs)

    def _fused(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A fused kernel: its pattern is computed beside it, or instead of it when edited."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = given["query"], given["key"], given["value"]
        causal = bool(given.get("is_causal"))
        mask = _additive(given.get("attn_mask"), query, key, nn.Module(), {"is_causal": causal})
        scale = given.get("scale") or query.shape[-1] ** -0.5
        groups = query.shape[1] // key.shape[1]
        wide_key = key.repeat_interleave(groups, 1) if groups > 1 else key
        scores = query @ wide_key.transpose(-1, -2) * scale
        scores = scores if mask is None else scores + mask
        keys = key.shape[-2]
        pattern = self._visit("pattern", F.softmax(self._scores(scores, keys), -1), keys)
        if not self.tap.writes("scores", "pattern"):
            return func(*args, **kwargs)
        wide_value = value.repeat_interleave(groups, 1) if groups > 1 else value
        return pattern.to(query.dtype) @ wide_value


def _wrap_plain(original: Callable[..., Any]) -> Callable[..., Any]:
    module = getattr(original, "__self__", None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tap = _tap_of(module) if module is not None else None
        if tap is None:
            return original(*args, **kwargs)
        with _TorchAttention(tap, None):
            return original(*args, **kwargs)

    return forward


def _install_plain(tap: AttentionTap, module: nn.Module, stack: ExitStack) -> None:
    """q, k, v from separate projections, z from the output projection's input, the rest inside."""
    spec, root = tap.spec, tap.session.module
    if tap.wants("scores", "pattern"):
        stack.enter_context(patched(module, "forward", _wrap_plain))
    for name in ("q", "k", "v"):
        path = spec.projections.get(f"{name}_proj")
        heads = spec.heads if name == "q" else spec.kv_heads
        if path and heads and tap.wants(name):
            _hook_heads(tap, stack, root.get_submodule(path), "out", name, heads)
    if spec.o_proj and spec.heads and tap.wants("z"):
        _hook_heads(tap, stack, root.get_submodule(spec.o_proj), "in", "z", spec.heads)


def _hook_heads(
    tap: AttentionTap, stack: ExitStack, module: nn.Module, side: str, name: str, heads: int
) -> None:
    def change(flat: Tensor) -> Tensor:
        split = flat.unflatten(-1, (heads, -1))
        new = tap.session.visit(tap.site(name), split)
        return flat if new is split else new.flatten(-2)

    def before(_m: nn.Module, args: tuple[Any, ...]) -> Any:
        return (change(args[0]), *args[1:]) if current_session() is tap.session else None

    def after(_m: nn.Module, _args: Any, output: Any) -> Any:
        old = first_tensor(output)
        if old is None or current_session() is not tap.session:
            return None
        return replace_first(output, change(old))

    handle = (
        module.register_forward_pre_hook(before, prepend=True)
        if side == "in"
        else module.register_forward_hook(after, prepend=True)
    )
    stack.callback(handle.remove)
