"""Taps on mixtures of experts: router logits, the choice, and each chosen expert by itself.

Transformers batches experts into 3-D weights, so there is no module per expert to hook. A read of
`expert_post` or `expert_out` recomputes the chosen experts one by one beside the model's own fused
call (which still runs); an edit takes the one-by-one result instead. Router logits are visited
between the router's projection and its softmax and top-k, so an edited logit routes as it should.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from underhood.core.anatomy import Experts
from underhood.core.errors import EditNeverFired
from underhood.core.ops import Route
from underhood.core.site import Site
from underhood.core.taps.patches import patched
from underhood.core.taps.session import Session, current_session

__all__ = ["install", "router_logits"]


@dataclass(slots=True)
class _ExpertTap:
    session: Session
    stack: str
    layer: int
    spec: Experts
    index: Tensor | None = None

    def site(self, name: str) -> Site:
        return Site(name, self.layer, stack=self.stack)

    def wants(self, *names: str) -> bool:
        return any(self.session.wants(self.site(n)) for n in names)

    def fold(self, flat: Tensor) -> Tensor:
        """`[batch*pos, ...]` as `[batch, pos, ...]`."""
        frame = self.session.frames.get(self.stack)
        if frame is None or frame.batch * frame.length != flat.shape[0]:
            return flat[None]
        return flat.view(frame.batch, frame.length, *flat.shape[1:])

    def visit(self, name: str, flat: Tensor, slots: Tensor | None = None) -> Tensor:
        value = self.fold(flat)
        new = self.session.visit(
            self.site(name), value, slots=None if slots is None else self.fold(slots)
        )
        return flat if new is value else new.reshape(flat.shape)


_BY_SESSION: dict[int, dict[int, _ExpertTap]] = {}


def _tap_of(module: Any) -> _ExpertTap | None:
    session = current_session()
    return None if session is None else _BY_SESSION.get(id(session), {}).get(id(module))


def install(session: Session, stack: ExitStack) -> None:
    """Install what the requested expert sites need."""
    taps: dict[int, _ExpertTap] = {}
    slots = False
    for name, tower in session.anatomy.stacks.items():
        for layer, block in enumerate(tower.blocks):
            if block.experts is None:
                continue
            tap = _ExpertTap(session, name, layer, block.experts)
            router, experts = block.experts.router, block.experts.experts
            if router and tap.wants("router_logits", "router_weights", "router_index"):
                module = session.module.get_submodule(router)
                taps[id(module)] = tap
                stack.enter_context(patched(module, "forward", _wrap_router))
            if experts and tap.wants("expert_post", "expert_out"):
                taps[id(session.module.get_submodule(experts))] = tap
                slots = True
    if not taps:
        return
    _BY_SESSION[id(session)] = taps
    stack.callback(_BY_SESSION.pop, id(session))
    if slots:
        from transformers.integrations.moe import ExpertsInterface

        stack.enter_context(patched(ExpertsInterface, "get_interface", _wrap_interface))


class _RouterTap(TorchFunctionMode):
    """Passes the router's projection through `change` as it leaves `F.linear`."""

    def __init__(self, count: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.count, self.change = count, change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and out.shape[-1] == self.count:
            flat = out.reshape(-1, out.shape[-1])
            new = self.change(flat)
            return out if new is flat else new.view_as(out)
        return out


def router_logits(router: nn.Module, count: int, hidden: Tensor) -> Tensor:
    """What a router of `count` experts thinks of its input, past any hooks: `[tokens, count]`."""
    seen: list[Tensor] = []

    def keep(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits

    with _RouterTap(count, keep):
        router.forward(hidden)
    return seen[0]


def _wrap_router(original: Callable[..., Any]) -> Callable[..., Any]:
    module = getattr(original, "__self__", None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tap = _tap_of(module)
        if tap is None:
            return original(*args, **kwargs)
        with _RouterTap(tap.spec.count, lambda logits: tap.visit("router_logits", logits)):
            out = original(*args, **kwargs)
        tensors = [t for t in out if isinstance(t, Tensor)] if isinstance(out, tuple) else []
        index = next((t for t in tensors if not t.is_floating_point()), None)
        if index is not None:
            _check_obeyed(tap, index)
            weights = [t for t in tensors if t.is_floating_point() and t.shape == index.shape]
            if weights and tap.wants("router_weights"):
                tap.visit("router_weights", weights[-1].reshape(-1, index.shape[-1]))
            if tap.wants("router_index"):
                tap.visit("router_index", index.reshape(-1, index.shape[-1]))
        return out

    return forward


def _check_obeyed(tap: _ExpertTap, index: Tensor) -> None:
    """A forbidden expert that was chosen, or a forced one that was not, is an error.

    Routers that add a bias after a sigmoid, or choose among groups first (DeepSeek-V3), can do so.
    """
    index = tap.fold(index.reshape(-1, index.shape[-1]))
    for edit in tap.session.plan:
        if edit.site.whole != tap.site("router_logits") or not isinstance(edit.op, Route):
            continue
        if edit.strength != 1.0 or edit.gate is not None or edit.schedule is not None:
            continue
        frame = tap.session.frame_for(tap.stack, index.shape[0], index.shape[1])
        mask = edit.where.select(frame, index.device)
        chosen = index if mask is None else index[mask]
        broken = [e for e in edit.op.forbid if bool((chosen == e).any())]
        if len(edit.op.force) <= index.shape[-1]:
            broken += [e for e in edit.op.force if not bool((chosen == e).any(-1).all())]
        if broken:
            raise EditNeverFired(
                f"the router did not obey about experts {sorted(broken)}",
                given=f"{edit!r}: forbid {edit.op.forbid}, force {edit.op.force}",
                why="this router adds a bias after scoring, or chooses groups of experts first",
                do="silence an expert by what it adds: Edit('expert_out.LAYER.EXPERT', zero())",
            )


def _wrap_interface(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(registry: Any, implementation: Any, default: Callable[..., Any]) -> Any:
        function = original(registry, implementation, default)

        def tapped(module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            tap = _tap_of(module)
            if tap is None:
                return function(module, hidden, *args, **kwargs)
            index = kwargs.get("top_k_index", args[0] if args else None)
            weights = kwargs.get("top_k_weights", args[1] if len(args) > 1 else None)
            assert index is not None and weights is not None
            edited = tap.session.writes(tap.site("expert_post"))
            edited |= tap.session.writes(tap.site("expert_out"))
            if edited:
                return _one_by_one(tap, module, hidden, index, weights)
            out = function(module, hidden, *args, **kwargs)
            with torch.set_grad_enabled(tap.session.grad and torch.is_grad_enabled()):
                _one_by_one(tap, module, hidden, index, weights)
            return out

        return tapped

    return get_interface


def _one_by_one(
    tap: _ExpertTap, module: Any, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """The expert layer with each (token, slot) apart: `[N, K, neuron]`, then `[N, K, d_model]`."""
    neurons = _each(module, hidden[:, None].expand(-1, index.shape[1], -1), index, _up)
    neurons = tap.visit("expert_post", neurons, index)
    outputs = _each(module, neurons, index, _down)
    outputs = tap.visit("expert_out", outputs * weights[..., None].to(outputs.dtype), index)
    return outputs.sum(1).to(hidden.dtype)


def _each(
    module: Any, inputs: Tensor, index: Tensor, half: Callable[[Any, Tensor, int], Tensor]
) -> Tensor:
    """Apply one half of each slot's expert; slots of the same expert go together."""
    parts: list[Tensor] = []
    places: list[Tensor] = []
    for expert in index.unique().tolist():
        if not 0 <= expert < module.num_experts:
            continue  # sentinel of expert parallelism
        place = (index == expert).nonzero()
        parts.append(half(module, inputs[place[:, 0], place[:, 1]], expert))
        places.append(place)
    place = torch.cat(places)
    flat = torch.cat(parts)
    out = flat.new_zeros(*index.shape, flat.shape[-1])
    return out.index_put((place[:, 0], place[:, 1]), flat)


def _matmul(module: Any, x: Tensor, name: str, expert: int) -> Tensor:
    weight = getattr(module, name)[expert]
    out = x.to(weight.dtype) @ (weight if module.is_transposed else weight.T)
    return out + getattr(module, name + "_bias")[expert] if module.has_bias else out


def _up(module: Any, x: Tensor, expert: int) -> Tensor:
    if module.has_gate:
        return module._apply_gate(_matmul(module, x, "gate_up_proj", expert))
    return module.act_fn(_matmul(module, x, "up_proj", expert))


def _down(module: Any, x: Tensor, expert: int) -> Tensor:
    out = _matmul(module, x, "down_proj", expert)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out
