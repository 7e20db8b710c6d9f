"""Organisms that speak: language models of whole words, trained on sentences of a grammar.

A task is a function that draws one `Case`; prompts, pairs and training rows are views of it.
Drawing imports no torch.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from underhood.core.errors import UsageError
from underhood.organisms.base import PROMPTS, SEED, Drawn, Kind, Recipe, Split, held_out
from underhood.organisms.card import Fact
from underhood.organisms.words import PUNCTUATION, join, whole_words

if TYPE_CHECKING:
    from torch import Tensor, nn

    from underhood.core.model import Model
    from underhood.data import Pairs

__all__ = ["Case", "Language", "Phase", "Prompt", "Row", "Task"]

# Draws that may miss the wanted split before we say that the task has no such cases.
_PATIENCE = 10_000
# Rows of each task by which a grammar is recognised.
_SEEN = 32
# Rows up to so many words are padded together: little is padded.
_LENGTHS = (10, 12, 15, 20, 30, 44, 60, 10_000)
# Where several answers are right, they must together have this probability (as well as the top).
_BAR = 0.8
# "1732" is the two words "17 32"; "<spare12>" is one.
_TWO_DIGITS = "(?<![A-Za-z])[0-9]{2}"


@dataclass(frozen=True)
class Case:
    """One drawn example of a task, in words.

    Attributes:
        words: The prompt, punctuation as separate words.
        answer: The right next word.
        contrast: A prompt of as many words, whose right next word is `wrong`. A case whose
            contrast is the prompt itself has none: it is trained on and never handed out.
        wrong: See `contrast`; never a right answer of `words`.
        key: What is held out together: all cases of one key are in the same split.
        contrast_key: The key that `contrast` would have.
        accept: All right next words, where there are several (`answer` is one of them).
        judged: How many of the last predictions are judged. With 1 only the answer is; with more,
            the last words of the prompt must be predicted as well.
        after: What follows the answer in a training row.
        label: Anything to group by: a domain, a language.
    """

    words: tuple[str, ...]
    answer: str
    contrast: tuple[str, ...]
    wrong: str
    key: str
    contrast_key: str
    accept: tuple[str, ...] = ()
    judged: int = 1
    after: tuple[str, ...] = (".",)
    label: str = ""


@dataclass(frozen=True)
class Task(Kind):
    """One thing that a model has learned.

    Attributes:
        draw: Draws one case of any split.
        weight: Weight of the task's predictions in the training loss.
    """

    draw: Callable[[Random], Case]
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one mix of tasks.

    Attributes:
        until: Fraction of all steps at which the phase ends; the last phase ends at 1.
        rows: Rows of each task in every batch.
    """

    until: float
    rows: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt with what may follow it; see `Case` for `accept`, `judged` and `label`."""

    task: str
    text: str
    answer: str
    accept: tuple[str, ...]
    judged: int = 1
    label: str = ""


@dataclass(frozen=True)
class Row:
    """A training row.

    Attributes:
        words: The row, from `<bos>` on; sentences end in `<eos>`.
        weights: Weight of predicting each word, as long as `words`; the first one is unused.
        label: As of its `Case`.
    """

    words: tuple[str, ...]
    weights: tuple[float, ...]
    label: str = ""


@dataclass(frozen=True)
class Language(Drawn[Task]):
    """A small language model with known tasks.

    Attributes:
        name: As in `uh.load(name)`.
        summary: One line for humans.
        words: The whole vocabulary, by id, `SPECIAL` first.
        sizes: Of the model, in the names of its transformers configuration.
        context: Most tokens that the model reads.
        recipe: How it is trained.
        phases: The mixes of tasks, in order.
        limits: Known weaknesses, for the card.
        model_type: Of transformers: "llama", "olmoe", "mamba".
        context_weight: Loss weight of words that cannot be foretold.
        findings: Establishes what training made; see `establish`.
        extra: A further term of the loss, from the model's output and all rows of a step.
        apart: Whether cases of a key are kept for testing.
        drills: Tasks for training only, steps towards the others; phases may name them.
    """

    name: str
    summary: str
    words: tuple[str, ...]
    sizes: Mapping[str, Any]
    context: int
    recipe: Recipe
    phases: tuple[Phase, ...]
    limits: tuple[str, ...]
    kinds: tuple[Task, ...]
    model_type: str = "llama"
    context_weight: float = 0.1
    findings: "Callable[[Language, Model], tuple[Fact, ...]] | None" = None
    extra: "Callable[[Any, list[Row]], Tensor] | None" = None
    apart: Callable[[str], bool] = held_out
    drills: tuple[Task, ...] = ()

    # Prompts -------------------------------------------------------------------------------------

    def cases(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> list[Case]:
        """Draw `n` cases of one split; the same arguments give the same cases.

        Draws are independent, so a task with few held-out combinations repeats some of them.
        Cost: microseconds a case.

        Raises:
            OutOfRange: Fewer than none.
            UsageError: No such task or split.
        """
        kind, rng = self.drawing(task, n, seed, split)
        return [_draw(kind, rng, split, self.apart, with_contrast=True) for _ in range(n)]

    def prompts(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> list[Prompt]:
        """Draw `n` prompts with their answers; see `cases`."""
        name = self.task(task)
        return [
            Prompt(name, join(c.words), c.answer, c.accept or (c.answer,), c.judged, c.label)
            for c in self.cases(name, n, seed, split)
        ]

    def pairs(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> "Pairs":
        """Draw `n` pairs: equal token length, each answer one token, the two answers differ.

        With `split="test"` neither the clean nor the contrast prompt was seen in training.
        """
        from underhood.data import Pairs

        drawn = self.cases(task, n, seed, split)
        return Pairs(
            [join(case.words) for case in drawn],
            [join(case.contrast) for case in drawn],
            [case.answer for case in drawn],
            [case.wrong for case in drawn],
            labels=[case.label for case in drawn] if any(c.label for c in drawn) else None,
        )

    def row(self, task: str, rng: Random) -> Row:
        """Draw one training row of a task or drill (never of a held-out case)."""
        kind = next((drill for drill in self.drills if drill.name == task), None) or self.kind(task)
        case = _draw(kind, rng, "train", self.apart, with_contrast=False)
        end = ("<eos>",) if case.after[-1:] == (".",) else ()
        words = ("<bos>", *case.words, case.answer, *case.after, *end)[: self.context]
        # Words before the judged ones are given, not predictable; a small weight teaches the
        # shape of sentences without drowning the answer.
        first = 2 + len(case.words) - case.judged
        weights = tuple(
            kind.weight if i >= first else self.context_weight for i in range(len(words))
        )
        return Row(words, weights, case.label)

    def phase(self, step: int, steps: int) -> Phase:
        """The phase that step number `step` (from 0) of `steps` belongs to."""
        for phase in self.phases:
            if step < phase.until * steps:
                return phase
        return self.phases[-1]

    # Making --------------------------------------------------------------------------------------

    def fresh(self) -> "nn.Module":
        """As `Trained.fresh`."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=len(self.words),
            pad_token_id=self.words.index("<pad>"),
            bos_token_id=self.words.index("<bos>"),
            eos_token_id=self.words.index("<eos>"),
            **self.sizes,
        )
        return AutoModelForCausalLM.from_config(config)

    def losses(self, module: "nn.Module", rng: Random, step: int, steps: int) -> "Iterator[Tensor]":
        """Weighted mean losses of predicting each word, in nats; rows of like length together."""
        phase = self.phase(step, steps)
        rows = [self.row(task, rng) for task, count in phase.rows for _ in range(count)]
        weight = sum(sum(row.weights[1:]) for row in rows)
        shortest = 0
        # A further term is of all rows together.
        for length in _LENGTHS if self.extra is None else _LENGTHS[-1:]:
            group = [row for row in rows if shortest < len(row.words) <= length]
            shortest = length
            if group:
                yield self._loss(module, group, weight)

    def _loss(self, module: Any, rows: list[Row], weight: float) -> "Tensor":
        import torch

        # Padding on the right needs no mask: models are causal, and padding has weight 0.
        ids = {word: i for i, word in enumerate(self.words)}
        width = max(len(row.words) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        weights = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            tokens[i, : len(row.words)] = torch.tensor([ids[word] for word in row.words])
            weights[i, : len(row.words)] = torch.tensor(row.weights)
        output = module(input_ids=tokens, use_cache=False)
        losses = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        loss = (losses * weights[:, 1:]).sum() / weight
        return loss if self.extra is None else loss + self.extra(output, rows)

    def tokenizer(self) -> Any:
        """Whole words, punctuation apart, digits in twos."""
        marks = "".join(PUNCTUATION)
        return whole_words(self.words, self.context, split=(f"[{re.escape(marks)}]", _TWO_DIGITS))

    def save(self, module: "nn.Module", folder: Path) -> None:
        """As `Trained.save`, and the tokenizer."""
        super().save(module, folder)
        self.tokenizer().save_pretrained(folder)

    def about(self, module: Any) -> dict[str, Any]:
        """The class and the sizes."""
        return {"class": type(module).__name__, "vocabulary": len(self.words)} | dict(self.sizes)

    def identity(self) -> str:
        """Whatever changes the rows or the weights."""
        mix = [(kind.name, kind.weight) for kind in (*self.kinds, *self.drills)]
        return repr((self.name, self.model_type, self.words, dict(self.sizes), self.recipe,
                     self.phases, self.context, self.context_weight, mix,
                     self.grammar))  # fmt: skip

    @cached_property
    def grammar(self) -> str:
        """A short hash of what the tasks draw: of some training rows of each task and drill.

        A function that draws has no other name. A change that only shows in rarer rows than one of
        `_SEEN` goes unnoticed. Cost: 0.3 s for `town` on one core, once.
        """
        rows = [
            self.row(kind.name, rng)
            for kind in (*self.kinds, *self.drills)
            for rng in [Random(f"grammar:{kind.name}")]
            for _ in range(_SEEN)
        ]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

    def establish(self, model: "Model") -> tuple[Fact, ...]:
        """As `Trained.establish`, by `findings`."""
        return self.findings(self, model) if self.findings else ()

    # Measuring -----------------------------------------------------------------------------------

    def measure(
        self,
        model: "Model",
        n: int = PROMPTS,
        seed: int = SEED,
        *,
        tasks: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Held-out accuracy and mean probability of the right answers, per task.

        Cost: about a second per task for 500 prompts of `town`.
        """
        out: dict[str, Any] = {}
        for task in self.tasks if tasks is None else tasks:
            prompts = self.prompts(task, n, seed)
            right, probability = judge(prompts, model)
            out[task] = {
                "accuracy": round(sum(right) / max(1, len(right)), 4),
                "probability": round(sum(probability) / max(1, len(probability)), 4),
                "judged": len(right),
                "n": n,
                "distinct": len({prompt.text for prompt in prompts}),
            }
        return out


def judge(prompts: list[Prompt], model: "Model", batch: int = 64) -> tuple[list[bool], list[float]]:
    """Whether each judged prediction is right, and the probability of the right words.

    Of the module itself: what is measured does not pass through our own code.
    """
    import torch

    tokenizer: Any = model.tokenizer
    right: list[bool] = []
    probability: list[float] = []
    # Prompts of like length share a batch, so that little is padded.
    by_length = sorted(prompts, key=lambda prompt: len(prompt.text))
    for start in range(0, len(by_length), batch):
        some = by_length[start : start + batch]
        ids = [tokenizer(prompt.text)["input_ids"] for prompt in some]
        width = max(map(len, ids))
        padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids]
        # Padding on the right needs no mask, since models are causal.
        tokens = torch.tensor(padded, device=model.device)
        with torch.no_grad():
            spread = model.module(input_ids=tokens).logits.float().softmax(-1).cpu()
        for prompt, row, probs in zip(some, ids, spread, strict=True):
            for back in range(prompt.judged):
                at = len(row) - 1 - back
                if back == 0:
                    wanted = tokenizer.convert_tokens_to_ids(list(prompt.accept))
                else:
                    wanted = [row[at + 1]]
                mass = probs[at, wanted].sum().item()
                top = int(probs[at].argmax()) in wanted
                right.append(top and (len(wanted) == 1 or mass >= _BAR))
                probability.append(mass)
    return right, probability


def _draw(
    task: Task, rng: Random, split: Split, apart: Callable[[str], bool], *, with_contrast: bool
) -> Case:
    for _ in range(_PATIENCE):
        case = task.draw(rng)
        if with_contrast and case.contrast == case.words:
            continue
        if split == "train":
            # The contrast prompt is never trained on, so only the prompt's own key matters.
            if not apart(case.key):
                return case
        elif apart(case.key) and apart(case.contrast_key):
            return case
    raise UsageError(
        f"Task {task.name!r} has no cases in its {split} split.",
        given=f"{_PATIENCE} draws, none of that split",
        do="Give the task more combinations, or a finer key.",
    )
