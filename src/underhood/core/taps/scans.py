"""Taps on state-space scans (Mamba, Mamba-2 and hybrids).

The scan is a function in the family's modelling module; wrapping it for the time of a session gives
its inputs (x, dt, B, C: readable and editable) and its output. The state after each position is not
kept by any kernel; it is recomputed beside the scan with the plain recurrence
`h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t`, for the layers that ask for it.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from underhood.core.anatomy import Scan
from underhood.core.errors import NotOffered
from underhood.core.site import Site
from underhood.core.taps.patches import patched
from underhood.core.taps.session import Session, current_session

__all__ = ["install"]

NAMES = ("ssm_x", "ssm_dt", "ssm_B", "ssm_C", "ssm_state", "ssm_out")


@dataclass(slots=True)
class _ScanTap:
    session: Session
    stack: str
    layer: int
    spec: Scan
    inside: bool = False

    def site(self, name: str) -> Site:
        return Site(name, self.layer, stack=self.stack)

    def wants(self, name: str) -> bool:
        return self.session.wants(self.site(name))

    def visit(self, name: str, value: Tensor) -> Tensor:
        return self.session.visit(self.site(name), value) if self.wants(name) else value


_BY_SESSION: dict[int, dict[int, _ScanTap]] = {}


def _inside() -> _ScanTap | None:
    session = current_session()
    taps = _BY_SESSION.get(id(session), {}) if session is not None else {}
    return next((t for t in taps.values() if t.inside), None)


def install(session: Session, stack: ExitStack) -> None:
    """Install what the requested `ssm_*` sites need."""
    taps: dict[int, _ScanTap] = {}
    for name, tower in session.anatomy.stacks.items():
        for layer, block in enumerate(tower.blocks):
            if block.scan is None:
                continue
            tap = _ScanTap(session, name, layer, block.scan)
            if any(tap.wants(n) for n in NAMES):
                module = session.module.get_submodule(block.scan.path)
                taps[id(module)] = tap
                stack.enter_context(patched(module, "forward", _wrap_forward))
                scope = sys.modules[type(module).__module__]
                stack.enter_context(patched(scope, block.scan.scan, _wrap_scan))
                if block.scan.step:
                    stack.enter_context(patched(scope, block.scan.step, _wrap_step))
    if taps:
        _BY_SESSION[id(session)] = taps
        stack.callback(_BY_SESSION.pop, id(session))


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    module = getattr(original, "__self__", None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        session = current_session()
        tap = _BY_SESSION.get(id(session), {}).get(id(module)) if session is not None else None
        if tap is None:
            return original(*args, **kwargs)
        tap.inside = True
        try:
            return original(*args, **kwargs)
        finally:
            tap.inside = False

    return forward


def _wrap_scan(original: Callable[..., Any]) -> Callable[..., Any]:
    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        tap = _inside()
        if tap is None:
            return original(x, dt, A, B, C, *args, **kwargs)
        channels_first = A.ndim == 2  # Mamba-1: [batch channel pos]; Mamba-2: [batch pos head d]
        x, dt, B, C = _visit_inputs(tap, x, dt, B, C, kwargs, channels_first=channels_first)
        if tap.wants("ssm_state"):
            _visit_state(tap, x, dt, A, B, kwargs, channels_first=channels_first)
        out = original(x, dt, A, B, C, *args, **kwargs)
        if not tap.wants("ssm_out"):
            return out
        first = out[0] if isinstance(out, tuple) else out
        shown = first.transpose(1, 2) if channels_first else first.flatten(2)
        new = tap.visit("ssm_out", shown)
        if new is shown:
            return out
        back = new.transpose(1, 2) if channels_first else new.view_as(first)
        return (back, *out[1:]) if isinstance(out, tuple) else back

    return scan


def _softplus(dt: Tensor, kwargs: dict[str, Any], *, channels_first: bool) -> Tensor:
    """The step size that the scan will use, after its bias and softplus."""
    bias = kwargs.get("delta_bias") if channels_first else kwargs.get("dt_bias")
    if bias is not None:
        dt = dt + (bias[:, None] if channels_first else bias).to(dt.dtype)
    if kwargs.get("delta_softplus") or kwargs.get("dt_softplus"):
        dt = F.softplus(dt)
    low, high = kwargs.get("dt_limit") or (0.0, float("inf"))
    return dt.clamp(low, high)


def _visit_inputs(
    tap: _ScanTap, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, kwargs: dict[str, Any],
    *, channels_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Visit the scan's inputs in canonical axes; a changed step size goes past its softplus."""
    turn: Callable[[Tensor], Tensor] = (
        (lambda t: t.transpose(1, 2)) if channels_first else (lambda t: t.flatten(2))
    )
    results = []
    for name, value in (("ssm_x", x), ("ssm_B", B), ("ssm_C", C)):
        shown = turn(value)
        new = tap.visit(name, shown)
        back = (
            value
            if new is shown
            else (new.transpose(1, 2) if channels_first else new.view_as(value))
        )
        results.append(back)
    if tap.wants("ssm_dt"):
        steps = _softplus(dt, kwargs, channels_first=channels_first)
        shown = steps.transpose(1, 2) if channels_first else steps
        new = tap.visit("ssm_dt", shown)
        if new is not shown:
            dt = new.transpose(1, 2) if channels_first else new
            kwargs.update(delta_bias=None, delta_softplus=False)
            kwargs.update(dt_bias=None, dt_softplus=False)
    return results[0], dt, results[1], results[2]


def _visit_state(
    tap: _ScanTap, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, kwargs: dict[str, Any],
    *, channels_first: bool,
) -> None:  # fmt: skip
    """Run the plain recurrence and visit `[batch pos channel state]`."""
    with torch.no_grad():
        steps = _softplus(dt, kwargs, channels_first=channels_first).float()
        if channels_first:
            x, steps, B = x.transpose(1, 2), steps.transpose(1, 2), B.transpose(1, 2)
            decay = torch.exp(steps[..., None] * A.float())
            push = (steps * x.float())[..., None] * B.float()[:, :, None]
        else:
            batch, length, heads, width = x.shape
            groups = B.shape[2]
            wide = B.float().repeat_interleave(heads // groups, 2)
            decay = torch.exp(steps * A.float())[..., None, None]
            push = (steps[..., None] * x.float())[..., None] * wide[..., None, :]
        state = torch.zeros_like(push[:, 0])
        if kwargs.get("initial_states") is not None:
            state = kwargs["initial_states"].float()
        states = []
        for t in range(push.shape[1]):
            state = decay[:, t] * state + push[:, t]
            states.append(state)
        trail = torch.stack(states, 1)
        if not channels_first:
            trail = trail.flatten(2, 3)
    tap.visit("ssm_state", trail)


def _wrap_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """One cached token: the same sites, one position long."""

    def step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any,
             **kwargs: Any) -> Any:  # fmt: skip
        tap = _inside()
        if tap is None:
            return original(state, x, dt, A, B, C, *args, **kwargs)
        if tap.session.writes(tap.site("ssm_dt")):
            raise NotOffered(
                "the step size cannot be edited while generating",
                given=str(tap.site("ssm_dt")),
                why="the one-token update applies its own softplus",
                do="edit ssm_x, or run without a cache",
            )
        x, B, C = (_visit_one(tap, n, t) for n, t in (("ssm_x", x), ("ssm_B", B), ("ssm_C", C)))
        out = original(state, x, dt, A, B, C, *args, **kwargs)
        if tap.wants("ssm_state"):
            tap.visit("ssm_state", state.view(state.shape[0], 1, -1, state.shape[-1]))
        return _visit_one(tap, "ssm_out", out)

    return step


def _visit_one(tap: _ScanTap, name: str, value: Tensor) -> Tensor:
    shown = value.flatten(1)[:, None]
    new = tap.visit(name, shown)
    return value if new is shown else new.view_as(value)
