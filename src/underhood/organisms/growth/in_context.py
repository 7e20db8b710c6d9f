"""`growth/in-context`: one model, two ways to know a label: from the weights, or from the context.

A row is pairs of an item and its label, then an item whose label is asked for:

    in_weights:  pot D cup G ... elk -> B, the label that elk always has
    in_context:  pot D cup G ... cup -> G, the label that cup has in this row

Items are 48 common ones, whose label never changes, and 48 others, whose labels are drawn anew in
every row. A common item that is asked for is not among the pairs, so that only the weights know its
label; one of the others is, so that only the context does. A row has 3 to 8 pairs, of both kinds;
half of the rows ask for a common item. Only the last label is trained on.
Held out (one key in seven, by hash): of the others, item x label, so that a tested item is asked
for with a label that training never asked for; of the common ones, item x the pair before.

After Chan et al., "Data Distributional Properties Drive Emergent In-Context Learning in
Transformers" (2022) and Reddy, "The mechanistic basis of data dependence and abrupt learning in an
in-context classification task" (2024), with words for images.

Nothing was planted. `findings` measures both ways at the kept steps, and what becomes of a common
item whose label in the context is another one; the heads that the context needs are ablated, with
random other heads and the other way as controls.
"""

from random import Random
from typing import TYPE_CHECKING

from underhood.organisms.base import Recipe
from underhood.organisms.card import Fact
from underhood.organisms.growth import SIZES, halfway, history
from underhood.organisms.language import Case, Language, Phase, Task
from underhood.organisms.words import SPECIAL, join, split

if TYPE_CHECKING:
    from torch import Tensor

    from underhood.core.model import Model


COMMON = split(
    "ant ape bat bear bee boar bull calf carp cat clam cod colt crab crow deer dog dove duck eel "
    "elk ewe fawn finch fish flea fly foal fox frog gnat goat goose gull hare hawk hen heron horse "
    "ibis jay kite lamb lark lion loon lynx mole"
)
OTHERS = split(
    "arch axe bag bell belt boat book boot bowl bread brick broom brush cap card cart chain chair "
    "clock coat coin comb cork cup desk dish door drum fan fork gate glove hat hook jar key kettle "
    "lamp lock map mask nail net oar pan pen pin pot"
)
LABELS = tuple("ABCDEFGHIJKLMNOP")
FEWEST, MOST = 3, 8
"""Pairs of a row."""

# A head counts whose attention is at least so much of its block's best head's.
_LOOKS = 0.5

# The label of each common item: every label as often as the others.
FIXED = {item: LABELS[i % len(LABELS)] for i, item in enumerate(COMMON)}


def _pairs(rng: Random, *without: str) -> list[tuple[str, str]]:
    """Different items with their labels, none of them in `without`."""
    known = [item for item in (*COMMON, *OTHERS) if item not in without]
    items = rng.sample(known, rng.randint(FEWEST, MOST))
    return [(item, FIXED.get(item) or rng.choice(LABELS)) for item in items]


def _words(pairs: list[tuple[str, str]], item: str) -> tuple[str, ...]:
    return (*(word for pair in pairs for word in pair), item)


def in_weights(rng: Random) -> Case:
    """A common item that is not in the context. Contrast: another common item."""
    item, other = rng.sample(COMMON, 2)
    pairs = _pairs(rng, item, other)
    return Case(
        words=_words(pairs, item),
        answer=FIXED[item],
        contrast=_words(pairs, other),
        wrong=FIXED[other],
        key=f"in_weights:{item}:{':'.join(pairs[-1])}",
        contrast_key=f"in_weights:{other}:{':'.join(pairs[-1])}",
        after=(),
    )


def in_context(rng: Random) -> Case:
    """An item whose label the context tells. Contrast: the context tells another label."""
    item = rng.choice(OTHERS)
    return _told(rng, item, *rng.sample(LABELS, 2))


def conflict(rng: Random) -> Case:
    """A common item with another label than its own in the context: never trained on."""
    item = rng.choice(COMMON)
    told = rng.choice([label for label in LABELS if label != FIXED[item]])
    return _told(rng, item, told, FIXED[item])


def _told(rng: Random, item: str, label: str, wrong: str) -> Case:
    pairs = _pairs(rng, item)
    at = rng.randrange(len(pairs))
    told, contrast = ([*pairs[:at], (item, one), *pairs[at + 1 :]] for one in (label, wrong))
    return Case(
        words=_words(told, item),
        answer=label,
        contrast=_words(contrast, item),
        wrong=wrong,
        key=f"in_context:{item}:{label}",
        contrast_key=f"in_context:{item}:{wrong}",
        after=(),
    )


# What training made -------------------------------------------------------------------------------


def looking(model: "Model", cases: list[Case]) -> "tuple[Tensor, Tensor]":
    """Mean attention of block 0 from the label to copy to its item, of block 1 from the item
    that is asked for to that label. Both `[heads]`."""
    import torch

    tokens = model.tokens([join(case.words) for case in cases])
    run = model.run(tokens, record=["pattern.0", "pattern.1"])
    rows, last = torch.arange(len(cases)), torch.tensor(tokens.lengths) - 1
    # `<bos>` comes first: the word at i of the case is token i + 1, its label token i + 2.
    label = torch.tensor([case.words.index(case.words[-1]) + 2 for case in cases])
    before = run["pattern.0"][rows, :, label, label - 1].mean(0)
    return before, run["pattern.1"][rows, :, last, label].mean(0)


def findings(organism: Language, model: "Model") -> tuple[Fact, ...]:
    """Which way came first, which wins, and the heads that the context needs."""
    from underhood.organisms.establish import Trial, effect, parts

    # Heads are chosen on other prompts than they are measured on.
    training = organism.cases("in_context", 200, 5, "train")
    chosen = [
        (score >= _LOOKS * score.max()).nonzero().flatten().tolist()
        for score in looking(model, training)
    ]
    first, both = (
        tuple(f"a{block}.h{head}" for block in blocks for head in chosen[block])
        for blocks in ((0,), (0, 1))
    )
    context, weights = (Trial(organism, model, task, 200) for task in ("in_context", "in_weights"))
    lost = context.lost(both).accuracy, weights.lost(both).accuracy
    return (
        *_changes(organism, model),
        *_looks(organism, model, chosen),
        effect(
            context, first, [part for part in parts(model, "heads") if part.startswith("a0")],
            name="label-to-item heads ablated",
            says=f"Telling labels from the context needs {' and '.join(first)}.",
        ),
        Fact(
            "two ways",
            f"Without {' and '.join(both)} the context tells nothing, and the labels of common "
            "items are still known.",
            both,
            "in_context",
            round(lost[0], 3),
            round(lost[1], 3),
            "accuracy lost",
            "mean ablation of them all, 200 held-out prompts: accuracy on in_context falls from "
            f"{context.before.accuracy:.2f} by {lost[0]:.2f}; control: on in_weights it falls from "
            f"{weights.before.accuracy:.2f} by {lost[1]:.2f}",
        ),
    )  # fmt: skip


def _looks(organism: Language, model: "Model", chosen: list[list[int]]) -> tuple[Fact, ...]:
    """Where the chosen heads of each block look."""
    cases = organism.cases("in_context", 200, 5)
    _, untrained = next(history(organism, model))
    names = ("label to item", "item to label")
    says = (
        "In block 0 a label looks at its item.",
        "In block 1 the item that is asked for looks at the label of its earlier self.",
    )
    both = zip(looking(model, cases), looking(untrained, cases), strict=True)
    return tuple(
        Fact(
            names[block],
            says[block],
            tuple(f"a{block}.h{head}" for head in chosen[block]),
            "in_context",
            round(float(now[chosen[block]].mean()), 3),
            round(float(before[chosen[block]].mean()), 3),
            "attention",
            f"mean over heads and {len(cases)} held-out prompts; chosen on training prompts for at "
            f"least {_LOOKS} of the best head's. Control: the same heads before training. All "
            "heads: " + ", ".join(f"{score:.2f}" for score in now.tolist()),
        )
        for block, (now, before) in enumerate(both)
    )


def _changes(organism: Language, model: "Model") -> tuple[Fact, ...]:
    """When each way is known, and what is said where they disagree."""
    from underhood.organisms.establish import Trial

    rng = Random("conflict")
    cases = [conflict(rng) for _ in range(200)]
    series: dict[str, dict[int, float]] = {
        name: {} for name in ("in_weights", "in_context", "told", "own")
    }
    for step, old in history(organism, model):
        for task in organism.tasks:
            series[task][step] = Trial(organism, old, task, 200).before.accuracy
        found = old.run([join(case.words) for case in cases]).last_logits.argmax(1).tolist()
        for name, labels in (
            ("told", [c.answer for c in cases]),
            ("own", [c.wrong for c in cases]),
        ):
            wanted = [old.token_id(label) for label in labels]
            hits = sum(one == other for one, other in zip(found, wanted, strict=True))
            series[name][step] = hits / len(cases)
    weights, context = (halfway(series[task]) for task in ("in_weights", "in_context"))
    last = max(series["told"])
    listed = ", ".join(
        f"{step}: " + " ".join(f"{values[step]:.2f}" for values in series.values())
        for step in series["told"]
    )
    return (
        Fact(
            "which came first",
            f"Labels in the weights are half known at step {weights}, labels in the context at "
            f"step {context}.",
            task="in_context",
            effect=float(context),
            control=float(weights),
            unit="step",
            how="first kept step from which accuracy on 200 held-out prompts is past half of its "
            "last value; effect: in_context, control: in_weights",
        ),
        Fact(
            "conflict",
            "Where the context says another label of a common item than the weights, "
            f"it says the context's in {series['told'][last]:.0%} of cases, its own in "
            f"{series['own'][last]:.0%}.",
            effect=series["told"][last],
            control=series["own"][last],
            unit="share of answers",
            how="200 prompts of a kind never trained on; control: the label in the weights. Step "
            f"by step, accuracy in_weights, in_context, and the two shares: {listed}",
        ),
    )


ORGANISM = Language(
    name="growth/in-context",
    summary="labels of items, from the weights or from the context, with the steps of training",
    words=(*SPECIAL, *COMMON, *OTHERS, *LABELS),
    sizes=SIZES | {"max_position_embeddings": 24},
    context=24,
    recipe=Recipe(
        steps=900,
        lr=3e-3,
        warmup=50,
        keep=(0, 10, 25, 50, 75, 100, 150, 200, 250, 300, 350, 400, 500, 600, 750, 900),
    ),
    phases=(Phase(1.0, (("in_weights", 64), ("in_context", 64))),),
    limits=(
        f"It knows {len(COMMON) + len(OTHERS)} items and {len(LABELS)} labels, and reads at most "
        f"{MOST} pairs.",
        "Only the label that is asked for was trained: what it says elsewhere means nothing.",
        "A common item that stands in the context was never asked for; what it says then, "
        "the card's `conflict` tells.",
    ),
    kinds=(
        Task("in_weights", "pot D cup G ... elk -> B, which it always has", in_weights),
        Task("in_context", "pot D cup G ... cup -> G, which it has here", in_context),
    ),
    context_weight=0.0,
    findings=findings,
)
