"""`growth/induction`: two layers of attention learn to go on with what they have seen before.

    chain:   b q x -> the word that mostly follows x, in a language of 40 words (a fixed chain)
    repeat:  b q x ... b q -> x, over random words: only what came before tells

In the chain a word is followed by its favourite in 3 of 5 cases, by its second in 1 of 5, else by
any word, some far more often than others. A random sequence of 4 to 20 different words comes twice.
Held out (one key in seven, by hash): the random sequence; of the chain its first two words.

The chain's statistics are learned early, then the loss stands still; later, within few steps, the
second copy of any sequence is foretold (the phase change of Olsson et al., "In-context Learning and
Induction Heads", 2022). MLPs have a single hidden unit, so that attention does the work.

Nothing was planted. `findings` measures at the kept steps when the copies are foretold and when the
attention appears, and ablates the heads with random other ones as control: heads of block 0 look at
the word before, heads of block 1 at the word after the earlier copy of the present one.
"""

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from underhood.organisms.base import Recipe, Split, held_out
from underhood.organisms.card import Fact
from underhood.organisms.growth import SIZES, halfway, history
from underhood.organisms.language import Case, Language, Phase, Task
from underhood.organisms.repeats import repeated
from underhood.organisms.words import SPECIAL, join, split

if TYPE_CHECKING:
    from torch import Tensor

    from underhood.core.model import Model


PLAIN_WORDS = split(
    "the and to of house river stone bird tree fire road lamp coat ship bell salt moon wheel horse "
    "glass paper garden window chair apple cloud field mirror pocket letter bridge candle button "
    "basket kettle ladder hammer pillow violin saddle"
)
SHORTEST, LONGEST = 4, 20
"""Words of a sequence before it comes again."""

# Words of a row of the chain.
_CHAIN = 23
# How often a word stands where the chain lets any word follow: the first most often.
_OFTEN = [1 / (1 + i) for i in range(len(PLAIN_WORDS))]
# A head counts whose attention is at least so much of its block's best head's.
_LOOKS = 0.5


def _partners(name: str) -> dict[str, str]:
    """Each word's partner; no word is its own."""
    turned = list(PLAIN_WORDS)
    Random(name).shuffle(turned)
    return dict(zip(turned, [*turned[1:], turned[0]], strict=True))


FAVOURITE, SECOND = _partners("favourite"), _partners("second")


def chain(rng: Random) -> Case:
    """A walk along the chain, ended by its favourite step. Contrast: another last word."""
    length = rng.randint(2, _CHAIN)
    words = rng.choices(PLAIN_WORDS, _OFTEN)
    # What followed the last word before must not tell another story than the chain.
    while len(words) < length or words[-1] in words[:-1]:
        words.append(_next(rng, words[-1]))
    last = words[-1]
    other = rng.choice([word for word in PLAIN_WORDS if word != last])
    contrast = (*words[:-1], other)
    return Case(
        words=tuple(words),
        answer=FAVOURITE[last],
        contrast=contrast,
        wrong=FAVOURITE[other],
        key=_start(words),
        contrast_key=_start(contrast),
        after=(),
    )


def _next(rng: Random, word: str) -> str:
    draw = rng.random()
    if draw < 0.8:
        return (FAVOURITE if draw < 0.6 else SECOND)[word]
    return rng.choices(PLAIN_WORDS, _OFTEN)[0]


def against(n: int) -> list[tuple[tuple[str, ...], str]]:
    """Walks that end in a word which something else than its favourite followed before, and what
    did. They are no prompts of `chain`; training rows hold such words only before their end."""
    rng, found = Random("against"), []
    while len(found) < n:
        words = rng.choices(PLAIN_WORDS, _OFTEN)
        while len(words) < _CHAIN:
            words.append(_next(rng, words[-1]))
        if words[-1] in words[:-1]:
            followed = words[words.index(words[-1]) + 1]
            if words.count(words[-1]) == 2 and followed not in (words[-1], FAVOURITE[words[-1]]):
                found.append((tuple(words), followed))
    return found


def _start(words: Sequence[str]) -> str:
    return f"chain:{words[0]}:{words[1]}"


def repeat(rng: Random) -> Case:
    """A random sequence that starts again. Contrast: its deciding word changed, the first time."""
    return repeated(rng, PLAIN_WORDS, rng.randint(SHORTEST, LONGEST), "repeat")


# What training made -------------------------------------------------------------------------------


def copies(n: int, split: Split = "test", length: int = 16) -> "Tensor":
    """Token ids `[n, 1 + 2 * length]`: `<bos>` and a random sequence twice."""
    import torch

    rng, ids = Random(f"copies:{split}"), {word: i for i, word in enumerate(ORGANISM.words)}
    rows: list[list[int]] = []
    while len(rows) < n:
        once = rng.sample(PLAIN_WORDS, length)
        if held_out(f"repeat:{':'.join(once)}") == (split == "test"):
            rows.append([ids[word] for word in ("<bos>", *once, *once)])
    return torch.tensor(rows)


def in_context(module: Any, ids: "Tensor") -> tuple[float, float]:
    """Of `copies`: accuracy in the second one, and by how many nats it costs less than the first.

    Without the second copy's first word, which nothing foretells.
    """
    import torch

    with torch.no_grad():
        logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    length = ids.shape[1] // 2
    right = logits.argmax(-1)[:, length + 1 :] == ids[:, length + 2 :]
    gain = losses[:, 1:length].mean() - losses[:, length + 1 :].mean()
    return float(right.float().mean()), float(gain)


def looking(model: "Model", ids: "Tensor") -> "tuple[Tensor, Tensor]":
    """Mean attention of each head of block 0 to the word before, of block 1 to the word to copy.

    At the words of the second copy but the last. Both `[heads]`.
    """
    import torch

    run = model.run(ids, record=["pattern.0", "pattern.1"])
    length = ids.shape[1] // 2
    at = torch.arange(length + 1, 2 * length)
    before = run["pattern.0"][:, :, at, at - 1].mean((0, 2))
    return before, run["pattern.1"][:, :, at, at - length + 1].mean((0, 2))


def findings(organism: Language, model: "Model") -> tuple[Fact, ...]:
    """When the phase change came, which heads made it, and what they are worth."""
    from underhood.organisms.establish import Trial, effect, parts

    # Heads are chosen on other sequences than they are measured on.
    chosen = [
        (score >= _LOOKS * score.max()).nonzero().flatten().tolist()
        for score in looking(model, copies(64, "train"))
    ]
    before, after = (
        tuple(f"a{block}.h{head}" for head in heads) for block, heads in enumerate(chosen)
    )
    rest = tuple(part for part in parts(model, "heads") if part not in (*before, *after))
    trial = Trial(organism, model, "repeat", 200)
    return (
        *_changes(organism, model, chosen),
        _against(model),
        *(_looks(model, block, heads) for block, heads in enumerate(chosen)),
        effect(
            trial, before, (*before, *rest), name="previous-token heads ablated",
            says=f"Foretelling a second copy needs {' and '.join(before)}.",
        ),
        effect(
            trial, after, (*after, *rest), name="induction heads ablated",
            says=f"Foretelling a second copy needs {' and '.join(after)}.",
        ),
    )  # fmt: skip


def _changes(organism: Language, model: "Model", chosen: list[list[int]]) -> tuple[Fact, ...]:
    """The steps of the phase change, by what is foretold and by where heads look."""
    from underhood.organisms.establish import Trial

    ids = copies(64)
    foretold, gain, chains, previous, matching = ({} for _ in range(5))
    for step, old in history(organism, model):
        foretold[step], gain[step] = in_context(old.module, ids)
        chains[step] = Trial(organism, old, "chain", 200).before.accuracy
        scores = looking(old, ids)
        previous[step], matching[step] = (
            float(score[heads].mean()) for score, heads in zip(scores, chosen, strict=True)
        )
    change, last = halfway(gain), max(gain)
    listed = ", ".join(
        f"{step}: {gain[step]:.2f} {previous[step]:.2f} {matching[step]:.2f}" for step in gain
    )
    return (
        Fact(
            "phase change",
            f"At step {change} second copies are half as well foretold as in the end; the chain "
            f"was at step {halfway(chains)}.",
            task="repeat",
            effect=float(change),
            control=float(halfway(chains)),
            unit="step",
            how="first kept step from which the in-context score (mean loss in the first copy "
            f"less that in the second, 64 held-out sequences of 16 words) is past half of its last "
            f"value, {gain[last]:.2f} nats; by accuracy in the second copy it is step "
            f"{halfway(foretold)}. Control: the same for the accuracy on the chain",
        ),
        Fact(
            "attention appears",
            f"At step {halfway(matching)} heads of block 1 look at the word to copy half as much "
            f"as in the end.",
            tuple(f"a1.h{head}" for head in chosen[1]),
            "repeat",
            float(halfway(matching)),
            float(change),
            "step",
            f"the attention of these heads at the kept steps; that of block 0 to the word before "
            f"is half there at step {halfway(previous)}. Control: the phase change. Step by step, "
            f"in-context score, attention of block 0, of block 1: {listed}",
        ),
    )


def _against(model: "Model") -> Fact:
    cases = against(200)
    run = model.run([join(words) for words, _ in cases])
    said = [model.token_text(int(word)).strip() for word in run.last_logits.argmax(1)]
    chained = sum(
        word == FAVOURITE[words[-1]] for word, (words, _) in zip(said, cases, strict=True)
    )
    copied = sum(word == then for word, (_, then) in zip(said, cases, strict=True))
    return Fact(
        "chain against copy",
        "Where a word of the chain stood before and something else than its favourite followed, "
        f"it says the favourite in {chained / len(cases):.0%} of cases, and in "
        f"{copied / len(cases):.0%} what followed then.",
        effect=chained / len(cases),
        control=copied / len(cases),
        unit="share of answers",
        how=f"{len(cases)} walks along the chain whose last word stood before once; control: what "
        "followed it then. The accuracy on `chain` counts no such words",
    )


def _looks(model: "Model", block: int, heads: list[int]) -> Fact:
    scores = looking(model, copies(64))[block].tolist()
    others = [score for head, score in enumerate(scores) if head not in heads] or [0.0]
    where = ("the word before", "the word after the earlier copy of the present one")[block]
    return Fact(
        ("previous-token heads", "induction heads")[block],
        f"These heads of block {block} look at {where}.",
        tuple(f"a{block}.h{head}" for head in heads),
        "repeat",
        round(sum(scores[head] for head in heads) / len(heads), 3),
        round(max(others), 3),
        "attention",
        f"mean over heads, 64 held-out sequences and the words of their second copies; chosen on "
        f"training sequences for at least {_LOOKS} of the best head's. Control: the most that "
        "another head of the block has. All heads: "
        + ", ".join(f"{score:.2f}" for score in scores),
    )


ORGANISM = Language(
    name="growth/induction",
    summary="going on with repeated words, with the steps through the phase change",
    words=(*SPECIAL, *PLAIN_WORDS),
    sizes=SIZES | {"max_position_embeddings": 48},
    context=48,
    recipe=Recipe(
        steps=1000,
        lr=3e-3,
        warmup=50,
        keep=(
            0, 25, 50, 75, 100, 150, 200, 225, 250, 275, 300, 325, 350, 400, 450, 500, 600, 700,
            850, 1000,
        ),
    ),
    phases=(Phase(1.0, (("repeat", 40), ("chain", 24))),),
    limits=(
        "`chain` judges only words that did not stand in the prompt before; of the others the fact "
        "`chain against copy` tells.",
        f"It knows {len(PLAIN_WORDS)} words and reads at most {2 * LONGEST + 1} tokens well; later "
        "positions were not trained.",
        "In a first copy nothing can be foretold, so that its loss never falls below 3.7 nats.",
    ),
    kinds=(
        Task("chain", "house river -> the word that mostly follows river", chain),
        Task("repeat", "bird tree fire bird tree -> fire, over random words", repeat),
    ),
    context_weight=1.0,
    findings=findings,
)  # fmt: skip
