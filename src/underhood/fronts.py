"""Calls that users of TransformerLens know, over `Model.run` and `Edit`.

    logits, cache = uh.run_with_cache(model, prompt, names_filter="resid_post")
    cache["resid_post", 5], cache["blocks.5.hook_resid_post"]          # the same tensor
    logits = uh.run_with_hooks(model, prompt, fwd_hooks=[("blocks.3.attn.hook_z", silence)])

Names are TransformerLens names or sites. Nothing here does what `run` and `edited` cannot; there a
change is data (`uh.zero()`), which prints, saves and sweeps, and a Python function does not.

What differs: a hook is given a copy, so it has to return what it changed; padding is never changed;
hooks are gone when the call ends. Arguments that have no counterpart are refused by `REFUSED`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, Fired, Plan
from underhood.core.errors import NotOffered, SiteNotFound, UsageError, nearest
from underhood.core.model import Inputs, Model
from underhood.core.ops import call
from underhood.core.run import Run
from underhood.core.site import Site

__all__ = ["REFUSED", "Hook", "hooks", "run_with_cache", "run_with_hooks"]

Names = str | Site | Sequence[str | Site] | Callable[[str], bool]
Hooks = Iterable[tuple[Names, Callable[..., Tensor | None]]]

REFUSED: dict[str, str] = {
    "bwd_hooks": "run with grad=True and use torch.autograd.grad on run[site]",
    "incl_bwd": "run with grad=True and use torch.autograd.grad on run[site]",
    "stop_at_layer": "record the layer: run(..., record='resid_post.L')",
    "start_at_layer": "patch its input: run(..., edits=Edit('resid_pre.L', patch(tensor)))",
    "return_type": "the logits are returned; for a loss see underhood.data.metric_named",
    "loss_per_token": "the logits are returned; for a loss see underhood.data.metric_named",
    "remove_batch_dim": "take row 0 of a recording: cache[site][0]",
    "pos_slice": "name the positions: at=Where(pos=[...])",
    "prepend_bos": "the tokenizer decides; pass ids to decide yourself",
    "padding_side": "padding='left' or padding='right'",
    "past_kv_cache": "model.generate keeps the cache",
    "return_cache_object": "a Run is returned: index it as the cache",
    "reset_hooks_end": "leave it out: hooks are always removed",
    "clear_contexts": "leave it out: hooks keep nothing between calls",
}
"""TransformerLens arguments without a counterpart, and what to use instead."""

PASSED = ("edits", "at", "device", "dtype", "grad", "padding")

# Computed on the side, at the cost of much memory; recorded only when named.
ON_THE_SIDE = ("head_out", "cross_head_out", "expert_post", "expert_out", "ssm_state", "logits")


@dataclass(frozen=True, slots=True)
class Hook:
    """What a hook function is told about its place.

    Attributes:
        site: The concrete site.
    """

    site: Site

    @property
    def name(self) -> str:
        """The site's text form, e.g. `z.9`."""
        return str(self.site)

    def layer(self) -> int:
        """The block's number.

        Raises:
            UsageError: The site belongs to no block.
        """
        if self.site.layer is None:
            raise UsageError("this site has no layer", given=self.name, do="use hook.name")
        return self.site.layer


def run_with_cache(
    model: Model, inputs: Inputs, *, names_filter: Names | None = None, **options: Any
) -> tuple[Float[Tensor, "batch pos vocab"], Run]:
    """Logits and the recorded activations of one forward.

    Args:
        model: The model.
        inputs: Anything that `Model.run` takes.
        names_filter: What to record: a name, several, or a function of each site's text form
            (`resid_post.5`, `pattern.3`). Default: every site that the model has, without those
            that are recomputed on the side (head_out, expert_post, expert_out, ssm_state).
        options: `edits`, `at`, `device`, `dtype`, `grad`, `padding` of `Model.run`.

    Raises:
        SiteNotFound: Nothing of this name, or the function accepts no site.
        NotOffered: A TransformerLens argument without a counterpart (`REFUSED`).

    Cost: one forward.

    Example:
        >>> import underhood as uh
        >>> model = uh.load()
        >>> logits, cache = uh.run_with_cache(model, "The capital of France is")
        >>> bool((cache["pattern", 1] == cache["blocks.1.attn.hook_pattern"]).all())
        True
    """
    _check_options(options)
    if names_filter is None:
        sites = [s for s in model.sites() if s.name not in ON_THE_SIDE]
    else:
        sites = _sites(model, names_filter)
    run = model.run(inputs, record=sites, **options)
    return run.logits, run


def run_with_hooks(
    model: Model, inputs: Inputs, fwd_hooks: Hooks = (), **options: Any
) -> Float[Tensor, "batch pos vocab"]:
    """Logits of one forward with functions placed at sites.

    Args:
        model: The model.
        inputs: Anything that `Model.run` takes.
        fwd_hooks: `(names, function)` pairs, in order; names as in `run_with_cache`. The function
            is called as `function(activation, hook=Hook)` and returns the new activation, or None
            when it only looks.
        options: As in `run_with_cache`.

    Raises:
        UsageError: A function that changes the activation in place and returns nothing.
        SiteNotFound, NotOffered: As in `run_with_cache`.

    Cost: one forward; a layer whose scores or pattern are hooked runs the eager attention.

    Example:
        >>> import underhood as uh
        >>> model = uh.load()
        >>> seen = []
        >>> look = lambda z, hook: seen.append(hook.name)
        >>> logits = uh.run_with_hooks(model, "The capital of France is", [("z", look)])
        >>> seen[:2], len(seen) == model.n_layers
        (['z.0', 'z.1'], True)
    """
    _check_options(options)
    edits = [*_edits(model, fwd_hooks), *Plan(options.pop("edits", None) or ())]
    return model.run(inputs, edits=edits, **options).logits


@contextmanager
def hooks(model: Model, fwd_hooks: Hooks = (), **options: Any) -> Iterator[list[Fired]]:
    """Functions placed at sites for code that calls `model.module` itself.

    Args:
        model: The model.
        fwd_hooks: As in `run_with_hooks`.
        options: None; TransformerLens arguments are refused by name.

    Raises:
        EditNeverFired: At the end, when a function was never called.

    Example:
        >>> import underhood as uh
        >>> model = uh.load()
        >>> with uh.hooks(model, [("z.1", lambda z, hook: 0 * z)]) as fired:
        ...     out = model.module(model.tokens("The capital of France is").ids)
        >>> fired[0].places
        6
    """
    _check_options(options, passed=())
    with model.edited(*_edits(model, fwd_hooks)) as fired:
        yield fired


def _check_options(options: dict[str, Any], *, passed: Sequence[str] = PASSED) -> None:
    for name in options:
        if name in REFUSED:
            raise NotOffered(
                f"there is no argument {name!r} here", given=repr(options[name]), do=REFUSED[name]
            )
        if name not in passed:
            raise UsageError(
                f"there is no argument {name!r}",
                given=name,
                do=f"nearest: {nearest(name, [*passed, 'fwd_hooks', 'names_filter'])}",
            )


def _sites(model: Model, names: Names) -> list[Site]:
    """The concrete sites that are meant."""
    if not callable(names):
        return model.resolve(names)
    found = [site for site in model.sites() if names(str(site))]
    if not found:
        raise SiteNotFound(
            "the filter accepts no site of this model",
            given=getattr(names, "__name__", repr(names)),
            why="it is given names such as resid_post.5 and z.0, not blocks.5.hook_resid_post",
            do="filter by those names (model.sites() lists them), or name the sites",
        )
    return found


def _edits(model: Model, fwd_hooks: Hooks) -> list[Edit]:
    return [
        Edit(site, call(_hooked(function, Hook(site))))
        for names, function in fwd_hooks
        for site in _sites(model, names)
    ]


def _hooked(function: Callable[..., Tensor | None], hook: Hook) -> Callable[[Tensor], Tensor]:
    """A hook as a function of the activation, which may change only what it is given."""

    def change(value: Tensor) -> Tensor:
        given = value.clone()
        before = given._version
        new = function(given, hook=hook)
        if new is not None:
            return new
        if given._version != before:
            raise UsageError(
                f"the hook at {hook.name} changed the activation in place and returned nothing",
                given=getattr(function, "__name__", repr(function)),
                why="it was given a copy, so the change would be lost",
                do="return the activation, or leave it as it is",
            )
        return value

    return change
