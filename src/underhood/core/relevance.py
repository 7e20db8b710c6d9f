"""Relevance rules: the same forward, another backward.

Inside `relevance_rules` a model computes bit for bit what it always computes, and autograd goes
back through it by the rules of layer-wise relevance propagation. The gradient of a number at an
activation is then its *relevance coefficient* R: activation x R shares the number out.

    "ln"        a norm divides by a constant:       (x - mean) / stopgrad(sigma) * w + b
    "identity"  an activation multiplies:           x * stopgrad(phi(x) / x); ReLU does so already
    "half"      a gated product is halved:          each factor of phi(g) * u gets half of R
    "heads"     an attention pattern is constant:   relevance goes through the values alone

With all four and without biases relevance is conserved: at every layer activations x R sum to the
number. Everything else (projections, softmax, rotations, soft caps, routers) keeps its gradient.

    with relevance_rules(model) as touched:
        run = model.run(prompt, edits=..., grad=True)
    run.last_logits[0, answer].backward()

No weight and no class is replaced. Norms and activations are found by structure: norms are checked
when they run (a norm in which no root was seen is refused), activations by probing every small
module with a line of numbers, functional calls (`F.gelu`) and gated products by watching the torch
functions that a block calls. What is not found is an error, and what was touched is reported.

What this does not do: relevance through recurrent mixers by rules (Mamba and its kin keep their
ordinary gradients inside), rules other than these four.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from underhood.core import relevance_parts as parts
from underhood.core.anatomy import Block
from underhood.core.errors import NotOffered, UsageError, nearest
from underhood.core.model import Model
from underhood.core.taps.modules import first_tensor
from underhood.core.taps.patches import patched

__all__ = ["RULES", "Touched", "relevance_rules"]

RULES = ("ln", "identity", "half", "heads")


@dataclass(slots=True)
class Touched:
    """What the rules did: filled while the model runs.

    Attributes:
        rules: The rules asked for.
        paths: Per rule, the modules it acted on, in order (a functional call is named after its
            block: `blocks.0 (gelu)`).
        skipped: Modules left as they are, with the reason.
    """

    rules: tuple[str, ...]
    paths: dict[str, list[str]]
    skipped: dict[str, str] = field(default_factory=dict)

    def note(self, rule: str, path: str) -> None:
        """A rule acted here."""
        if path not in self.paths[rule]:
            self.paths[rule].append(path)


@contextmanager
def relevance_rules(
    model: Model, rules: Sequence[str] = ("ln", "identity", "half")
) -> Iterator[Touched]:
    """Have backward passes follow relevance rules, for forwards run inside the block.

    Only forwards of this thread and with gradients on are concerned. `backward` itself may be
    called outside. Leaves no trace, also by exception.

    Args:
        model: The model.
        rules: Some of `RULES`.

    Yields:
        What was touched, complete when a forward has run.

    Raises:
        UsageError: No or unknown rules, rules inside rules, or gradient checkpointing.
        NotOffered: Asked for "ln" and there is no norm; an activation for which phi(x) / x has a
            pole. While the model runs: a norm, an MLP's activation, a gated product or a pattern
            that is there and cannot be found.
    """
    asked = _checked(rules)
    if _ACTIVE.get() is not None:
        raise UsageError(
            "relevance rules are already active in this thread",
            given=", ".join(asked),
            do="leave the first block, or ask for all rules there",
        )
    if any(m.training and getattr(m, "gradient_checkpointing", False)
           for m in model.module.modules()):  # fmt: skip
        raise UsageError(
            "relevance rules do not work with gradient checkpointing",
            given=repr(model),
            why="it runs blocks a second time during backward, where the rules are gone",
            do="call model.module.eval(), or gradient_checkpointing_disable()",
        )
    job = _Job(model, Touched(asked, {rule: [] for rule in asked}))
    with ExitStack() as stack:
        job.install(stack)
        stack.callback(_ACTIVE.reset, _ACTIVE.set(job))
        stack.enter_context(_Mode(job))
        yield job.touched


def _checked(rules: Sequence[str]) -> tuple[str, ...]:
    asked = (rules,) if isinstance(rules, str) else tuple(dict.fromkeys(rules))
    unknown = [rule for rule in asked if rule not in RULES]
    if unknown or not asked:
        raise UsageError(
            f"there is no relevance rule {unknown[0]!r}" if unknown else "no relevance rule given",
            given=", ".join(map(str, asked)) or "nothing",
            do=f"use some of {', '.join(RULES)}"
            + (f"; nearest: {nearest(str(unknown[0]), RULES, 1)}" if unknown else ""),
        )
    return asked


# Where the model is ------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Place:
    """A module that is running: what it is, and what has been seen in it.

    Attributes:
        kind: "root", "block", "attention", "mixer", "router", "norm", "activation" or "gate".
        path: Where it is.
        seen: Roots of a norm, patterns of an attention, activations of a block.
        products: Gated products of a block.
        marks: Outputs of activations, by which a gated product is known.
        sigmoids: Outputs of sigmoids inside a gate.
    """

    kind: str
    path: str
    seen: int = 0
    products: int = 0
    marks: list[Tensor] = field(default_factory=list)
    sigmoids: list[Tensor] = field(default_factory=list)


_ACTIVE: ContextVar["_Job | None"] = ContextVar("underhood_relevance", default=None)


class _Mode(TorchFunctionMode):
    """Shows the job every torch function that the model calls."""

    def __init__(self, job: "_Job") -> None:
        super().__init__()
        self.job = job

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = self.job.places
        if not places:
            return func(*args, **kwargs)
        return self.job.called(places[-1], func, args, kwargs)


class _Job:
    """The rules on one model in one thread."""

    def __init__(self, model: Model, touched: Touched) -> None:
        self.model, self.touched = model, touched
        self.rules = frozenset(touched.rules)
        self.places: list[_Place] = []
        blocks = [b for s in model.anatomy.stacks.values() for b in s.blocks]
        self.blocks = {b.path: b for b in blocks}
        self.apart = dict(parts.mixers_of(model, blocks))
        self.norms = parts.norms_of(model, touched.skipped)
        self.activations: dict[int, str] = {}
        self.kinds: dict[int, str] = {}
        self.wrapped: set[tuple[int, str]] = set()
        if "ln" in self.rules and not self.norms:
            raise parts.lost("ln", repr(model), "this model has no norm")
        if self.rules & {"identity", "half"}:
            self._find_activations()

    def _find_activations(self) -> None:
        for path, module in self.model.module.named_modules():
            if any(path == p or path.startswith(p + ".") for p in self.apart):
                continue
            norm = id(module) in self.norms
            kind = None if norm else parts.activation_kind(module, self.model)
            if kind is not None:
                self.activations[id(module)], self.kinds[id(module)] = path, kind

    # Installing ----------------------------------------------------------------------------------

    def install(self, stack: ExitStack) -> None:
        """Hooks that say where the model is, and wrappers around norms and activations."""
        root = self.model.module
        self._watch(stack, root, "root" if self.blocks else "block", "")
        for path in self.blocks:
            self._watch(stack, root.get_submodule(path), "block", path)
        for path, kind in self.apart.items():
            self._watch(stack, root.get_submodule(path), kind, path)
        if "ln" in self.rules:
            for path in self.norms.values():
                self._wrap(stack, root.get_submodule(path), "forward", _Job.norm)
        for module in root.modules():
            if id(module) in self.activations:
                self._wrap(stack, module, "forward", _Job.activation)
            elif hasattr(module, "_apply_gate") and self.rules & {"identity", "half"}:
                self._wrap(stack, module, "_apply_gate", _Job.gate)

    def _wrap(
        self, stack: ExitStack, module: nn.Module, name: str, method: Callable[..., Any]
    ) -> None:
        """Pass calls of `module.name` through a method of the thread's job, where it wants them."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                job = _ACTIVE.get()
                if job is None or (id(module), name) not in job.wrapped:
                    return original(*args, **kwargs)
                return method(job, module, original, *args, **kwargs)

            return forward

        self.wrapped.add((id(module), name))
        stack.enter_context(patched(module, name, wrap))

    def _watch(self, stack: ExitStack, module: nn.Module, kind: str, path: str) -> None:
        def enter(_m: nn.Module, _args: Any) -> None:
            if _ACTIVE.get() is self:
                self.places.append(_Place(kind, path))

        def leave(_m: nn.Module, _args: Any, output: Any) -> None:
            if _ACTIVE.get() is not self:
                return
            while self.places:
                place = self.places.pop()
                if (place.kind, place.path) == (kind, path):
                    if output is not None:  # else the module raised
                        self._check(place)
                    break

        stack.callback(module.register_forward_pre_hook(enter).remove)
        after = module.register_forward_hook(leave, prepend=True, always_call=True)
        stack.callback(after.remove)

    def _check(self, place: _Place) -> None:
        """Refuse when a rule had to act in this place and did not."""
        if place.kind == "attention" and "heads" in self.rules:
            if not place.seen:
                raise parts.lost("heads", place.path, "no softmax or attention of torch was seen")
            self.touched.note("heads", place.path)
        block = self.blocks.get(place.path) if place.kind == "block" else None
        if block is not None and "identity" in self.rules:
            if parts.has_mlp(block) and not place.seen:
                raise parts.lost("identity", place.path, "no activation was seen in its MLP")
        if block is not None and "half" in self.rules:
            if self._gated(block) and not place.products:
                raise parts.lost("half", place.path, "its gated product was not seen")
        if not place.path:
            self._check_all()

    def _check_all(self) -> None:
        """After a whole pass: each rule that must act somewhere has acted."""
        paths, skipped = self.touched.paths, self.touched.skipped
        must = [rule for rule in self.touched.rules if rule != "half"] or ["half"]
        for rule in must:
            if not paths[rule] and not (rule == "identity" and "ReLU" in "".join(skipped.values())):
                raise parts.lost(rule, type(self.model.module).__name__, "nothing for it was found")

    def _gated(self, block: Block) -> bool:
        if "mlp_gate" in block.points:
            return True
        experts = block.experts.experts if block.experts else None
        module = self.model.module.get_submodule(experts) if experts else None
        return bool(getattr(module, "has_gate", False))

    # Running -------------------------------------------------------------------------------------

    @contextmanager
    def _inside(self, place: _Place) -> Iterator[_Place]:
        self.places.append(place)
        try:
            yield place
        finally:
            if place in self.places:
                del self.places[self.places.index(place) :]

    def _block(self) -> _Place | None:
        """The block (or gate inside it) that is running."""
        return next((p for p in reversed(self.places) if p.kind in ("block", "gate")), None)

    def norm(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """A norm's forward, its root held constant."""
        path = self.norms[id(module)]
        with self._inside(_Place("norm", path)) as place:
            out = original(*args, **kw)
        if not place.seen:
            why = "its forward takes no root and calls no norm of torch"
            raise parts.lost("ln", f"{path} ({type(module).__name__})", why)
        self.touched.note("ln", path)
        return out

    def activation(
        self, module: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        """An activation module's forward."""
        path, kind = self.activations[id(module)], self.kinds[id(module)]
        if kind == "pole" and "identity" in self.rules:
            raise NotOffered(
                'the relevance rule "identity" has a pole here',
                given=f"{path} ({type(module).__name__})",
                why="the activation is not zero at zero, so phi(x) / x is unbounded",
                do='leave "identity" out',
            )
        with self._inside(_Place("activation", path)):
            y = original(*args, **kw)
        x = first_tensor(args if args else kw)
        assert x is not None
        return self._activated(path, x, y, relu=kind == "relu")

    def gate(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """The gate of batched experts; some write their activation out (GPT-OSS)."""
        outer = self._block()
        with self._inside(_Place("gate", outer.path if outer else "")) as place:
            out = original(*args, **kw)
        if outer is not None:
            outer.seen += place.seen
            outer.products += place.products
        return out

    def _activated(self, path: str, x: Tensor, y: Tensor, *, relu: bool) -> Tensor:
        if relu:
            self.touched.skipped[path] = "ReLU: phi(x) / x is its gradient"
        elif "identity" in self.rules:
            y = parts.identity_rule(x, y)
            self.touched.note("identity", path)
        block = self._block()
        if block is not None:
            block.seen += 1
            block.marks.append(y)
        return y

    def called(self, place: _Place, func: Any, args: Any, kwargs: Any) -> Any:
        """A torch function called by the module at `place`."""
        if place.kind == "norm" or (place.kind == "attention" and "heads" in self.rules):
            call = parts.called_in_norm if place.kind == "norm" else parts.called_in_attention
            out, acted = call(func, args, kwargs)
            place.seen += acted
            return out
        out = func(*args, **kwargs)
        if place.kind not in ("block", "gate") or not isinstance(out, Tensor):
            return out
        if func in parts.PRODUCTS:
            return self._product(place, args, out)
        if func in parts.SIGMOIDS and place.kind == "gate":
            out = out.detach() if "identity" in self.rules else out
            place.sigmoids.append(out)
        elif func in parts.SQUARES and parts.among(args[0], place.marks):
            # A squared ReLU: phi(x) / x = relu(x), which is half the gradient of the square.
            out = parts.straight(out, out * 0.5) if "identity" in self.rules else out
            self._note_identity(place, "square")
            place.marks.append(out)
        elif func in parts.RELU or func in parts.ACTIVATIONS:
            if self.rules & {"identity", "half"}:
                name = f"{place.path} ({getattr(func, '__name__', 'activation')})".strip()
                return self._activated(name, args[0], out, relu=func in parts.RELU)
        return out

    def _note_identity(self, place: _Place, name: str) -> None:
        place.seen += 1
        if "identity" in self.rules:
            self.touched.note("identity", f"{place.path} ({name})")

    def _product(self, place: _Place, args: Any, out: Tensor) -> Tensor:
        """Two tensors multiplied: `x * sigmoid(x)`, an activation's output by an up-projection."""
        a, b = (args[0], args[1]) if len(args) > 1 else (None, None)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return out
        if parts.among(a, place.sigmoids) or parts.among(b, place.sigmoids):
            self._note_identity(place, "sigmoid")
            place.marks.append(out)
            return out
        # Equal shapes: a router's weight, one number per token, is no factor of a gated product.
        gated = (parts.among(a, place.marks) or parts.among(b, place.marks)) and a.shape == b.shape
        if not gated:
            return out
        place.products += 1
        # A factor that does not depend on anything takes no relevance (both, when nothing does).
        if "half" in self.rules and a.requires_grad == b.requires_grad:
            self.touched.note("half", place.path)
            return parts.straight(out, out * 0.5)
        return out
