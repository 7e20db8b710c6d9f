"""Jobs that change: the same prompt under several plans, streamed; plans kept.

The columns run one after the other with the same seed, so that they meet the same noise; the
unedited one is always the first. What was written before with the same settings is not written
again: moving one slider runs one column.

Beside each text stands what else the change did, measured with the unedited model: how far the next
token's distribution moved (KL, nats), and how unlikely the text is to it (nats per token).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from underhood.core.edit import Plan
from underhood.core.errors import UnderhoodError
from underhood.core.provenance import describe
from underhood.view import Result, View, bench
from underhood.workbench.asking import Asked, Prompt, Short
from underhood.workbench.desk import Desk, Work
from underhood.workbench.jobs import Job, refusal
from underhood.workbench.models import Loaded
from underhood.workbench.palette import EditForm, make_plan

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = ["Generate", "KeepPlan", "generate", "keep_plan"]

KL, SURPRISE = "KL of the next token (nats)", "surprise to the unedited model (nats per token)"
Edits = Annotated[list[EditForm], Field(max_length=32)]


class Column(Asked):
    """One way to run the prompt."""

    label: Short = ""
    edits: Edits = []


class Generate(Work):
    """Continue a prompt, unedited and under each plan."""

    prompt: Prompt
    columns: Annotated[list[Column], Field(max_length=8)] = []
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] = 20
    sample: bool = False
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    keep: bool = False


class KeepPlan(Work):
    """Save edits as a plan file."""

    name: Short = "plan"
    edits: Annotated[list[EditForm], Field(min_length=1, max_length=32)]
    prompt: Prompt = ""


@dataclass(slots=True)
class Arm:
    """What one column wrote."""

    tokens: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    first: Float[Tensor, " vocab"] | None = None
    effects: dict[str, float] = field(default_factory=dict)
    fired: list[dict[str, Any]] = field(default_factory=list)


class _Listener:
    """Two of transformers' hooks in one: sees the logits of a step, then the token chosen."""

    def __init__(self, model: "Model", arm: Arm, tell: Any) -> None:
        self.model, self.arm, self.tell = model, arm, tell
        self._log: Tensor | None = None

    def scores(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Before temperature and the like: what the model itself says."""
        self._log = scores[0].float().log_softmax(-1)
        if self.arm.first is None:
            self.arm.first = self._log
        return scores

    def chosen(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """After each token; never asks to stop."""
        token = int(ids[0, -1])
        assert self._log is not None
        self.arm.tokens.append(self.model.token_text(token))
        self.arm.probabilities.append(float(self._log[token].exp()))
        self.tell(self.arm.tokens[-1], self.arm.probabilities[-1])
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def generate(desk: Desk, job: Job, loaded: Loaded, asked: Generate) -> str | None:
    """Every column, token by token; a column that is refused leaves the others alone."""
    columns = [Column(label="unedited"), *asked.columns]
    arms: list[tuple[Column, Arm]] = []
    for number, column in enumerate(columns):
        label = column.label or f"edited {number}"
        job.progress(number, len(columns), label)
        job.part("column", column=number, label=label)
        try:
            arm = _arm(desk, job, loaded, asked, number, column, arms[0][1] if arms else None)
        except UnderhoodError as error:
            job.part("refused", column=number, refused=refusal(error))
            if not number:
                raise
            continue
        job.part(
            "column_done", column=number, label=label, tokens=arm.tokens,
            probabilities=arm.probabilities, effects=arm.effects, fired=arm.fired,
        )  # fmt: skip
        arms.append((column.model_copy(update={"label": label}), arm))
    view = _view(asked, arms)
    job.part("view", view=view.to_dict())
    if not asked.keep:
        return None
    return desk.shelf.keep(_result(loaded.model, asked, arms, view), "generate")


def _arm(
    desk: Desk, job: Job, loaded: Loaded, asked: Generate, number: int, column: Column,
    unedited: Arm | None,
) -> Arm:  # fmt: skip
    settings = asked.model_dump(exclude={"columns", "keep"}) | {"model": loaded.facts["name"]}
    edits = column.model_dump_json(exclude={"label"})
    key = (tuple(sorted(settings.items())), edits)
    return desk.arms.get(key, lambda: _written(desk, job, loaded, asked, number, column, unedited))


def _written(
    desk: Desk, job: Job, loaded: Loaded, asked: Generate, number: int, column: Column,
    unedited: Arm | None,
) -> Arm:  # fmt: skip
    model, arm = loaded.model, Arm()
    plan = _plan(desk, model, column.edits, asked.prompt)

    def tell(text: str, probability: float) -> None:
        job.part("token", column=number, text=text, probability=probability)

    listener = _Listener(model, arm, tell)
    options: dict[str, Any] = {}
    if asked.sample:
        # transformers would apply its default of 50, which is no part of what was asked.
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": asked.temperature}
    made = model.generate(
        asked.prompt, max_new_tokens=asked.max_new_tokens, edits=plan, seed=asked.seed,
        logits_processor=[listener.scores], stopping_criteria=[listener.chosen], **options,
    )  # fmt: skip
    arm.fired = [{"edit": repr(f.edit), "places": f.places, "moved": f.moved} for f in made.fired]
    base = unedited or arm
    assert arm.first is not None and base.first is not None
    moved = (base.first.exp() * (base.first - arm.first).nan_to_num(posinf=0, neginf=0)).sum()
    arm.effects = {KL: max(float(moved), 0.0), SURPRISE: _surprise(model, asked.prompt, made.ids)}
    return arm


def _plan(desk: Desk, model: "Model", edits: list[EditForm], prompt: str) -> Plan:
    return make_plan(model, edits, prompt, desk.shelf.plan)


def _surprise(model: "Model", prompt: str, written: Tensor) -> float:
    """Mean negative log-probability of a text under the model as it is."""
    before = model.tokens(prompt).ids.to(written.device)
    ids = torch.cat([before, written[:1]], 1)
    log = model.run({"input_ids": ids}).logits[0, before.shape[1] - 1 : -1].float().log_softmax(-1)
    return -float(log.gather(-1, written[0][:, None]).mean())


def _view(asked: Generate, arms: list[tuple[Column, Arm]]) -> View:
    units = {edit.unit for column, _ in arms for edit in column.edits}
    how = f"temperature {asked.temperature:g}, seed {asked.seed}" if asked.sample else "greedy"
    shown = [
        {
            "label": column.label,
            "tokens": arm.tokens,
            "values": arm.probabilities,
            "effects": arm.effects,
            "note": "; ".join(fired["edit"] for fired in arm.fired),
            "strength": column.edits[0].strength if len(column.edits) == 1 else None,
        }
        for column, arm in arms
    ]
    return bench(
        asked.prompt, shown, unit=units.pop() if len(units) == 1 else "", decoding=how,
        title="What it writes, unedited and edited",
        about="Shade: the probability that each run gave to the token it chose.",
    )  # fmt: skip


def _result(model: "Model", asked: Generate, arms: list[tuple[Column, Arm]], view: View) -> Result:
    import numpy as np
    import xarray

    steps = max(len(arm.tokens) for _, arm in arms)
    chance = np.full((len(arms), steps), np.nan)
    texts = np.full((len(arms), steps), "", dtype=object)
    for i, (_, arm) in enumerate(arms):
        chance[i, : len(arm.tokens)] = arm.probabilities
        texts[i, : len(arm.tokens)] = arm.tokens
    effects = {
        short: ("batch", [arm.effects[name] for _, arm in arms])
        for short, name in (("kl", KL), ("surprise", SURPRISE))
    }
    data = xarray.Dataset(
        {"probability": (("batch", "step"), chance), **effects},
        coords={"label": ("batch", [c.label for c, _ in arms]),
                "token": (("batch", "step"), texts.astype(str))},
    )  # fmt: skip
    made = describe(model, **asked.model_dump(mode="json", exclude={"model", "keep"}))
    return Result("generate", data, view, made)


def keep_plan(desk: Desk, job: Job, loaded: Loaded, asked: KeepPlan) -> str:
    """A plan file, for Python and `underhood generate --edits`."""
    plan = _plan(desk, loaded.model, asked.edits, asked.prompt)
    loaded.model.plan(plan, lengths=None, generating=True)
    return desk.shelf.keep(plan, asked.name)
