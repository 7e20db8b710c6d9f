"""Circuit overlap: whether two tasks use the same parts of a model, and a repair that follows.

    IoU     shared / in either         recall of A in B    shared / in A
    f(C, t) what circuit C keeps of task t, as `circuit` counts it

Circuits of any two tasks share something: early parts serve everything, and a pruned circuit must
hang together. So overlap stands between two other numbers: that of random circuits of the same
sizes, and that of two circuits of the *same* task, found on different prompts. And sharing parts is
not sharing work: each circuit is also judged on the other's task.

The repair is the claim put to the test (Merullo et al.): heads that one task uses and the other
under-uses are made to act, and the other task should gain, more than with random heads.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.faithfulness import Judge, random_circuits
from underhood.circuits.graph import Graph
from underhood.circuits.wiring import Wiring
from underhood.core.errors import OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.names import part_name
from underhood.core.provenance import describe
from underhood.data import EncodedPairs, Metric, Pairs, metric_named
from underhood.methods.locate._options import By, Cut, at_least, below_one
from underhood.methods.locate._overlap import PARTS, correlation, iou, permuted, shared
from underhood.methods.locate._overlap_view import overlap_view
from underhood.methods.locate._repair import (
    Bench,
    Head,
    Repaired,
    check_attention,
    repair_plan,
    same_layers,
    use_of,
)
from underhood.methods.locate.circuit import Choice, choose_circuit, split_prompts
from underhood.methods.registry import method
from underhood.view import Result

if TYPE_CHECKING:
    import xarray

__all__ = ["circuit_overlap", "repair_plan"]

_PERMUTATIONS = 200


@method
def circuit_overlap(
    model: Model,
    pairs: Pairs,
    *,
    other: Pairs,
    tasks: tuple[str, str] = ("first", "second"),
    by: By = "eap-ig",
    choose: Choice = "top",
    target: float = 0.9,
    edges: int | None = None,
    threshold: float = 0.01,
    metric: str = "logit_diff",
    ablation: Cut = "resample",
    experts: bool = False,
    steps: int = 5,
    repair: int = 4,
    push: Literal["wrong", "answer", "scale"] = "wrong",
    factor: float = 2.0,
    draws: int = 10,
    held_out: float = 0.5,
    batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """How much of two tasks' circuits is the same, and whether one's heads can repair the other.

    Args:
        pairs: Prompts of the first task (clean, contrast, answers, wrong).
        other: Prompts of the second. On the command line a file: `--set other=FILE`.
        tasks: What to call the two.
        by: How edges are scored (see `edge_attribution`).
        choose: How edges are chosen (see `circuit`).
        target: Share of its task that each circuit shall keep.
        edges: Take this many edges (before pruning) instead of looking for the target.
        threshold: For "acdc", what an edge must be worth to stay, in the metric's unit.
        metric: What is measured (see `uh.data.METRICS`).
        ablation: What cut edges carry.
        experts: Take mixtures of experts apart: every expert and router is a node of its own.
        steps: Points of the eap-ig ways.
        repair: Heads that are pushed at most; 0: no repair is tried.
        push: What is done to them. "wrong": at the last token they look at the wrong options'
            words, evenly, and at nothing else; "answer": at the right ones; "scale": what they
            write is multiplied.
        factor: What "scale" multiplies by.
        draws: Random circuits of each size, and random sets of heads from the same layers.
        held_out: Share of each task's prompts that the circuits are judged on and not chosen by;
            with fewer than four all are used for both.
        batch_size: Rows of one pass; nothing depends on it.
        seed: Of split, random circuits and random heads.

    Returns:
        Over `part` (edges, nodes, heads; the input left out): `shared`, `total`, `iou`, `smaller`
        (shared, of the smaller circuit), `p` (hypergeometric), with `draw` `iou_random`, and with
        `task` `size`, `recall` (of the task's circuit in the other's) and `iou_within` (two
        circuits of the same task, from both halves of its prompts; NaN with too few). Over
        `circuit` and `task`: `f`, and with `draw` `f_random`. Scalars `pearson`, `spearman` (of
        scores, of their sizes) and `pearson_chance`; over `task` `pearson_within`. Over `task` and
        `edge`: `score`, `in_circuit`; over `task` and `node`: `use` (share of all heads' work),
        `pushed` (in that task's repair). Over `task`: `before`, `after` (the metric), `accuracy`,
        `accuracy_after`, `movers`, `movers_after` (attention of later shared heads to the answer),
        `rows`, and with `draw` `random_after`, `random_accuracy`, `random_movers`; NaN where no
        repair was tried. `repair_plan` (in this module) makes the repair's `Plan` for any prompts
        from the heads in `provenance["repair"]`.

    Raises:
        NotOffered: Edges are undefined in this model, or (with `experts`) its mixtures; or its
            attention cannot be pushed.
        PairError: Prompts that cannot be compared.
        UsageError: One name for both tasks, or a contrast that changes nothing.
        OutOfRange: A number outside its range.
        ShapeMismatch: "mean-position" with prompts of different length.

    Cost: four times the scores and searches of `circuit` (both tasks, both halves of their
        prompts); 2 + 2 * draws circuits on both tasks' prompts; and, for the repair, 2 + draws
        forwards of each task's.

    Source: Merullo et al. 2024, "Circuit Component Reuse Across Tasks" (overlap of heads, the
        repair). Ours: circuits by edge scores instead of path patching, the hypergeometric p, both
        controls of the overlap, the cross-task matrix, and that heads are chosen by a rule (heads
        of the other task's circuit whose share of all heads' work is most above that in this
        task), where the paper chose by role; "answer" and "scale".

    Misleads: p takes edges for independent, which those of a connected circuit are not: compare
        with random circuits. Low overlap may come from noise in the choice: compare with
        `iou_within`. One target is reached by circuits of unlike size; recall is then one-sided. A
        repair of a task that the model does well already has nothing to gain, and a push says
        what the heads can do, not what they do. The words of the options must be in the prompt.

    Example:
        >>> import underhood as uh
        >>> from underhood.organisms import organism
        >>> first, other = (organism("town").pairs(t, 4) for t in ("capitals", "agreement"))
        >>> found = circuit_overlap(
        ...     uh.load(), first, other=other, by="eap", draws=2
        ... )
        >>> f = found["f"]
        >>> f.dims, bool(f[0, 0] > f[1, 0]), bool(f[1, 1] > f[0, 1])
        (('circuit', 'task'), True, True)
    """
    _check(tasks, repair, factor, draws, held_out)
    wiring = Wiring(model, Graph.of(model, experts=experts))
    measure = metric_named(metric)
    if repair and push != "scale":
        check_attention(wiring)
    options: dict[str, Any] = {
        "by": by, "choose": choose, "target": target, "edges": edges, "threshold": threshold,
        "steps": steps,
    }  # fmt: skip
    encoded = [p.encode(model) for p in (pairs, other)]
    split = [split_prompts(p, held_out, seed) for p in encoded]
    found = [_Task.of(wiring, *halves, measure, ablation, batch_size, options) for halves in split]
    crossed = _crossed(found, draws=draws, seed=seed)
    push_with = _Push(push, factor, repair, draws, seed)
    repairs = [_repaired(model, found, i, measure, push_with, batch_size) for i in (0, 1)]
    data = _data(found, crossed, repairs, tasks, seed, draws)
    data.attrs |= {
        "push": push, "unit": measure.unit, "metric": metric, "draws": draws,
        "prompts": [len(t.judge.pairs) for t in found], "apart": [t.apart for t in found],
    }  # fmt: skip
    names = {
        name: [part_name("head", *h) for h in r.heads]
        for name, r in zip(tasks, repairs, strict=True)
    }
    return Result(
        name="circuit_overlap",
        data=data,
        view=overlap_view(data),
        provenance=describe(
            model, pairs=[len(pairs), len(other)], tasks=list(tasks), metric=metric,
            ablation=ablation, experts=experts, draws=draws, held_out=held_out, seed=seed,
            **options, repair={"heads": names, "push": push, "factor": factor},
        ),
    )  # fmt: skip


def _check(tasks: tuple[str, str], repair: int, factor: float, draws: int, held_out: float) -> None:
    if len(set(tasks)) != 2:
        raise UsageError("two tasks, two names", given=repr(tasks), do="name them apart")
    at_least(1, draws=draws)
    at_least(0, repair=repair)
    below_one(held_out=held_out)
    if factor <= 0:
        raise OutOfRange("factor must be above 0", given=factor, do="e.g. factor=2.0")


# Both circuits -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """One task: its scores and circuit, again from its other prompts, and who judges."""

    scores: Scores
    circuit: Circuit
    again: tuple[Scores, Circuit] | None
    judge: Judge

    @property
    def apart(self) -> bool:
        """Whether it is judged on prompts that did not choose it."""
        return self.again is not None

    @classmethod
    def of(
        cls,
        wiring: Wiring,
        train: EncodedPairs,
        test: EncodedPairs,
        metric: Metric,
        ablation: str,
        batch_size: int | None,
        options: dict[str, Any],
    ) -> "_Task":
        scores, circuit = choose_circuit(wiring, train, metric, ablation, batch_size, **options)
        again = None
        if test is not train:
            again = choose_circuit(wiring, test, metric, ablation, batch_size, **options)
        return cls(scores, circuit, again, Judge(wiring, test, metric, ablation, batch_size))


@dataclass(frozen=True, slots=True)
class _Crossed:
    """Each circuit, and random ones of its size, on each task; `random`: `[circuit task draw]`."""

    f: Tensor
    random: Tensor
    iou_random: Tensor


def _crossed(found: list[_Task], *, draws: int, seed: int) -> _Crossed:
    # Two seeds, so that the two tasks' random circuits are independent of each other.
    drawn = [random_circuits(t.circuit, draws, seed=seed + 1 + draws * i)
             for i, t in enumerate(found)]  # fmt: skip
    f = torch.zeros(2, 2, dtype=torch.float64)
    random = torch.zeros(2, 2, draws, dtype=torch.float64)
    for column, task in enumerate(found):
        for row, (one, others) in enumerate(zip(found, drawn, strict=True)):
            values = task.judge.faithfulness([one.circuit, *others])
            f[row, column], random[row, column] = values[0], values[1:]
    pairs = zip(*drawn, strict=True)
    return _Crossed(f, random, torch.stack([iou(one, other) for one, other in pairs]))


# The repair --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Push:
    push: str
    factor: float
    count: int
    draws: int
    seed: int


@dataclass(frozen=True, slots=True)
class _Tried:
    """A task with the other's heads pushed; `before` is None where nothing was tried."""

    heads: list[Head]
    rows: int = 0
    before: Repaired | None = None
    after: Repaired | None = None
    random: tuple[Repaired, ...] = ()


def _repaired(
    model: Model,
    found: list[_Task],
    number: int,
    metric: Metric,
    asked: _Push,
    batch_size: int | None,
) -> _Tried:
    mine, theirs = found[number], found[1 - number]
    heads = _under_used(mine, theirs, asked.count)
    if not heads:
        return _Tried([])
    everything = _heads(mine.circuit, inside=False)
    both = set(_heads(mine.circuit)) & set(_heads(theirs.circuit)) - set(heads)
    movers = sorted(h for h in both if h[0] > min(layer for layer, _ in heads))
    bench = Bench(model, mine.judge.pairs, metric, asked.push, asked.factor, movers, batch_size)
    if not bench.rows:
        return _Tried(heads)
    drawn = same_layers(heads, everything, draws=asked.draws, seed=asked.seed)
    measured = [bench.measure(some) for some in ([], heads, *drawn)]
    return _Tried(heads, bench.rows, measured[0], measured[1], tuple(measured[2:]))


def _under_used(mine: _Task, theirs: _Task, count: int) -> list[Head]:
    """Heads of the other's circuit that do a larger share of all heads' work there than here."""
    graph = mine.circuit.graph
    more = use_of(theirs.scores) - use_of(mine.scores)
    value = {
        h: float(more[graph.sources.index(part_name("head", *h))]) for h in _heads(theirs.circuit)
    }
    ranked = sorted((h for h in value if value[h] > 0), key=lambda h: -value[h])
    return sorted(ranked[:count])


def _heads(circuit: Circuit, *, inside: bool = True) -> list[Head]:
    """The heads of a circuit, or of its whole graph."""
    names = set(circuit.nodes) if inside else set(circuit.graph.sources)
    heads = [(w.layer, h) for w in circuit.graph.writers if w.kind == "heads"
             for h in range(w.heads)]  # fmt: skip
    return [head for head in heads if part_name("head", *head) in names]


# What is handed out ------------------------------------------------------------------------------


def _data(
    found: list[_Task],
    crossed: _Crossed,
    repairs: list[_Tried],
    tasks: tuple[str, str],
    seed: int,
    draws: int,
) -> "xarray.Dataset":
    import xarray

    one, other = found
    graph = one.circuit.graph
    common = [shared(one.circuit, other.circuit, part) for part in PARTS]
    pearson, spearman = correlation(one.scores, other.scores)
    nan = torch.full((len(PARTS),), torch.nan, dtype=torch.float64)
    within = [iou(t.circuit, t.again[1]) if t.again else nan for t in found]
    nodes = graph.sources[1:]
    pushed = [[name in {part_name("head", *h) for h in r.heads} for name in nodes] for r in repairs]
    data: dict[str, Any] = {
        "shared": ("part", [s.both for s in common]),
        "total": ("part", [s.total for s in common]),
        "iou": ("part", [s.iou for s in common]),
        "smaller": ("part", [s.smaller for s in common]),
        "p": ("part", [s.p for s in common]),
        "size": (("part", "task"), [list(s.sizes) for s in common]),
        "recall": (("part", "task"), [list(s.recall) for s in common]),
        "iou_within": (("part", "task"), torch.stack(within, 1).numpy()),
        "iou_random": (("draw", "part"), crossed.iou_random.numpy()),
        "f": (("circuit", "task"), crossed.f.numpy()),
        "f_random": (("circuit", "task", "draw"), crossed.random.numpy()),
        "pearson": ((), pearson),
        "spearman": ((), spearman),
        "pearson_chance": ((), permuted(one.scores, other.scores, times=_PERMUTATIONS, seed=seed)),
        "pearson_within": (
            "task",
            [correlation(t.scores, t.again[0])[0] if t.again else torch.nan for t in found],
        ),
        "score": (("task", "edge"), [t.scores.values[graph.real].numpy() for t in found]),
        "in_circuit": (("task", "edge"), [t.circuit.mask[graph.real].numpy() for t in found]),
        "use": (("task", "node"), [use_of(t.scores)[1:].numpy() for t in found]),
        "pushed": (("task", "node"), pushed),
    }
    data |= _repair_columns(repairs, draws)
    coords = {
        "part": list(PARTS),
        "task": list(tasks),
        "circuit": list(tasks),
        "node": list(nodes),
        "name": ("edge", [graph.edge(u, v) for u, v in graph.real.nonzero().tolist()]),
    }
    return xarray.Dataset(data, coords=coords)


def _repair_columns(repairs: list[_Tried], draws: int) -> dict[str, Any]:
    """`before`, `after` and the random sets' numbers; NaN where nothing was tried."""
    columns: dict[str, Any] = {"rows": ("task", [r.rows for r in repairs])}
    for field, before, after in (
        ("value", "before", "after"), ("accuracy", "accuracy", "accuracy_after"),
        ("movers", "movers", "movers_after"),
    ):  # fmt: skip
        ends = [[getattr(x, field) if x else torch.nan for x in (r.before, r.after)]
                for r in repairs]  # fmt: skip
        columns |= {before: ("task", [e[0] for e in ends]), after: ("task", [e[1] for e in ends])}
        random = torch.full((len(repairs), draws), torch.nan, dtype=torch.float64)
        for row, tried in enumerate(repairs):
            for column, drawn in enumerate(tried.random):
                random[row, column] = getattr(drawn, field)
        name = {"value": "random_after"}.get(field, f"random_{field}")
        columns[name] = (("task", "draw"), random.numpy())
    return columns
