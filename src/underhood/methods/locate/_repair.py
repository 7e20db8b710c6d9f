"""The repair: heads that one task uses and another under-uses, made to act as in the first.

    wrong     at the last token they look at the wrong options, evenly, and at nothing else: heads
              that tell later ones what not to copy (the paper's inhibition heads) are so made to
    answer    the same at the right options, for heads that copy
    scale     what they write is multiplied, wherever they look

The first two are edits of attention scores at positions named row by row: data, not functions, so a
plan can be printed, saved and applied again. Evenly means: all scores equal, other keys hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.circuit import Scores
from underhood.circuits.wiring import Wiring
from underhood.core.edit import Edit, Plan
from underhood.core.errors import NotOffered, UsageError
from underhood.core.model import Model
from underhood.core.names import head_named
from underhood.core.ops import attend, scale, zero
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass
from underhood.core.tokens import Tokens, Where
from underhood.data import EncodedPairs, Metric, Pairs

__all__ = [
    "Bench", "Head", "Repaired", "check_attention", "plan_of", "repair_plan", "same_layers",
    "use_of",
]  # fmt: skip

Head = tuple[int, int]
"""Layer and number of a head."""

PUSHES = ("wrong", "answer", "scale")


def use_of(scores: Scores) -> Float[Tensor, " source"]:
    """How much of all heads' work each head does: size of its edges' sum, the heads' sum 1."""
    graph = scores.graph
    total = scores.values.double().sum(1).abs()
    for number, writer in enumerate(graph.writers):
        if writer.kind != "heads":
            total[list(graph.written(number))] = 0
    return total / total.sum().clamp(min=1e-30)


def repair_plan(
    model: Model,
    pairs: Pairs,
    heads: Sequence[str],
    *,
    push: str = "wrong",
    factor: float = 2.0,
) -> Plan:
    """The repair as edits of these prompts: `model.run(list(pairs.clean), edits=plan)`.

    Args:
        model: The model.
        pairs: The prompts, and which words are right and wrong.
        heads: Names such as "a1.h3", as `circuit_overlap` gives them.
        push: "wrong", "answer" or "scale".
        factor: What "scale" multiplies by.

    Raises:
        UsageError: A name that is no head, an unknown push, or prompts that hold no such word.
    """
    plan = plan_of(model, pairs.encode(model), list(map(head_named, heads)), push, factor)
    if not len(plan):
        raise UsageError(
            "none of these prompts holds a word that the heads could look at",
            given=f"push={push!r}",
            do='use prompts that name their options, or push="scale"',
        )
    return plan


def plan_of(
    model: Model, pairs: EncodedPairs, heads: Sequence[Head], push: str, factor: float
) -> Plan:
    """The repair of some rows; empty where no row has a position to look at."""
    if push not in PUSHES:
        raise UsageError("no such push", given=push, do=f"use {', '.join(PUSHES)}")
    if push == "scale":
        sites = [Site("z", layer, head, stack=model.main) for layer, head in heads]
        return Plan([Edit(site, scale(factor)) for site in sites])
    together: dict[tuple[int, ...], list[int]] = {}
    for row, spots in enumerate(spots_of(pairs, push)):
        if spots:
            together.setdefault(spots, []).append(row)
    rows = sorted(row for some in together.values() for row in some)
    edits = []
    for layer, head in heads if rows else ():
        site = Site("scores", layer, head, stack=model.main)
        edits.append(Edit(site, zero(), Where(-1, rows=rows)))
        for spots, some in together.items():
            edits.append(Edit(site, attend(only=spots), Where(-1, rows=some)))
    return Plan(edits)


def check_attention(wiring: Wiring) -> None:
    """Refuse, before anything is run, a push that this model's attention does not allow."""
    model = wiring.model
    for writer in wiring.graph.writers:
        if writer.kind != "heads":
            continue
        for name in ("scores", "pattern"):
            if not model.offers(site := Site(name, writer.layer, stack=model.main)):
                raise NotOffered(
                    "this model's heads cannot be told where to look",
                    given=str(site),
                    why=f"it does not offer {name}",
                    do='use push="scale", or repair=0',
                )


def spots_of(pairs: EncodedPairs, which: str) -> list[tuple[int, ...]]:
    """Per row, where the clean prompt holds its wrong (or right) words, in its own positions."""
    ids = pairs.wrong if which == "wrong" else pairs.answers
    found = []
    for row in range(len(pairs)):
        own = pairs.clean.ids[row][pairs.clean.mask[row]]
        wanted = ids[row][ids[row] >= 0].to(own.device)
        found.append(tuple(torch.isin(own, wanted).nonzero()[:, 0].tolist()))
    return found


def same_layers(
    heads: Sequence[Head], everything: Sequence[Head], *, draws: int, seed: int
) -> list[list[Head]]:
    """Random sets of other heads: from the same layers, where these have enough of them."""
    rng = Random(seed)
    others = [head for head in everything if head not in heads]
    found: dict[tuple[Head, ...], None] = {}
    if len(others) < len(heads):
        return []
    for _ in range(draws * 20):
        taken: list[Head] = []
        for layer, _ in heads:
            free = [h for h in others if h not in taken]
            taken.append(rng.choice([h for h in free if h[0] == layer] or free))
        found[tuple(sorted(taken))] = None
        if len(found) == draws:
            break
    return [list(one) for one in found]


@dataclass(frozen=True, slots=True)
class Repaired:
    """What the prompts of a task give with some heads pushed, mean over its rows.

    Attributes:
        value: The metric.
        accuracy: Share of rows whose top token is an answer.
        movers: Attention of the last token to the answers' words, mean over later heads that both
            circuits have; NaN where there are none.
    """

    value: float
    accuracy: float
    movers: float


@dataclass
class Bench:
    """One task's prompts, those that a push can act on, with and without it.

    Args:
        model: The model.
        pairs: The prompts.
        metric: What is measured.
        push: "wrong", "answer" or "scale".
        factor: Of "scale".
        movers: Heads whose attention to the answer is read.
        batch_size: Rows of one pass.
    """

    model: Model
    pairs: EncodedPairs
    metric: Metric
    push: str
    factor: float
    movers: Sequence[Head] = ()
    batch_size: int | None = None
    passes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.push != "scale":
            rows = [row for row, spots in enumerate(spots_of(self.pairs, self.push)) if spots]
            self.pairs = self.pairs.rows(rows) if rows else self.pairs.rows([0])
            self.rows = len(rows)
        else:
            self.rows = len(self.pairs)
        self._plain: Tensor | None = None

    def measure(self, heads: Sequence[Head]) -> Repaired:
        """With some heads pushed; none: as the model is."""
        sums = torch.zeros(2, dtype=torch.float64)
        looks: list[Tensor] = []
        for rows in self._blocks():
            part = self.pairs.rows(rows)
            plan = plan_of(self.model, part, heads, self.push, self.factor) if heads else Plan()
            layers = sorted({layer for layer, _ in self.movers})
            record = [Site("pattern", layer, stack=self.model.main) for layer in layers]
            run = self.model.run(part.clean, edits=plan, record=record, at=-1)
            self.passes += 1
            logits = run.last_logits
            sums[0] += self._read(logits, rows).double().sum().cpu()
            top = logits.argmax(1, keepdim=True).cpu() == part.answers.cpu()
            sums[1] += top.any(1).sum()
            patterns = {site.layer: run[site] for site in record}
            looks += [self._look(patterns, part, row) for row in range(len(part))]
        sums /= len(self.pairs)
        seen = torch.stack(looks)
        seen = seen[~seen.isnan()]
        movers = float(seen.mean()) if len(seen) else float("nan")
        return Repaired(float(sums[0]), float(sums[1]), movers)

    def _read(self, logits: Tensor, rows: range) -> Tensor:
        index = list(rows)
        if self.metric.uses_reference and self._plain is None:
            parts = [self.pairs.clean.rows(block) for block in self._blocks()]
            self._plain = torch.cat([self.model.run(part).last_logits for part in parts])
        near = self._plain[index] if self._plain is not None else None
        return self.metric(
            logits, self.pairs.answers[index], self.pairs.wrong[index], reference=near
        )

    def _blocks(self) -> list[range]:
        size = self.batch_size or rows_per_pass(self.pairs.clean.ids.shape[1])
        return self.pairs.blocks(size)

    def _look(self, patterns: dict[int | None, Tensor], part: EncodedPairs, row: int) -> Tensor:
        """Mean attention of one row's last token to its answers, over the movers."""
        nan = torch.tensor(torch.nan, dtype=torch.float64)
        spots = spots_of(part.rows([row]), "answer")[0]
        if not spots or not self.movers:
            return nan
        columns = _columns(part.clean, row)[list(spots)]
        found = [
            patterns[layer][row, head].reshape(-1, patterns[layer].shape[-1])[-1, columns].sum()
            for layer, head in self.movers
        ]
        return torch.stack(found).double().mean().cpu()


def _columns(tokens: Tokens, row: int) -> Tensor:
    """Columns of a row's own tokens."""
    return tokens.mask[row].nonzero()[:, 0]
