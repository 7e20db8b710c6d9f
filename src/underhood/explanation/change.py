"""Part 7: the important heads changed, and what the model says then.

Each head is given the values it had on the contrast prompt (resample ablation), at every position,
so the change stays on the model's own distribution. The control is the same change made to as many
heads drawn at random, several times.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from underhood.core.edit import Edit
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.ops import patch
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.explanation.question import Question
from underhood.view import View, sentences, table, texts

__all__ = ["Change", "change"]

DRAWS = 10
NEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Change:
    """What a change of some heads does.

    Attributes:
        heads: The heads that were changed.
        after: Logit difference with them changed.
        random: Logit differences with as many random heads changed.
        top: The most probable next tokens with them changed.
        written: Prompt and continuation, without and with the change.
    """

    heads: list[tuple[int, int]]
    after: float
    random: list[float]
    top: list[tuple[str, float]]
    written: tuple[str, str]

    @property
    def random_mean(self) -> float:
        """Mean logit difference after changing random heads."""
        return sum(self.random) / len(self.random) if self.random else float("nan")


def _edits(model: Model, heads: list[tuple[int, int]], contrast: Run) -> list[Edit]:
    return [
        Edit(Site("z", layer, head, stack=model.main), patch(contrast)) for layer, head in heads
    ]


def change(
    model: Model, question: Question, heads: list[tuple[int, int]], *, seed: int = 0
) -> Change:
    """Give `heads` their contrast values, and as many random heads for control.

    Cost: one forward per random draw and two more; two short generations.
    """
    contrast = model.run(question.other, record=["z"])
    said, instead = (model_id(question, i) for i in (0, 1))

    def gap(chosen: list[tuple[int, int]]) -> tuple[float, torch.Tensor]:
        logits = model.run(question.prompt, edits=_edits(model, chosen, contrast)).last_logits[0]
        return float(logits[said] - logits[instead]), logits.float().softmax(-1)

    after, probabilities = gap(heads)
    others = [
        (s.layer, h)
        for s in model.resolve("z")
        for h in range(model.size(s, "head") or 0)
        if s.layer is not None and (s.layer, h) not in heads
    ]
    make = torch.Generator().manual_seed(seed)
    random = []
    for _ in range(DRAWS if len(others) >= len(heads) else 0):
        drawn = torch.randperm(len(others), generator=make)[: len(heads)].tolist()
        random.append(gap([others[i] for i in drawn])[0])
    found = probabilities.topk(min(5, probabilities.shape[-1]))
    top = [
        (model.token_text(i), p)
        for i, p in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
    edits = _edits(model, heads, contrast)
    return Change(
        heads, after, random, top, (_write(model, question), _write(model, question, edits))
    )


def _write(model: Model, question: Question, edits: Sequence[Edit] = ()) -> str:
    """The prompt and what the model writes after it."""
    made = model.generate(question.prompt, max_new_tokens=NEW_TOKENS, edits=edits)
    prompt = model.tokens(question.prompt).ids[0].tolist()
    return model.text.decode([*prompt, *made.ids[0].tolist()])


def model_id(question: Question, which: int) -> int:
    """Token id of the answer (0) or the wrong answer (1)."""
    column = (question.pairs.answers, question.pairs.wrong)[which]
    return int(column[0][0])


def views(question: Question, found: Change) -> list[View]:
    """How part 7 is shown."""
    names = ", ".join(part_name("head", *place) for place in found.heads)
    rows = [
        ["unchanged", question.clean, question.top[0][0], question.top[0][1]],
        [f"{names} as on the contrast", found.after, found.top[0][0], found.top[0][1]],
    ]
    low, high = (min(found.random), max(found.random)) if found.random else (None, None)
    control = None
    if found.random:
        control = table(
            ["heads changed", "mean logit difference", "lowest", "highest"],
            [[f"{len(found.heads)} random heads, {len(found.random)} draws",
              found.random_mean, low, high]],
            title="Control: the same change to random heads",
        )  # fmt: skip
    compared = table(
        ["run", f"logit {question.answer!r} - {question.wrong!r}", "says next", "probability"],
        rows,
        title="What the change does",
        about="Each head keeps working, but reads out what it read out on the contrast prompt.",
        control=control,
    )
    columns = [
        {"label": label, "tokens": [text], "note": note}
        for label, note, text in (
            ("as it is", "greedy", found.written[0]),
            ("changed", f"greedy, {names} as on the contrast", found.written[1]),
        )
    ]
    return [compared, texts(columns, title="What the model writes, without and with the change")]


def nothing(reason: str) -> list[View]:
    """Part 7 where there is nothing to change."""
    return [sentences([reason], title="Nothing was changed")]
