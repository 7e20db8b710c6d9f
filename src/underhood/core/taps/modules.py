"""Taps on torch modules: everything that is some module's input or output.

A `Point` of the anatomy says which module, which side, which share. Tensors are visited in the
site's canonical axes: flattened batches (`[batch*pos, d]`) are folded back, fused projections are
cut, scaled sub-layers are scaled.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from underhood.core.anatomy import Block, Point, Stack
from underhood.core.errors import NotOffered
from underhood.core.site import Site
from underhood.core.taps.session import Session, current_session

__all__ = ["first_tensor", "install", "replace_first", "weight_in_out"]


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of a module's output: itself, or the first in a tuple or model output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((t for v in value if (t := first_tensor(v)) is not None), None)
    return None


def replace_first(value: Any, new: Tensor) -> Any:
    """The same structure with its first tensor replaced."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, dict):
        key = next(k for k, v in value.items() if first_tensor(v) is not None)
        copy = value.copy() if type(value) is dict else type(value)(**value)
        copy[key] = replace_first(value[key], new)
        return copy
    items = list(value)
    index = next(i for i, v in enumerate(items) if first_tensor(v) is not None)
    items[index] = replace_first(items[index], new)
    return tuple(items) if type(value) is tuple else type(value)(items)


def install(session: Session, stack: ExitStack) -> None:
    """Hook every requested site that is a module's input or output."""
    # Hooks are put before those that are there already, so that whoever else listens (transformers'
    # own output capture, the user) sees edited values; hence the last one installed runs first, and
    # `resid_mid` is installed first: `mlp_out` must be seen before its change is carried over.
    for site in sorted(session.sites, key=lambda s: s.name != "resid_mid"):
        if site.path:
            _hook_path(session, stack, site)
        elif site.name == "logits":
            _hook_logits(session, stack, site)
        elif site.name.endswith("_scale"):
            _hook_scale(session, stack, site)
        elif site.name in ("head_out", "cross_head_out"):
            _hook_head_out(session, stack, site)
        else:
            _hook_site(session, stack, site)


def _hook_site(session: Session, stack: ExitStack, site: Site) -> None:
    tower = session.anatomy.stacks.get(site.stack)
    if tower is None:
        return
    point, block = _point(tower, site)
    if point is None:
        return
    carried = block is not None and site.name == "resid_mid" and block.mid_is_shared
    if carried and block is not None and session.writes(site):
        _hook_carried(session, stack, site, point, block)
    else:
        _hook_point(session, stack, site, point)


def _point(tower: Stack, site: Site) -> tuple[Point | None, Block | None]:
    if not site.kind.layered:
        return tower.points.get(site.name), None
    if site.layer is None or site.layer >= len(tower.blocks):
        return None, None
    block = tower.blocks[site.layer]
    return block.points.get(site.name), block


def _hook(
    session: Session,
    stack: ExitStack,
    module: nn.Module,
    side: str,
    change: Callable[[Tensor], Tensor],
) -> None:
    """Pass a module's first input or output through `change` while the session is active."""

    # Without keywords only when another thread has just removed its hook (see `_watch_passes`).
    def before(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if current_session() is not session or kwargs is None:
            return None
        if first_tensor(args) is not None:
            old = first_tensor(args)
            assert old is not None
            new = change(old)
            return None if new is old else (replace_first(args, new), kwargs)
        key = next(
            (k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), None
        )
        if key is None:
            return None
        new = change(kwargs[key])
        return None if new is kwargs[key] else (args, kwargs | {key: new})

    def after(_m: nn.Module, _args: Any, output: Any) -> Any:
        if current_session() is not session:
            return None
        old = first_tensor(output)
        if old is None:
            return None
        new = change(old)
        return None if new is old else replace_first(output, new)

    if side == "in":
        handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    else:
        handle = module.register_forward_hook(after, prepend=True)
    stack.callback(handle.remove)


def _canonical(session: Session, site: Site, value: Tensor) -> Tensor:
    """`[batch*pos, d]` or `[pos, d]` or `[batch, d]` as `[batch, pos, d]`."""
    if value.ndim != 2:
        return value
    frame = session.frames.get(site.stack)
    if frame is not None and value.shape[0] == frame.batch * frame.length:
        return value.view(frame.batch, frame.length, -1)
    if frame is not None and value.shape[0] == frame.batch:
        return value[:, None]
    return value[None]


def _hook_point(session: Session, stack: ExitStack, site: Site, point: Point) -> None:
    beside = _hook_beside(session, stack, point) if point.plus else None

    def change(raw: Tensor) -> Tensor:
        value = _canonical(session, site, raw)
        if point.chunk is not None:
            return _change_chunk(session, site, raw, value, point.chunk)
        shown = value * point.scale if point.scale != 1.0 else value
        other = beside(raw).view_as(shown) if beside is not None else None
        shown = shown if other is None else shown + other
        new = session.visit(site, shown)
        if new is shown:
            return raw
        new = new if other is None else new - other
        return (new / point.scale if point.scale != 1.0 else new).reshape(raw.shape)

    _hook(session, stack, session.module.get_submodule(point.path), point.side, change)


def _change_chunk(
    session: Session, site: Site, raw: Tensor, value: Tensor, chunk: tuple[int, int]
) -> Tensor:
    index, of = chunk
    parts = list(value.chunk(of, -1))
    new = session.visit(site, parts[index])
    if new is parts[index]:
        return raw
    parts[index] = new
    return torch.cat(parts, -1).view_as(raw)


def _hook_beside(session: Session, stack: ExitStack, point: Point) -> Callable[[Tensor], Tensor]:
    """Keep what the module beside a point writes, until the point's own module has run."""
    plus, held = point.plus, []
    assert plus is not None

    def keep(raw: Tensor) -> Tensor:
        held[:] = [raw * plus.scale if plus.scale != 1.0 else raw]
        return raw

    def take(raw: Tensor) -> Tensor:
        if not held or held[0].numel() != raw.numel():
            raise NotOffered(
                "two parts that are added up did not run in the expected order",
                given=f"{plus.path} before {point.path}",
                why="what they add to the stream together is not known when the second one ends",
                do="use module: sites for each of them",
            )
        return held.pop()

    _hook(session, stack, session.module.get_submodule(plus.path), "out", keep)
    return take


def _hook_path(session: Session, stack: ExitStack, site: Site) -> None:
    side = "in" if site.name == "module_in" else "out"
    module = session.module.get_submodule(site.path)
    _hook(session, stack, module, side, lambda value: session.visit(site, value))


def _hook_logits(session: Session, stack: ExitStack, site: Site) -> None:
    """The model's own output, after any scaling and soft-capping of its head."""

    def after(_m: nn.Module, _args: Any, output: Any) -> Any:
        if current_session() is not session:
            return None
        old = getattr(output, "logits", None)
        if not isinstance(old, Tensor):
            return None
        new = session.visit(site, old)
        if new is not old:
            output.logits = new
        return output

    handle = session.module.register_forward_hook(after, prepend=True)
    stack.callback(handle.remove)


def _hook_scale(session: Session, stack: ExitStack, site: Site) -> None:
    """What a norm divides by, from its input and its linear form (found by probing it once)."""
    from underhood.core.head import NormForm, norm_form

    tower = session.anatomy.stacks.get(site.stack)
    base = replace(site, name=site.name.removesuffix("_scale"))
    point, _ = _point(tower, base) if tower is not None else (None, None)
    if point is None:
        return
    module = session.module.get_submodule(point.path)
    forms: list[NormForm] = []

    def before(_m: nn.Module, args: tuple[Any, ...]) -> None:
        if current_session() is not session or not args:
            return
        x = _canonical(session, site, args[0])
        if not forms:
            forms.append(norm_form(module, x.shape[-1]))
        session.visit(site, forms[0].scale(x)[..., 0].to(x.dtype))

    handle = module.register_forward_pre_hook(before, prepend=True)
    stack.callback(handle.remove)


def _hook_carried(
    session: Session, stack: ExitStack, site: Site, point: Point, block: Block
) -> None:
    """Edit `resid_mid` where only the branch is at hand.

    The norm before the MLP sees the edited stream; the skip connection around it does not, so the
    change is added to what the MLP writes: `mid + mlp(mid') + (mid' - mid) = mid' + mlp(mid')`.
    """
    pending: dict[str, Tensor] = {}
    out = block.points["mlp_out"]

    def enter(raw: Tensor) -> Tensor:
        value = _canonical(session, site, raw)
        new = session.visit(site, value)
        if new is value:
            return raw
        pending["delta"] = new - value
        return new.view_as(raw)

    def leave(raw: Tensor) -> Tensor:
        delta = pending.pop("delta", None)
        return raw if delta is None else raw + (delta / out.scale).view_as(raw)

    _hook(session, stack, session.module.get_submodule(point.path), "in", enter)
    _hook(session, stack, session.module.get_submodule(out.path), "out", leave)


def weight_in_out(module: nn.Module) -> Tensor:
    """A projection's weight as `[in, out]`, whatever class it has.

    Raises:
        NotOffered: The weight is packed (quantised) and has no such matrix.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise NotOffered(
            "this needs a projection's weights, and they are packed",
            given=f"{type(module).__name__} with a weight of {getattr(weight, 'dtype', None)}",
            why="quantised weights are not a matrix that can be read",
            do="load the model unquantised, or use sites that need no weights (z, attn_out)",
        )
    return weight if type(module).__name__ == "Conv1D" else weight.T


def _hook_head_out(session: Session, stack: ExitStack, site: Site) -> None:
    """Split the output projection by heads; an edit changes their sum by what it changed."""
    tower = session.anatomy.stacks.get(site.stack)
    if tower is None or site.layer is None:
        return
    block = tower.blocks[site.layer]
    attention = block.cross if site.name.startswith("cross_") else block.attention
    if attention is None or attention.o_proj is None or attention.heads is None:
        return
    heads = attention.heads
    module = session.module.get_submodule(attention.o_proj)
    weight = weight_in_out(module)
    scale = block.points["attn_out"].scale if "attn_out" in block.points else 1.0

    def after(_m: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        if current_session() is not session:
            return None
        z = _canonical(session, site, args[0])
        split = z.unflatten(-1, (heads, -1))
        per_head = weight.unflatten(0, (heads, -1))  # [head d_head d_model]
        parts = torch.einsum("bphd,hdm->bphm", split, per_head)
        parts = parts * scale if scale != 1.0 else parts
        new = session.visit(site, parts)
        if new is parts:
            return None
        return output + ((new - parts).sum(2) / scale).view_as(output)

    handle = module.register_forward_hook(after, prepend=True)
    stack.callback(handle.remove)
