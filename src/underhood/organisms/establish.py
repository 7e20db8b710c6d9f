"""What training made, by exact ablation: which parts a task cannot do without.

A part is a head `a1.h2`, an MLP `m1`, a neuron `m1.n7`, an expert `m1.e3`, a whole attention or
mixer `a1`, or any site (`ssm_x.1`). It is replaced, in the model's own forward and at all
positions, by its mean over the task's prompts (first tokens left out, which are often far longer)
or by zero. An expert is silenced instead: what it adds, where a token is routed to it, becomes 0.

    establish(town, model, "mood", "mood", says="...", among=parts(model, "heads"))

chooses parts on training prompts and measures them on held-out ones, with random sets of as many
other parts as control.
"""

import re
from collections.abc import Sequence
from itertools import combinations
from math import comb
from random import Random
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.ops import Op, call, mean, zero
from underhood.core.site import Site
from underhood.data import log_prob
from underhood.organisms.base import Organism, Split
from underhood.organisms.card import Fact

__all__ = [
    "DRAWS",
    "SEEDS",
    "By",
    "Score",
    "Trial",
    "choose",
    "effect",
    "establish",
    "parts",
    "site_of",
]

By = Literal["mean", "zero"]
"""How a part is ablated."""
DRAWS = 20
"""Random sets of a control."""
SEEDS: dict[Split, int] = {"test": 2, "train": 3}
"""Of the prompts: others than those of a card's accuracies, and two sets where splits are one."""

# Prompts of one pass.
_ROWS = 128
_PART = re.compile(r"([am])(\d+)(?:\.([hen])(\d+))?")
_SITES = {"a": "attn_out", "ah": "z", "m": "mlp_out", "me": "expert_out", "mn": "mlp_post"}
_KINDS = {"heads": "ah", "mixers": "a", "mlps": "m", "experts": "me"}


def parts(model: Model, kind: Literal["heads", "mixers", "mlps", "experts"]) -> tuple[str, ...]:
    """All parts of a kind; mixers are whole, and attention is one."""
    letter, *unit = _KINDS[kind]
    found: list[str] = []
    for layer in range(model.n_layers):
        site = Site(_SITES[_KINDS[kind]], layer)
        if model.offers(site):
            numbers = range(model.size(site, site.kind.unit) or 0)
            whole = f"{letter}{layer}"
            found += [f"{whole}.{unit[0]}{i}" for i in numbers] if unit else [whole]
    return tuple(found)


def site_of(part: str) -> Site:
    """Where a part is ablated.

    Raises:
        SiteNotFound: Neither a part nor a site.
    """
    found = _PART.fullmatch(part)
    if found is None or (name := _SITES.get(found[1] + (found[3] or ""))) is None:
        return Site.parse(part)
    return Site(name, int(found[2]), None if found[4] is None else int(found[4]))


class Score(NamedTuple):
    """How well the word after a prompt is foretold: accuracy, and nats of the right words."""

    accuracy: float
    log_prob: float


class Trial:
    """Prompts of one task, and what ablations cost their answers.

    Args:
        organism: One whose prompts are texts with the words that may follow.
        model: Its model.
        task: One of its tasks.
        n: How many prompts.
        split: Of which split.
        by: How parts are ablated.
    """

    def __init__(
        self, organism: Organism, model: Model, task: str, n: int = 100, *,
        split: Split = "test", by: By = "mean",
    ) -> None:  # fmt: skip
        prompts = organism.prompts(task, n, SEEDS[split], split)
        self.model, self.task, self.n, self.split, self.by = model, task, n, split, by
        self.tokens = model.tokens([prompt.text for prompt in prompts])
        ids = [[model.token_id(word) for word in prompt.accept] for prompt in prompts]
        self.answers = torch.full((n, max(map(len, ids))), -1)
        for row, each in enumerate(ids):
            self.answers[row, : len(each)] = torch.tensor(each)
        self._means: dict[Site, Tensor] = {}
        self.before = self.score(())

    def score(self, edits: Sequence[Edit]) -> Score:
        """With these edits. Cost: a forward of all prompts."""
        right, nats = 0, 0.0
        for block in self.tokens.blocks(_ROWS):
            logits = self.model.run(self.tokens.rows(block), edits=edits).last_logits.float().cpu()
            answers = self.answers[list(block)]
            nats += float(log_prob(logits, answers).sum())
            right += int((logits.argmax(1, keepdim=True) == answers).any(1).sum())
        return Score(right / self.n, nats / self.n)

    def lost(self, ablated: Sequence[str]) -> Score:
        """By how much accuracy and log-probability fall without these parts."""
        after = self.score(self.edits(ablated))
        return Score(*(was - now for was, now in zip(self.before, after, strict=True)))

    def edits(self, ablated: Sequence[str]) -> list[Edit]:
        """The ablations of these parts, for any run on this task's prompts."""
        sites = [site_of(part) for part in ablated]
        routed: dict[Site, list[int]] = {}
        for site in sites:
            if site.name == "expert_out" and site.unit is not None:
                routed.setdefault(site.whole, []).append(site.unit)
        plain = [site for site in sites if site.whole not in routed]
        self._measure(plain)
        return [
            *(Edit(s, zero() if self.by == "zero" else mean(self._means[s])) for s in plain),
            *(Edit(site, _silence(numbers)) for site, numbers in routed.items()),
        ]

    def _measure(self, sites: list[Site]) -> None:
        """Means over all prompts and their positions but the first."""
        new = [site for site in sites if site not in self._means]
        if self.by == "zero" or not new:
            return
        kept = self.tokens.mask & (self.tokens.position_ids > 0)
        for block in self.tokens.blocks(_ROWS):
            run = self.model.run(self.tokens.rows(block), record=new)
            for site in new:
                part = run[site][kept[list(block)].to(run[site].device)].sum(0) / int(kept.sum())
                self._means[site] = self._means.get(site, 0) + part


def _silence(numbers: list[int]) -> Op:
    """For a whole `expert_out` site: an edit of one expert may find no token routed to it."""
    gone = torch.tensor(numbers)

    def quiet(h: Tensor, slots: Tensor) -> Tensor:
        return h.masked_fill(torch.isin(slots, gone.to(slots.device))[..., None], 0.0)

    return call(quiet, slots=True)


def choose(trial: Trial, among: Sequence[str], *, lost: float = 0.5) -> tuple[str, ...]:
    """All parts that cost `lost` of accuracy each by itself; where there are none, a set that does.

    The set grows greedily, by the part that costs the right answers most, up to half of all parts;
    there may be a smaller one.

    Raises:
        UsageError: It costs less.

    Cost: `len(among)` forwards for every part of the set.
    """
    scores: dict[tuple[str, ...], Score] = {(part,): trial.lost([part]) for part in among}
    if needed := [some for some, score in scores.items() if score.accuracy >= lost]:
        return tuple(part for some in needed for part in some)
    while True:
        chosen = max(scores, key=lambda some: scores[some].log_prob)
        fallen = scores[chosen]
        if fallen.accuracy >= lost:
            return tuple(sorted(chosen))
        if 2 * len(chosen) >= len(among):
            break
        wider = [(*chosen, part) for part in among if part not in chosen]
        scores = {some: trial.lost(some) for some in wider}
    raise UsageError(
        f"ablating {len(chosen)} of these parts does not cost {lost:g} of accuracy",
        given=f"{trial.task}: {', '.join(chosen)}",
        why=f"it falls by {fallen.accuracy:.2f} from {trial.before.accuracy:.2f}",
        do="ask for less, or name other parts",
    )


def effect(
    trial: Trial, ablated: Sequence[str], among: Sequence[str], *, name: str, says: str
) -> Fact:
    """The fact that ablating these parts costs so much accuracy, and random other ones so much.

    Args:
        trial: The prompts.
        ablated: The parts.
        among: Whence random sets are drawn, of as many parts and none of `ablated`.
        name: Of the fact.
        says: One sentence.

    Raises:
        OutOfRange: There are not as many others.

    Cost: `DRAWS + 1` forwards.
    """
    lost, control = trial.lost(ablated), [trial.lost(some) for some in _random(ablated, among)]
    usual = Score(*(sum(column) / len(control) for column in zip(*control, strict=True)))
    worst = Score(*(max(column) for column in zip(*control, strict=True)))
    done = "silenced" if site_of(ablated[0]).name == "expert_out" else f"{trial.by} ablation"
    how = (
        f"{done}, {trial.n} {'held-out' if trial.split == 'test' else 'training'} prompts: "
        f"accuracy falls from {trial.before.accuracy:.2f} by {lost.accuracy:.2f}, the right "
        f"answer's log-probability by {lost.log_prob:.2f} nats; control: {len(control)} random "
        f"sets of {len(ablated)} others, by {usual.accuracy:.2f} (at most {worst.accuracy:.2f}) "
        f"and {usual.log_prob:.2f} nats (at most {worst.log_prob:.2f})"
    )
    numbers = round(lost.accuracy, 3), round(usual.accuracy, 3)
    return Fact(name, says, tuple(ablated), trial.task, *numbers, "accuracy lost", how)


def _random(ablated: Sequence[str], among: Sequence[str]) -> list[tuple[str, ...]]:
    """`DRAWS` different sets of as many other parts, or all of them where there are fewer."""
    others, size = sorted(set(among) - set(ablated)), len(ablated)
    if not 0 < size <= len(others):
        raise OutOfRange(
            "there is no control for these parts",
            given=f"{size} parts, {len(others)} others",
            do="name at least one part, and at least as many others",
        )
    if comb(len(others), size) <= DRAWS:
        return list(combinations(others, size))
    rng, sets = Random(",".join(ablated)), set[tuple[str, ...]]()
    while len(sets) < DRAWS:
        sets.add(tuple(sorted(rng.sample(others, size))))
    return sorted(sets)


def establish(
    organism: Organism, model: Model, name: str, task: str, *, says: str, among: Sequence[str],
    lost: float = 0.5, n: int = 100, by: By = "mean",
) -> Fact:  # fmt: skip
    """Choose the parts that a task needs on training prompts, measure them on held-out ones.

    Args:
        organism: As of `Trial`, like `model`, `task`, `n` and `by`.
        name: Of the fact.
        says: One sentence; `{parts}` in it stands for what was chosen.
        among: Candidates of one kind, such as `parts(model, "heads")`.
        lost: Accuracy that they must cost, 0 to 1; see `choose`.

    Raises:
        UsageError: No such parts; see `choose`.
        OutOfRange: No control; see `effect`.
    """
    training = Trial(organism, model, task, n, split="train", by=by)
    chosen = choose(training, among, lost=lost)
    trial = Trial(organism, model, task, n, by=by)
    return effect(trial, chosen, among, name=name, says=says.format(parts=" and ".join(chosen)))
