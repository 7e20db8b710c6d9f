"""What `underhood inspect` shows of a model, as rows of plain Python."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.core.site import Site

__all__ = ["each_site", "facts", "missing", "modules", "offered"]

Rows = list[dict[str, Any]]


def facts(model: "Model") -> dict[str, Any]:
    """Class, sizes, precision and towers."""
    text = getattr(model.config, "text_config", None) or model.config
    stacks = [
        f"{name or 'main'}: {len(stack.blocks)} blocks of {_block_class(model, stack.blocks)}"
        for name, stack in model.anatomy.stacks.items()
    ]
    return {
        "class": type(model.module).__name__,
        "layers": model.n_layers,
        "heads": model.n_heads or None,
        "d_model": model.d_model,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "precision": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": getattr(text, "_attn_implementation", None),
        "tokenizer": type(model.tokenizer).__name__ if model.tokenizer is not None else None,
        "stacks": "; ".join(stacks) or None,
    }


def _block_class(model: "Model", blocks: Iterable[Any]) -> str:
    classes = [type(model.module.get_submodule(block.path)).__name__ for block in blocks]
    return " and ".join(dict.fromkeys(classes))


def offered(model: "Model") -> Rows:
    """One row per name and stack: where it is, its axes, what it means."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in model.sites():
        groups.setdefault((site.stack, site.name), []).append(site)
    return [_row(model, group[0], _spread(group)) for group in groups.values()]


def each_site(model: "Model") -> Rows:
    """One row per site."""
    return [_row(model, site, str(site)) for site in model.sites()]


def _row(model: "Model", site: "Site", address: str) -> dict[str, str]:
    sizes = [(axis, model.size(site, axis)) for axis in site.kind.axes]
    axes = " ".join(f"{axis}={size}" if size else axis for axis, size in sizes)
    return {"site": address, "axes": axes, "meaning": site.kind.about}


def _spread(group: list["Site"]) -> str:
    """`z.0-3` for the four layers of a name, `embed` for one without layers."""
    layers = [site.layer for site in group if site.layer is not None]
    bare = str(group[0])
    return f"{bare.rpartition('.')[0]}.{ranges(layers)}" if layers else bare


def ranges(numbers: Iterable[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def missing(model: "Model") -> Rows:
    """Why names are not offered: one row per stack, layers and reason."""
    from underhood.core.offers import REASONS

    groups: dict[tuple[str, str, str], list[str]] = {}
    for (stack, name), by_code in _refusals(model).items():
        for code, layers in by_code.items():
            everywhere = len(layers) == len(model.anatomy.stacks[stack].blocks)
            where = "" if everywhere else ranges(layers)
            groups.setdefault((stack, where, code), []).append(name)
    return [
        {
            "site": _together(stack, names),
            "layers": where or "all",
            "why": f"{REASONS[code].what}: {REASONS[code].why}",
            "instead": REASONS[code].instead,
        }
        for (stack, where, code), names in groups.items()
    ]


def _refusals(model: "Model") -> dict[tuple[str, str], dict[str, list[int]]]:
    """For each stack and name, the codes of refusals and the layers that each holds for."""
    from underhood.core.site import KINDS, Site

    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for stack, tower in model.anatomy.stacks.items():
        for name, kind in KINDS.items():
            layers = range(len(tower.blocks))
            for layer in layers if kind.layered else ():
                if code := model.known.why_not(Site(name, layer, stack=stack)):
                    found.setdefault((stack, name), {}).setdefault(code, []).append(layer)
            if not kind.layered and (code := model.known.why_not(Site(name, stack=stack))):
                found[stack, name] = {code: list(layers)}
    return found


def _together(stack: str, names: list[str]) -> str:
    """The names with the stack's prefix; all that begin alike are written `cross_*`."""
    from underhood.core.site import KINDS

    shown = list(names)
    for prefix in ("cross_", "ssm_", "router_", "expert_"):
        family = [name for name in KINDS if name.startswith(prefix)]
        if set(family) <= set(shown):
            shown = [f"{prefix}*", *(name for name in shown if name not in family)]
    return ", ".join(f"{stack}.{name}" if stack else name for name in sorted(shown))


def modules(model: "Model") -> Rows:
    """Every torch module: its path (`module:PATH` addresses it), class and parameters."""
    return [
        {
            "module": path or "(the model)",
            "class": type(module).__name__,
            "parameters": sum(p.numel() for p in module.parameters()),
        }
        for path, module in model.module.named_modules()
    ]
