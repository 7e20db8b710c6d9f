"""`underhood inspect`: what a model is made of, what it offers, and what it lacks, with reasons."""

from typing import Annotated, Any

import typer

from underhood.cli import options, render

__all__ = ["inspect"]


def inspect(
    model: options.ModelArgument = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site, one per line.")] = False,
    modules: Annotated[bool, typer.Option("--modules", help="List every torch module.")] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="Show the modules as a tree, with shapes and sites.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Show a model's class and sizes, the sites it offers with their axes, and what it lacks."""
    loaded = options.load_model(model, device, dtype, quiet=quiet)
    if tree:
        from underhood.view import view_of

        view = view_of(loaded)
        if json:
            render.document(view.to_dict())
        else:
            render.show_view(view)
        return
    from underhood.cli import anatomy

    parts: dict[str, Any] = {}
    if sites:
        parts["sites"] = anatomy.each_site(loaded)
    if modules:
        parts["modules"] = anatomy.modules(loaded)
    if not parts:
        parts["model"] = {"name": loaded.name, **anatomy.facts(loaded)}
        parts["sites"] = anatomy.offered(loaded)
        parts["not offered"] = anatomy.missing(loaded)
    if json:
        render.document(parts)
        return
    for i, (name, rows) in enumerate(parts.items()):
        if i:
            typer.echo("")
        if len(parts) > 1:
            render.heading(name)
        _show(rows)


def _show(rows: Any) -> None:
    if isinstance(rows, dict):
        known = [(what, value) for what, value in rows.items() if value is not None]
        render.table(("what", "value"), known, header=False)
    elif rows:
        render.table(list(rows[0]), [list(row.values()) for row in rows])
    else:
        typer.echo("none; address the parts as module:PATH (--modules lists the paths)")
