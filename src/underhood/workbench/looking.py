"""Jobs that look: a prompt at a glance, one site, the explanation, any method."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from underhood.core.errors import NotOffered, UsageError
from underhood.core.site import Site
from underhood.view import View, bars, grid, group, table
from underhood.view import tokens as strip
from underhood.workbench.asking import Many, Prompt, Short
from underhood.workbench.desk import Desk, Work
from underhood.workbench.forms import Options, arguments
from underhood.workbench.jobs import Job, refusal
from underhood.workbench.models import Loaded

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.core.run import Run as ModelRun
    from underhood.explanation import Explanation

__all__ = ["Explain", "Look", "Run", "SiteAsked", "explain", "look", "method", "site"]

NEXT = 10  # next tokens shown
DRAWN = 256  # tokens up to which every head's pattern is sent to a page


class Look(Work):
    """Look at a prompt."""

    prompt: Prompt


class SiteAsked(Work):
    """Read one site on a prompt; a name without a layer reads all layers."""

    prompt: Prompt
    site: Short


class Explain(Work):
    """Explain what comes after a prompt."""

    prompt: Prompt
    contrast: Prompt | None = None
    answer: Short | None = None
    wrong: Short | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Run(Work):
    """Run a method: its data, and its options as they would be typed."""

    name: Short
    prompts: Many = []
    contrasts: Many = []
    answers: Many = []
    wrong: Many = []
    other: Short | None = None
    options: Options = {}


def look(desk: Desk, job: Job, loaded: Loaded, asked: Look) -> None:
    """Next tokens, the prompt's own probabilities, the lens, the heads."""
    model = loaded.model
    run = model.run(asked.prompt)
    assert run.tokens is not None
    words = list(run.tokens.strings[0])
    job.part("prompt", tokens=words, ids=run.tokens.ids[0].tolist())
    _told(job, "next", "What it says next", lambda: _next(model, run))
    _told(job, "tokens", "How expected each token was", lambda: _expected(run, words))
    _told(job, "lens", "What each layer would say", lambda: _lens(job, model, asked.prompt))
    _told(job, "attention", "Where the heads look", lambda: _heads(model, asked.prompt, words))


def _told(job: Job, name: str, title: str, make: Callable[[], View]) -> None:
    """One part; where the model or the prompt does not allow it, the reason."""
    try:
        view = make()
    except (NotOffered, UsageError) as error:
        job.part(name, title=title, refused=refusal(error))
    else:
        job.part(name, title=title, view=view.to_dict())


def _next(model: "Model", run: "ModelRun") -> View:
    found = run.last_logits[0].float().softmax(-1).topk(min(NEXT, run.last_logits.shape[-1]))
    words = [model.token_text(i) for i in found.indices.tolist()]
    return bars(
        words, found.values.cpu().numpy(), signed=False, span=(0, 1), unit="probability",
        title="What it says next", about=f"The {len(words)} most probable next tokens.",
        python=f"uh.load({model.name!r}).run({_prompt(run)!r}).last_logits",
    )  # fmt: skip


def _prompt(run: "ModelRun") -> str:
    return "".join(run.tokens.strings[0]) if run.tokens is not None else ""


def _expected(run: "ModelRun", words: list[str]) -> View:
    """Each token's probability after those before it."""
    assert run.tokens is not None
    ids = run.tokens.ids[0, 1:]
    if run.logits.ndim != 3:
        raise NotOffered("this model predicts no tokens", given=f"logits {run.logits.shape}")
    chance = run.logits[0, :-1].float().softmax(-1).gather(-1, ids[:, None].to(run.logits.device))
    return strip(
        words, [None, *chance[:, 0].tolist()], scale="probability", unit="probability",
        title="How expected each token was",
        about="The probability that the model gave to each token of the prompt before reading it.",
    )  # fmt: skip


def _lens(job: Job, model: "Model", prompt: str) -> View:
    from underhood.methods.read.logit_lens import logit_lens

    found = logit_lens(model, prompt)
    job.part(
        "readings",
        layers=found["layer"].values.tolist(),
        tokens=found["top_token"].values.tolist(),
        probabilities=[[[round(float(p), 4) for p in cell] for cell in row]
                       for row in found["top_prob"].values],
    )  # fmt: skip
    return found.view


def _heads(model: "Model", prompt: str, words: list[str]) -> View:
    from underhood.methods.read.attention import attention

    if len(words) > DRAWN:
        raise UsageError(
            "the prompt is too long for a picture of every head",
            given=f"{len(words)} tokens", do=f"look at {DRAWN} or fewer, or run the method alone",
        )  # fmt: skip
    return attention(model, prompt).view


# One site ---------------------------------------------------------------------------------------

MEASURES = ("length", "mean", "standard deviation", "largest", "kurtosis")


def site(desk: Desk, job: Job, loaded: Loaded, asked: SiteAsked) -> None:
    """Statistics of a site: by position, or of all its layers by layer and position."""
    model = loaded.model
    place = Site.parse(asked.site)
    run = model.run(asked.prompt, record=place)
    assert run.tokens is not None
    words = list(run.tokens.strings[0])
    view = _layers(run, place, words) if place.spreads else _one(run, place, words)
    call = f"uh.load({model.name!r}).run({asked.prompt!r}, record={str(place)!r})[{str(place)!r}]"
    job.part("site", title=str(place), view=view.model_copy(update={"python": call}).to_dict())


def _rows(run: "ModelRun", place: Site, length: int) -> Tensor:
    """One row of numbers per position (all of it in one row where it has no positions)."""
    value, axes = run[place].float(), run.axes(place)
    axis = next((i for i, a in enumerate(axes) if a in ("pos", "query")), None)
    if axis is None:
        axis = 1 if value.ndim > 2 and value.shape[1] == length else None
    rows = value[None].flatten() if axis is None else value.movedim(axis, 0)
    return rows.reshape(rows.shape[0] if axis is not None else 1, -1)


def _measured(rows: Tensor) -> Tensor:
    """`[pos, measure]`; scores of keys that are out of sight are left out."""
    found = []
    for row in rows:
        x = row[torch.isfinite(row)]
        if not x.numel():
            found.append(torch.full((len(MEASURES),), torch.nan))
            continue
        centred = x - x.mean()
        spread = centred.pow(2).mean()
        kurtosis = centred.pow(4).mean() / spread.pow(2).clamp(min=1e-30)
        found.append(torch.stack([x.norm(), x.mean(), spread.sqrt(), x.abs().max(), kurtosis]))
    return torch.stack([f.cpu() for f in found])


def _one(run: "ModelRun", place: Site, words: list[str]) -> View:
    found = _measured(_rows(run, place, len(words)))
    rows: list[list[Any]] = [
        [i, words[i] if len(found) == len(words) else "", *row]
        for i, row in enumerate(found.tolist())
    ]
    columns: list[Any] = [{"name": "position", "format": "d"}, "token"]
    columns += [{"name": name, "format": ".3g"} for name in MEASURES]
    shown: list[View] = [
        table(
            columns, rows, title=f"{place}, position by position",
            about="Kurtosis is 3 for a normal distribution; far above it, few numbers carry it.",
        )
    ]  # fmt: skip
    if len(found) == len(words):
        lengths = strip(
            words, found[:, 0].tolist(), scale="sequential", unit="length",
            title=f"Length of {place} at each token",
        )  # fmt: skip
        shown.insert(0, lengths)
    return group(shown, title=str(place))


def _layers(run: "ModelRun", place: Site, words: list[str]) -> View:
    sites = [s for s in run.sites if s.layer is not None]
    lengths = [_measured(_rows(run, s, len(words)))[:, 0].tolist() for s in sites]
    return grid(
        lengths, rows=[str(s.layer) for s in sites], cols=words, row_name="layer", col_name="token",
        scale="sequential", unit="length", title=f"Length of {place} in every layer",
        about="The first token's is often hundreds of times longer than the others.",
    )  # fmt: skip


# Methods ----------------------------------------------------------------------------------------


def explain(desk: Desk, job: Job, loaded: Loaded, asked: Explain) -> str:
    """The explanation; each part is told as it is finished."""
    import underhood
    from underhood.explanation.sentences import lead

    def finished(found: "Explanation") -> None:
        job.part("lead", sentences=lead(found))
        part = asdict(found.sections[-1]) | {
            "views": [view.to_dict() for view in found.sections[-1].views]
        }
        job.part("section", **part)

    found = underhood.explain(
        loaded.model, asked.prompt, asked.contrast or None, answer=asked.answer or None,
        wrong=asked.wrong or None, seed=asked.seed, finished=finished,
        progress=lambda name, number, total: job.progress(number, total, name),
    )  # fmt: skip
    return desk.shelf.keep(found, "explain")


def method(desk: Desk, job: Job, loaded: Loaded, asked: Run) -> str:
    """Any method; its result is kept."""
    from underhood.cli.arguments import Given
    from underhood.methods.registry import find

    chosen = find(asked.name)
    other = asked.other
    given = Given(
        asked.prompts, asked.contrasts, asked.answers, asked.wrong,
        other=(lambda: desk.models.load(other).model) if other else None,
    )  # fmt: skip
    result = chosen(loaded.model, **arguments(chosen, given, asked.options, desk.shelf.plan))
    if asked.prompts:
        result = replace(result, provenance={"prompt": _first(asked.prompts)} | result.provenance)
    job.part("view", title=chosen.name, view=result.view.to_dict(), provenance=result.provenance)
    return desk.shelf.keep(result, chosen.name)


def _first(prompts: list[str]) -> str:
    """What a list of results says of the data."""
    return prompts[0] + (f" (first of {len(prompts)})" if len(prompts) > 1 else "")
