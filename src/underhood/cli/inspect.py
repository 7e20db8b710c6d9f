"""`underhood inspect`: what a model is made of, what it offers, and why it does not offer the rest."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from underhood.cli import options, render

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.core.site import Site

__all__ = ["inspect"]


def inspect(
    model: options.ModelArgument = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site, one per line.")] = False,
    modules: Annotated[bool, typer.Option("--modules", help="List every torch module.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Show a model's class and sizes, the sites it offers with their axes, and what it lacks."""
    loaded = options.load_model(model, device, dtype, quiet=quiet)
    parts: dict[str, Any] = {}
    if sites:
        parts["sites"] = [_row(loaded, site, str(site)) for site in loaded.sites()]
    if modules:
        parts["modules"] = _modules(loaded)
    if not parts:
        offered = [_row(loaded, group[0], _spread(group)) for group in _groups(loaded)]
        parts = {"model": _facts(loaded), "sites": offered, "not offered": _missing(loaded)}
    if json:
        render.document(parts)
        return
    for i, (name, rows) in enumerate(parts.items()):
        if len(parts) > 1:
            typer.echo("" if i else "", nl=bool(i))
            render.heading(loaded.name if name == "model" else name)
        if name == "model":
            render.table(("what", "value"), list(rows.items()), header=False)
        elif rows:
            render.table(list(rows[0]), [list(row.values()) for row in rows])
        else:
            typer.echo("none: address its parts as module:PATH; --modules lists them")


def _facts(model: "Model") -> dict[str, Any]:
    text = getattr(model.config, "text_config", None) or model.config
    stacks = {
        name or "main": f"{len(stack.blocks)} blocks at {stack.root or 'the top'}"
        for name, stack in model.anatomy.stacks.items()
    }
    return {
        "class": type(model.module).__name__,
        "layers": model.n_layers,
        "heads": model.n_heads,
        "d_model": model.d_model,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "precision": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": getattr(text, "_attn_implementation", None) or "none",
        "tokenizer": type(model.tokenizer).__name__ if model.tokenizer is not None else "none",
        "stacks": "; ".join(f"{name}: {what}" for name, what in stacks.items()) or "none",
    }


def _groups(model: "Model") -> list[list["Site"]]:
    """The offered sites, those of one name and stack together."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in model.sites():
        groups.setdefault((site.stack, site.name), []).append(site)
    return list(groups.values())


def _row(model: "Model", site: "Site", address: str) -> dict[str, str]:
    sizes = [(axis, model.size(site, axis)) for axis in site.kind.axes]
    axes = " ".join(f"{axis}={size}" if size else axis for axis, size in sizes)
    return {"site": address, "axes": axes, "meaning": site.kind.about}


def _spread(group: list["Site"]) -> str:
    """`z.0-3` for the four layers of a name, `embed` for one without layers."""
    first = group[0]
    if first.layer is None:
        return str(first)
    return f"{str(first).rpartition('.')[0]}.{_ranges(s.layer for s in group if s.layer is not None)}"


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _modules(model: "Model") -> list[dict[str, Any]]:
    return [
        {
            "module": path or "(the model)",
            "class": type(module).__name__,
            "parameters": sum(p.numel() for p in module.parameters()),
        }
        for path, module in model.module.named_modules()
    ]


def _missing(model: "Model") -> list[dict[str, str]]:
    """Why names are not offered: one row per stack and reason."""
    from underhood.core.offers import REASONS
    from underhood.core.site import KINDS, Site

    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for name, stack in model.anatomy.stacks.items():
        for kind, about in KINDS.items():
            if kind == "logits":
                continue
            for layer in range(len(stack.blocks)) if about.layered else [None]:
                code = model.known.why_not(Site(kind, layer, stack=name))
                if code is not None:
                    layers = found.setdefault((name, code), {}).setdefault(kind, [])
                    layers += [] if layer is None else [layer]
    return []
