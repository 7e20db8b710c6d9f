"""`stream`: a small Mamba-2 without attention that does four of the tasks of `town`.

Grammar and held-out splits are those of `town` (its own drawing functions): capitals, successors,
agreement, mood. Its words are all that these tasks can say.

Three blocks, each a mixer alone: a convolution over this word and the last one, a state of 4 heads
x 32 channels x 8, and a gate. The convolutions reach three words back in all; what is further away
comes through a state. Nothing is planted. `findings` established, by exact ablation on held-out
prompts: which layer's mixer each task needs most, against the other layers; which layer's state
(`ssm_B` set to zero: nothing is written to it); and that the state holds the deciding word (nothing
written at the words in which prompt and contrast differ, or just after them, where the convolution
still sees them, against random other words).
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from underhood.organisms.base import Recipe
from underhood.organisms.card import Fact
from underhood.organisms.language import Language, Phase, Task
from underhood.organisms.town import ORGANISM as TOWN
from underhood.organisms.words import PUNCTUATION, SPECIAL

if TYPE_CHECKING:
    from underhood.core.edit import Edit
    from underhood.core.model import Model

LAYERS = 3
# Prompts per task that facts are established on.
N = 100
# Accuracy whose loss counts as a need.
ENOUGH = 0.1
# Draws per task that its words are collected from: the rarest comes up in one of thirty.
_DRAWS = 1000


def _words(kinds: tuple[Task, ...]) -> tuple[str, ...]:
    """Every word that the tasks can say, in alphabetical order; `town` may know others."""
    found: set[str] = set()
    for kind in kinds:
        rng = Random(kind.name)
        for case in (kind.draw(rng) for _ in range(_DRAWS)):
            found |= {*case.words, *case.contrast, *case.accept, *case.after, case.answer}
    return tuple(sorted(found - set(PUNCTUATION)))


KINDS = tuple(TOWN.kind(name) for name in ("capitals", "successors", "agreement", "mood"))


def findings(stream: Language, model: "Model") -> tuple[Fact, ...]:
    """Which layers and which states the tasks need, and what the states hold."""
    from underhood.organisms.establish import By, Trial, effect, parts

    writes = tuple(f"ssm_B.{layer}" for layer in range(LAYERS))
    kinds: list[tuple[str, Sequence[str], By]] = [
        ("mixer", parts(model, "mixers"), "mean"), ("state", writes, "zero"),
    ]  # fmt: skip
    found = []
    for task in stream.tasks:
        for what, among, by in kinds:
            training = Trial(stream, model, task, N, split="train", by=by)
            best = max(among, key=lambda part: training.lost([part]).log_prob)
            trial = Trial(stream, model, task, N, by=by)
            fact = effect(trial, [best], among, name=f"{what} of {task}", says="")
            if (fact.effect or 0.0) >= ENOUGH:
                says = f"Of the {what}s, {task} needs that of layer {best[-1]} most."
            else:
                says = f"No {what} by itself is needed for {task}."
            each = ", ".join(f"{part} {trial.lost([part]).log_prob:.2f}" for part in among)
            found.append(replace(fact, says=says, how=f"{fact.how}; nats by layer: {each}"))
        found.append(_memory(stream, model, task))
    return tuple(found)


def _memory(stream: Language, model: "Model", task: str) -> Fact:
    """What is lost when no state hears of the deciding words, or of as many others."""
    from underhood.organisms.establish import DRAWS, Trial

    trial, rng = Trial(stream, model, task, N, by="zero"), Random(task)
    lengths, told = trial.tokens.lengths, deciding(stream, task)
    lost = trial.before.accuracy - trial.score(forget(told)).accuracy
    control = []
    for _ in range(DRAWS):
        free = [[at for at in range(1, n) if at not in own]
                for n, own in zip(lengths, told, strict=True)]  # fmt: skip
        other = [rng.sample(at, min(len(own), len(at))) for at, own in zip(free, told, strict=True)]
        control.append(trial.before.accuracy - trial.score(forget(other)).accuracy)
    if lost >= ENOUGH:
        says = "Answers come through the states in part, which hear of them at the deciding words."
    else:
        says = "The answer needs no state: the convolutions reach the words that decide."
    return Fact(
        f"memory of {task}",
        says,
        tuple(f"ssm_state.{layer}" for layer in range(LAYERS)),
        task,
        round(lost, 3),
        round(sum(control) / DRAWS, 3),
        "accuracy lost",
        f"ssm_B of all layers set to zero at the words in which prompt and contrast differ and at "
        f"the next, {N} held-out prompts; control: {DRAWS} draws of as many other words, at most "
        f"{max(control):.2f}",
    )


def deciding(stream: Language, task: str) -> list[list[int]]:
    """Per prompt of `Trial`, positions where it differs from its contrast, and the next ones."""
    from underhood.organisms.establish import SEEDS

    out = []
    for case in stream.cases(task, N, SEEDS["test"]):
        # One further for <bos>.
        at = [i + 1 for i, (a, b) in enumerate(zip(case.words, case.contrast, strict=True))
              if a != b]  # fmt: skip
        out.append(sorted({i for i in (*at, *(i + 1 for i in at)) if i <= len(case.words)}))
    return out


def forget(positions: list[list[int]]) -> "list[Edit]":
    """Nothing is written to any state at these positions of each prompt."""
    from underhood.core.edit import Edit
    from underhood.core.ops import zero
    from underhood.core.tokens import Where

    return [
        Edit(f"ssm_B.{layer}", zero(), Where(at, rows=row))
        for layer in range(LAYERS)
        for row, at in enumerate(positions)
        if at
    ]


ORGANISM = Language(
    name="stream",
    summary="capitals, days and numbers, agreement, mood, with state spaces and no attention",
    words=(*SPECIAL, *PUNCTUATION, *_words(KINDS)),
    model_type="mamba2",
    sizes={
        "num_hidden_layers": LAYERS,
        "hidden_size": 64,
        "expand": 2,
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "conv_kernel": 2,
        "tie_word_embeddings": False,
    },
    context=64,
    recipe=Recipe(steps=1500, lr=4e-3, warmup=50, decay=0.4),
    phases=(
        Phase(
            1.0,
            (
                ("capitals", 34),
                ("successors", 5),
                ("agreement", 5),
                ("mood", 7),
            ),
        ),
    ),
    limits=(
        "It saw one sentence at a time, at most 16 words.",
        "A country that ends the prompt (`People call the capital of Peru`) is its weak place: the "
        "answer must be given where the country is read, and not all held-out ones are known.",
        "Successors are within reach of its convolutions: states are hardly needed for them.",
        "The other tasks of `town` were tried and left out: greater_than came to 0.69 with these "
        "short convolutions; induction (400 steps) and indirect_object (600) were not learned.",
    ),
    kinds=KINDS,
    findings=findings,
)
