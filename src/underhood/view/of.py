"""Views of what is no result: a model (its modules), a run, a generation, an edit, a plan.

Nothing here runs a model. A model's tree is read off its modules and its anatomy; a run shows what
it already holds.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from underhood.core.edit import Edit, Plan
from underhood.core.errors import UsageError
from underhood.core.model import Model
from underhood.core.run import Generation, Run
from underhood.core.site import Site
from underhood.view.build import bars, group, table, texts, tokens
from underhood.view.build_panels import tree
from underhood.view.doc import Branch, Group, Table, Texts, Tree, View

__all__ = ["view_of"]

_ROWS = 3  # prompts of a run that are shown
_TOP = 8  # next tokens per prompt


def view_of(thing: Any) -> View:
    """The view of a model, run, generation, edit or plan.

    Args:
        thing: One of these; a view itself, or a result, gives its view.

    Returns:
        A model: the tree of its modules with shapes, sizes and the addresses of its sites. A run:
        its tokens, the top next tokens, what was recorded and what edits did. An edit or plan:
        what is changed, where, and how strongly.

    Raises:
        UsageError: Something else.

    Cost: no forward.

    Example:
        >>> import underhood as uh
        >>> root = view_of(uh.load()).root
        >>> root.name, root.parameters > 0
        ('town', True)
    """
    match thing:
        case Model():
            return _model(thing)
        case Run():
            return _run(thing)
        case Generation():
            return _generation(thing)
        case Edit():
            return _edits([thing])
        case Plan():
            return _edits(thing)
        case View():
            return thing
    found = getattr(thing, "view", None)
    if isinstance(found, View):
        return found
    raise UsageError(
        "there is no view of this",
        given=type(thing).__name__,
        do="give a model, run, generation, edit, plan or result",
    )


# Models ------------------------------------------------------------------------------------------


def _model(model: Model) -> Tree:
    sites: dict[str, list[str]] = {}
    for site in model.sites():
        sites.setdefault(model.known.home(site), []).append(str(site))
    root = _branch(model.module, model.name, "", sites, {})
    return tree(
        root,
        title=f"{model.name}: {type(model.module).__name__}",
        about="Every module with its parameters. Addresses name what can be recorded and changed "
        "there: model.run(text, record=[address]).",
    )


def _branch(
    module: nn.Module, name: str, path: str, sites: dict[str, list[str]], held: dict[int, int]
) -> Branch:
    """A module and all below it; `held` collects its tensors, so that tied ones count once."""
    mine = {id(p): p.numel() for p in module.parameters(recurse=False)}
    shapes = {n: list(p.shape) for n, p in module.named_parameters(recurse=False)}
    children = []
    for child, part in module.named_children():
        below = f"{path}.{child}" if path else child
        children.append(_branch(part, child, below, sites, mine))
    held |= mine
    return Branch(
        name=name,
        type=type(module).__name__,
        path=path,
        shapes=shapes,
        parameters=sum(mine.values()),
        sites=sites.get(path, []),
        children=_together(children),
    )


def _together(children: list[Branch]) -> list[Branch]:
    """Numbered neighbours that are alike and have no addresses (experts) become one branch."""
    found: list[Branch] = []
    firsts: list[Branch] = []
    for child in children:
        alike = found and child.name.isdigit() and _shape(child) == _shape(firsts[-1])
        if not alike or _addressed(child) or not firsts[-1].name.isdigit():
            found.append(child)
            firsts.append(child)
            continue
        first, many = firsts[-1], found[-1].many + 1
        name = f"{first.name}-{child.name}"
        total = found[-1].parameters + child.parameters
        found[-1] = first.model_copy(update={"name": name, "many": many, "parameters": total})
    return found


def _shape(branch: Branch) -> tuple[Any, ...]:
    inner = tuple((child.name, _shape(child)) for child in branch.children)
    return branch.type, branch.parameters, tuple(map(str, branch.shapes.items())), inner


def _addressed(branch: Branch) -> bool:
    return bool(branch.sites) or any(_addressed(child) for child in branch.children)


# Runs --------------------------------------------------------------------------------------------


def _run(run: Run) -> Group:
    rows = list(run.tokens.strings[:_ROWS]) if run.tokens is not None else []
    names = [f"Prompt {i}" if len(rows) > 1 else "Prompt" for i in range(len(rows))]
    views: list[View] = [tokens(row, title=name) for row, name in zip(rows, names, strict=True)]
    views += _next(run, names)
    views.append(_recorded(run))
    if run.fired:
        views.append(
            table(
                [
                    "edit",
                    "positions it acted on",
                    {"name": "how far it moved them", "format": ".3f"},
                ],
                [[repr(f.edit), f.places, f.moved] for f in run.fired],
                title="What the edits did",
                about="How far: length of the change over length of the activation.",
            )
        )
    more = len(run.tokens) - len(rows) if run.tokens is not None else 0
    about = f"{more} more prompts are not shown." if rows and more > 0 else ""
    return group(views, title="Run", about=about, provenance=run.provenance)


def _next(run: Run, names: Sequence[str]) -> list[View]:
    """The likeliest next tokens of the prompts shown."""
    logits = getattr(run.output, "logits", None)
    if run.text is None or run.text.tokenizer is None or logits is None or not names:
        return []
    found = run.last_logits[: len(names)].detach().float().softmax(-1)
    best = found.topk(min(_TOP, found.shape[-1]))
    return [
        bars(
            [run.text.token_text(token) for token in ids],
            chances,
            unit="probability",
            signed=False,
            span=(0, 1),
            title="Next token" if len(names) == 1 else f"Next token after {name.lower()}",
        )
        for name, ids, chances in zip(
            names, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def _recorded(run: Run) -> Table:
    """One row per name: its layers together where they have one shape."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for read, value in run.recorded.items():
        site = read.site
        axes = run.axes(site)
        shape = tuple(value.shape)
        named = ", ".join(f"{a} {n}" for a, n in zip(axes, shape, strict=False))
        if len(axes) != len(shape):
            named = " x ".join(map(str, shape))
        bare = site.at(0) if site.layer is not None else site
        key = (str(bare.whole), site.unit, named, str(value.dtype).removeprefix("torch."))
        groups.setdefault(key, []).append(site)
    rows = [
        [
            str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}",
            len(group),
            named,
            kind,
        ]
        for (_, _, named, kind), group in groups.items()
    ]
    about = "" if rows else "Nothing. Ask for it: model.run(text, record=['resid_post'])."
    return table(
        ["site", "how many", "shape", "precision"], rows, title="What was recorded", about=about
    )


def _generation(made: Generation) -> Texts:
    columns = [
        {"label": f"after prompt {i}" if len(made.strings) > 1 else "written", "tokens": list(row)}
        for i, row in enumerate(made.strings)
    ]
    return texts(columns, title="Generated", provenance=made.run.provenance)


# Edits -------------------------------------------------------------------------------------------


def _edits(edits: Sequence[Edit]) -> Table:
    columns = ["site", "change", "where", "how strong", "when"]
    title = "Edit" if isinstance(edits, list) else f"Plan of {len(edits)} edits"
    about = "In this order: later edits see what earlier ones left." if len(edits) > 1 else ""
    return table(columns, [_edit(edit) for edit in edits], title=title, about=about)


def _edit(edit: Edit) -> list[str]:
    shapes = [f"{n} {'x'.join(map(str, t.shape))}" for n, t in edit.op.tensors().items()]
    change = edit.op.name + (f" ({', '.join(shapes)})" if shapes else "")
    where = "all real tokens" if edit.where.everything else repr(edit.where)[6:-1]
    strong = f"{edit.strength:g}"
    if edit.unit != "raw":
        strong += f" {edit.unit}" + (f" of {edit.sigma:g}" if edit.sigma is not None else "")
    when = []
    if edit.gate is not None:
        side = "above" if edit.gate.above else "below"
        when.append(f"where {edit.gate.site} reads {side} {edit.gate.threshold:g}")
    if edit.schedule is not None:
        points = ", ".join(f"{f:g} at step {s:g}" for s, f in edit.schedule.points)
        when.append(f"factor {points}")
    return [str(edit.site), change, where, strong, "; ".join(when) or "always"]
