"""`load`: any model by name; the built-in one when none is named."""

from pathlib import Path
from typing import Any

from torch import nn

from underhood.core.errors import ModelNotFound, nearest
from underhood.core.loading import as_device, as_dtype, from_module, from_pretrained
from underhood.core.model import Model

__all__ = ["DEFAULT", "load"]

DEFAULT = "town"


def load(
    model: "str | Path | nn.Module | None" = None, tokenizer: Any = None, **options: Any
) -> Model:
    """A `Model` from a name, a folder, or a module that is in memory.

    Args:
        model: None for the built-in model; an organism's name ("town", "wired/xor"), or one of the
            steps that it grew through ("growth/induction@400"); "random/FAMILY" for a tiny random
            model of a family; a folder; a hub id ("gpt2"); or a torch module.
        tokenizer: With a module: its tokenizer, if it reads text.
        options: `device`, `dtype`, `revision`, `pad_token`, `trust_remote_code`; see
            `core.loading.from_pretrained`.

    Raises:
        ModelNotFound: No model of this name.

    Example:
        >>> import underhood as uh
        >>> uh.load().n_layers > 1
        True
    """
    if isinstance(model, nn.Module):
        return from_module(model, tokenizer, **options)
    name = str(model) if model is not None else DEFAULT
    if name.startswith("random/"):
        return _random(name, options)
    from underhood.organisms import organism, organisms

    known, _, step = name.partition("@")
    if known not in organisms():
        return from_pretrained(name, **options)
    if step:
        options["step"] = _step(name, step)
    return organism(known).load(**options)


def _step(name: str, step: str) -> int:
    if not step.isdecimal():
        raise ModelNotFound(
            f"{step!r} is no step of a training run",
            given=name,
            do='write the number of a step after the "@", e.g. "growth/induction@400"',
        )
    return int(step)


def _random(name: str, options: dict[str, Any]) -> Model:
    from underhood.organisms.tiny import FAMILIES, tiny

    family = name.removeprefix("random/")
    if family not in FAMILIES:
        raise ModelNotFound(
            f"there is no family {family!r}",
            given=name,
            do=f"use one of the nearest: {nearest(family, FAMILIES)}",
        )
    device, dtype = options.pop("device", None), as_dtype(options.pop("dtype", None))
    module = tiny(family, **options).module
    if device is not None or dtype is not None:
        module = module.to(device=as_device(device), dtype=dtype)
    return from_module(module, name=name)
