"""`underhood generate`: what the model writes, without and with edits."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from underhood.cli import options, render
from underhood.core.errors import UsageError

if TYPE_CHECKING:
    from underhood.core.edit import Edit, Plan
    from underhood.core.run import Generation

__all__ = ["generate"]


def generate(
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.")],
    edits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A plan of edits (Plan.save wrote it).")
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE=OP", help="An edit: z.1.2=zero, mlp_out.3=scale:0.5. Repeatable."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 20,
    sample: Annotated[bool, typer.Option("--sample", help="Sample; otherwise greedy.")] = False,
    temperature: Annotated[
        float | None, typer.Option(min=1e-6, help="With --sample. Default: 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --sample. Default: 0.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    model: options.ModelOption = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Let the model go on from a prompt; with edits, beside what it writes unedited.

    Greedy and without penalties unless --sample is given; both samples use the same seed.
    """
    settings = _settings(sample, temperature, seed)
    plan = _plan(edits, edit or [])
    loaded = options.load_model(model, device, dtype, quiet=quiet)
    with render.working("writing", quiet=quiet):
        call: dict[str, Any] = {"max_new_tokens": max_new_tokens, **settings}
        arms = {"unedited": loaded.generate(prompt, **call)}
        if plan is not None:
            arms["edited"] = loaded.generate(prompt, edits=plan, **call)
    fired = _fired(arms["edited"]) if plan is not None else []
    if json:
        said = {k: {"text": g.text[0], "tokens": list(g.strings[0])} for k, g in arms.items()}
        render.document({"prompt": prompt, "settings": call, **said, "fired": fired})
        return
    render.table(("", "text"), [(name, g.text[0]) for name, g in arms.items()], header=False)
    if fired:
        typer.echo("")
        render.table(("edit", "places", "moved"), [list(row.values()) for row in fired])


def _settings(sample: bool, temperature: float | None, seed: int | None) -> dict[str, Any]:
    if not sample:
        for flag, value in (("--temperature", temperature), ("--seed", seed)):
            if value is not None:
                raise UsageError(
                    f"{flag} means nothing when the model writes greedily",
                    given=f"{flag} {value}",
                    do="add --sample, or leave it out",
                )
        return {}
    chosen = {"temperature": 1.0 if temperature is None else temperature, "seed": seed or 0}
    # transformers would apply its default of 50, which is no part of what was asked.
    return {"do_sample": True, "top_k": 0, "top_p": 1.0, **chosen}


def _plan(file: Path | None, texts: list[str]) -> "Plan | None":
    if file is None and not texts:
        return None
    from underhood.core.edit import Plan

    saved = Plan.load(file) if file is not None else Plan()
    return Plan([*saved, *map(_edit, texts)], model=saved.model)


def _edit(text: str) -> "Edit":
    """The edit that `SITE=zero` or `SITE=scale:FACTOR` says."""
    from underhood.core.edit import Edit
    from underhood.core.ops import scale, zero

    site, _, op = text.partition("=")
    name, _, factor = op.partition(":")
    if op == "zero":
        return Edit(site, zero())
    try:
        if name == "scale":
            return Edit(site, scale(float(factor)))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
    raise UsageError(
        "an edit reads SITE=zero or SITE=scale:FACTOR",
        given=f"--edit {text}",
        do="e.g. --edit z.1.2=zero; save other ops with Plan.save and give --edits FILE",
    )


def _fired(generation: "Generation") -> list[dict[str, Any]]:
    return [
        {"edit": _words(report.edit), "places": report.places, "moved": report.moved}
        for report in generation.fired
    ]


def _words(edit: "Edit") -> str:
    """The edit without its brackets, and the numbers of its op."""
    numbers = [f"{k} {v:g}" for k, v in vars(edit.op).items() if isinstance(v, float)]
    return ", ".join([repr(edit).removeprefix("Edit(").removesuffix(")"), *numbers])
