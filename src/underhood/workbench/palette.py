"""Ops as forms, and edits from what a page says.

The palette is read from `core.ops`: every function there that returns an `Op`, its parameters, and
its docstring. A page says numbers as numbers. It says tensors as a *recipe*: numbers, or prompts
whose activations at the edit's own site are averaged (minus those of others, if given), which is
how most steering vectors are made; a patch takes the run of another prompt.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from underhood.core import ops
from underhood.core.edit import UNITS, Edit, Plan, replace_edit
from underhood.core.errors import UsageError, nearest
from underhood.core.site import Site
from underhood.core.tokens import Where
from underhood.workbench.asking import Asked, Prompt, Short, validated

if TYPE_CHECKING:
    from collections.abc import Callable

    from underhood.core.model import Model

__all__ = ["EditForm", "Recipe", "make_plan", "palette"]

PHASES = ("prompt", "generated")
KL = "kl"
"""A unit of the page's alone: the strength is found by what it does to this prompt."""
UNIT_WORDS = {
    "raw": "the vector as it is", "sigma": "standard deviations of the site",
    "norm": "shares of each position's own length",
    KL: "nats by which the next token's distribution moves",
}  # fmt: skip


class Recipe(Asked):
    """How a tensor is made: `numbers`, or the mean over `prompts` (minus that over `minus`).

    Attributes:
        numbers: The tensor itself.
        prompts: Texts whose activations at the edit's site are averaged.
        minus: Texts whose mean is taken away.
        pos: Position that is read in each.
    """

    numbers: Annotated[list[float], Field(max_length=100_000)] | None = None
    prompts: Annotated[list[Prompt], Field(max_length=64)] = []
    minus: Annotated[list[Prompt], Field(max_length=64)] = []
    pos: int = -1


class EditForm(Asked):
    """One edit as a page says it; or one of a saved plan, by the plan's id and its number."""

    site: Short = ""
    op: Short = ""
    fields: dict[str, Any] = {}
    pos: Annotated[list[int], Field(max_length=1000)] | None = None
    phase: str | None = None
    strength: float = 1.0
    unit: str = "raw"
    saved: Short | None = None
    index: Annotated[int, Field(ge=0)] = 0


def builders() -> "dict[str, Callable[..., ops.Op]]":
    """Functions of `core.ops` that make an op which is data, by the op's name."""
    found = {}
    for name in ops.__all__:
        function = getattr(ops, name)
        if inspect.isfunction(function) and name.removesuffix("_to") in ops.OPS:
            found[name.removesuffix("_to")] = function
    return found


def palette() -> dict[str, Any]:
    """Ops with their fields, the units of a strength, the phases."""
    return {
        "ops": [_op(name, function) for name, function in builders().items()],
        "units": [{"name": unit, "about": UNIT_WORDS[unit]} for unit in UNIT_WORDS],
        "phases": list(PHASES),
    }


def _op(name: str, function: "Callable[..., ops.Op]") -> dict[str, Any]:
    about = inspect.getdoc(function) or ""
    return {
        "name": name,
        "about": " ".join(about.split()),
        "only_on": list(ops.OPS[name].only_on),
        "units": [*(UNITS if issubclass(ops.OPS[name], ops.Add) else ("raw",)), KL],
        "fields": [_field(p) for p in inspect.signature(function).parameters.values()],
    }


def _field(parameter: inspect.Parameter) -> dict[str, Any]:
    said = parameter.annotation
    kind = "tensor"
    if said in (float, int):
        kind = "number"
    elif "Run" in str(said):
        kind = "run"
    elif "dict" in str(said):
        kind = "shifts"
    elif "int" in str(said):
        kind = "numbers"
    bare = parameter.default is inspect.Parameter.empty
    default = None if bare or isinstance(parameter.default, tuple) else parameter.default
    return {"name": parameter.name, "kind": kind, "required": bare, "default": default}


def make_plan(
    model: "Model", forms: Sequence[EditForm], prompt: str, saved: "Callable[[str], Plan]"
) -> Plan:
    """Edits of a page as a plan.

    Cost: one forward per recipe, run, or strength in sigma; some 15 per strength in KL.

    Args:
        model: The model they are for.
        forms: The edits.
        prompt: Where a site's sigma is measured.
        saved: Gives a saved plan by its id.

    Raises:
        UsageError: An edit that cannot be made; the library's own refusals.
    """
    return Plan([_edit(model, form, prompt, saved) for form in forms], model=model.identity())


def _edit(model: "Model", form: EditForm, prompt: str, saved: "Callable[[str], Plan]") -> Edit:
    if form.saved is not None:
        plan = saved(form.saved)
        model.plan(plan, lengths=None, generating=True)  # refuses plans made for another model
        if form.index >= len(plan):
            raise UsageError(
                "the saved plan has no such edit", given=form.index, do=f"it has {len(plan)}"
            )
        return replace_edit(plan[form.index], strength=form.strength)
    known = builders()
    if form.op not in known:
        raise UsageError(
            f"there is no op {form.op!r}", given=form.op, do=f"nearest: {nearest(form.op, known)}"
        )
    site = Site.parse(form.site)
    function = known[form.op]
    values = _values(model, site, function, form.fields)
    where = Where(form.pos, phase=form.phase)
    if form.unit == KL:
        edit = Edit(site, function(**values), where)
        return replace_edit(edit, strength=model.strength(edit, prompt, kl=form.strength))
    sigma = model.sigma(site, prompt) if form.unit == "sigma" else None
    return Edit(
        site, function(**values), where, strength=form.strength, unit=form.unit, sigma=sigma
    )


def _values(
    model: "Model", site: Site, function: "Callable[..., ops.Op]", said: dict[str, Any]
) -> dict[str, Any]:
    fields = {f["name"]: f for f in _op_fields(function)}
    for name in said:
        if name not in fields:
            raise UsageError(
                f"this op has no field {name!r}", given=name, do=f"nearest: {nearest(name, fields)}"
            )
    found = {}
    for name, field in fields.items():
        value = said.get(name)
        if value in (None, "", [], {}):
            if field["required"]:
                raise UsageError(f"the field {name!r} is empty", given=repr(value), do="fill it in")
            continue
        found[name] = _READ[field["kind"]](model, site, name, value)
    return found


def _op_fields(function: "Callable[..., ops.Op]") -> list[dict[str, Any]]:
    return [_field(p) for p in inspect.signature(function).parameters.values()]


def _number(model: "Model", site: Site, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(
            f"{name!r} is a number", given=repr(value)[:80], do="write one, such as 0.5"
        )
    return float(value)


def _numbers(model: "Model", site: Site, name: str, value: Any) -> tuple[int, ...]:
    many = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in many):
        raise UsageError(f"{name!r} is whole numbers", given=repr(value)[:80], do="write e.g. 0, 3")
    return tuple(many)


def _shifts(model: "Model", site: Site, name: str, value: Any) -> dict[int, float]:
    try:
        return {int(k): float(v) for k, v in dict(value).items()}
    except (TypeError, ValueError):
        raise UsageError(
            f"{name!r} says how far each number is moved",
            given=repr(value)[:80],
            do="e.g. {3: 2.0}",
        ) from None


def _tensor(model: "Model", site: Site, name: str, value: Any) -> Tensor:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value), device=model.device)
    recipe = validated(Recipe, value if isinstance(value, dict) else {"numbers": value})
    if recipe.numbers is not None:
        return torch.tensor(recipe.numbers, device=model.device)
    if not recipe.prompts:
        raise UsageError(
            f"{name!r} needs numbers, or prompts whose activations are averaged",
            given="neither", do="give one prompt or more",
        )  # fmt: skip
    found = _mean(model, site, recipe.prompts, recipe.pos)
    return found - _mean(model, site, recipe.minus, recipe.pos) if recipe.minus else found


def _mean(model: "Model", site: Site, prompts: list[str], pos: int) -> Tensor:
    """The mean over prompts of a site at one position. Prompts run one by one: no padding."""
    place = _one(model, site)
    rows = [model.run(prompt, record=place, at=pos)[place].float() for prompt in prompts]
    return torch.stack([row.flatten(0, 1).mean(0) for row in rows]).mean(0)


def _run(model: "Model", site: Site, name: str, value: Any) -> Any:
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise UsageError(f"{name!r} is another prompt", given=repr(value)[:80], do="write one")
    return model.run(text, record=_one(model, site))


def _one(model: "Model", site: Site) -> Site:
    """The site itself, if it is in one layer: each layer has its own activations."""
    if site.spreads:
        raise UsageError(
            "activations are taken from one layer, and this site names all",
            given=str(site), do=f"name a layer, such as {model.resolve(site)[0]}",
        )  # fmt: skip
    return site


_READ: "dict[str, Callable[[Model, Site, str, Any], Any]]" = {
    "number": _number, "numbers": _numbers, "shifts": _shifts, "tensor": _tensor, "run": _run,
}  # fmt: skip
