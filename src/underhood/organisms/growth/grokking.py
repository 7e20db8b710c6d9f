"""`growth/grokking`: addition modulo 53, first learned by heart, then understood.

    addition:  3 + 5 = -> 8,  50 + 7 = -> 4

One block of attention and a gated MLP. Half of the pairs are trained on, 512 of them in each step;
a pair and its mirror image are held out together, so that 5 + 3 does not give 3 + 5 away. Weight
decay is strong. Soon the model knows all training pairs and no other; much later, with no loss left
to gain, it knows the others too.

Nothing was planted. What training made is known from its weights: numbers lie on circles. The
embedding of the number n, seen as a function of n, consists of few frequencies k, that is of
cos(2 pi k n / 53) and sin(2 pi k n / 53), and logits are sums of cos(2 pi k (a + b - c) / 53)
(Nanda et al., "Progress measures for grokking via mechanistic interpretability", 2023). `findings`
takes frequencies out of the embedding, with random other ones as control, and follows the loss that
they alone give (restricted) and the loss without them (excluded) through the kept steps.
"""

import hashlib
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from underhood.organisms.base import Recipe
from underhood.organisms.card import Fact
from underhood.organisms.growth import halfway, history
from underhood.organisms.language import Case, Language, Phase, Task
from underhood.organisms.words import SPECIAL

if TYPE_CHECKING:
    from torch import Tensor

    from underhood.core.model import Model

SIZE = 53
NUMBERS = tuple(map(str, range(SIZE)))
# Frequencies of a real function of 53 numbers, without the constant.
FREQUENCIES = range(1, SIZE // 2 + 1)
KEYS = 6
"""How many frequencies count as those that the model uses."""

# Random sets of frequencies that a finding is compared with.
_DRAWS = 20


def half(key: str) -> bool:
    """Whether a pair is held out: every other one is."""
    return hashlib.blake2b(key.encode(), digest_size=8).digest()[0] % 2 == 0


def addition(rng: Random) -> Case:
    """The sum of two numbers, modulo 53. Contrast: another first number."""
    a, other = rng.sample(range(SIZE), 2)
    b = rng.randrange(SIZE)
    return Case(
        words=(str(a), "+", str(b), "="),
        answer=str((a + b) % SIZE),
        contrast=(str(other), "+", str(b), "="),
        wrong=str((other + b) % SIZE),
        key=_key(a, b),
        contrast_key=_key(other, b),
        after=(),
    )


def _key(a: int, b: int) -> str:
    return f"addition:{min(a, b)}:{max(a, b)}"


# What training made -------------------------------------------------------------------------------


def table() -> "tuple[Tensor, Tensor, Tensor]":
    """All pairs.

    Returns:
        Token ids `[53 * 53, 5]` of `<bos> a + b =`, row 53 a + b; the sums `[53 * 53]`; and which
        pairs are held out `[53 * 53]`.
    """
    import torch

    ids = {word: i for i, word in enumerate(ORGANISM.words)}
    pairs = [(a, b) for a in range(SIZE) for b in range(SIZE)]
    rows = [["<bos>", NUMBERS[a], "+", NUMBERS[b], "="] for a, b in pairs]
    return (
        torch.tensor([[ids[word] for word in row] for row in rows]),
        torch.tensor([(a + b) % SIZE for a, b in pairs]),
        torch.tensor([half(_key(a, b)) for a, b in pairs]),
    )


def logits(module: Any, ids: "Tensor") -> "Tensor":
    """The logits `[pairs, 53]` of the numbers that may follow."""
    import torch

    start = ORGANISM.words.index("0")
    with torch.no_grad():
        last = module(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    return last[:, start : start + SIZE]


def waves(frequencies: Sequence[int]) -> "Tensor":
    """Cosine and sine of these frequencies as orthonormal columns `[53, 2 * frequencies]`."""
    import torch

    angles = (
        2
        * torch.pi
        / SIZE
        * torch.outer(torch.arange(SIZE).float(), torch.tensor(frequencies, dtype=torch.float32))
    )
    return torch.cat([angles.cos(), angles.sin()], 1) * (2 / SIZE) ** 0.5


def embedding(module: Any) -> "Tensor":
    """The embeddings of the numbers `[53, width]`, their mean taken away."""
    start = ORGANISM.words.index("0")
    rows = module.get_input_embeddings().weight[start : start + SIZE].detach().float()
    return rows - rows.mean(0)


def shares(rows: "Tensor") -> "Tensor":
    """The share `[26]` of each frequency in the squared norm of rows `[53, width]`."""
    import torch

    power = torch.stack([(waves([k]).T @ rows).square().sum() for k in FREQUENCIES])
    return power / power.sum()


def key_frequencies(module: Any) -> tuple[int, ...]:
    """The frequencies with the largest shares in the embedding."""
    top = shares(embedding(module)).argsort(descending=True)[:KEYS]
    return tuple(sorted(int(i) + 1 for i in top))


def without(module: Any, frequencies: Sequence[int]) -> Any:
    """A copy of the module, these frequencies taken out of its number embeddings."""
    import copy

    import torch

    basis, start = waves(frequencies), ORGANISM.words.index("0")
    changed = copy.deepcopy(module)
    with torch.no_grad():
        rows = changed.get_input_embeddings().weight[start : start + SIZE]
        rows -= basis @ (basis.T @ rows)
    return changed


def split_logits(found: "Tensor", frequencies: Sequence[int]) -> "tuple[Tensor, Tensor]":
    """Logits `[pairs, 53]` by what depends on the sum through these frequencies, and the rest.

    Returns:
        The part in cos and sin of 2 pi k (a + b) / 53, with the mean over pairs; and all but it,
        the mean in it too. Both `[pairs, 53]`.
    """
    import torch

    sums = torch.arange(SIZE)[:, None] + torch.arange(SIZE)
    basis = waves(frequencies)[sums.flatten() % SIZE] / SIZE**0.5
    part = basis @ (basis.T @ found)
    return part + found.mean(0), found - part


def progress(module: Any, keys: Sequence[int]) -> dict[str, float]:
    """How far it is: accuracy on both halves, restricted and excluded loss in nats."""
    from torch.nn.functional import cross_entropy

    ids, sums, held = table()
    found = logits(module, ids)
    right = (found.argmax(1) == sums).float()
    restricted, excluded = split_logits(found, keys)
    return {
        "train": float(right[~held].mean()),
        "test": float(right[held].mean()),
        "restricted": float(cross_entropy(restricted[held], sums[held])),
        "excluded": float(cross_entropy(excluded[~held], sums[~held])),
        "share": float(shares(embedding(module))[[k - 1 for k in keys]].sum()),
    }


def findings(organism: Language, model: "Model") -> tuple[Fact, ...]:
    """When it knew by heart, when it understood, and the frequencies that it uses."""
    keys = key_frequencies(model.module)
    series = {step: progress(old.module, keys) for step, old in history(organism, model)}
    heart, understood = (
        halfway({step: now[split] for step, now in series.items()}) for split in ("train", "test")
    )
    at, end = series[heart], series[max(series)]
    return (
        Fact(
            "grokking",
            f"Half of the training pairs are known at step {heart}, half of the others only at "
            f"step {understood}.",
            task="addition",
            effect=float(understood),
            control=float(heart),
            unit="step",
            how="accuracy on all held-out pairs and, as control, on all training pairs, at the "
            f"kept steps; held out, it is {at['test']:.2f} when training pairs are half known",
        ),
        _frequencies(model.module, keys, {step: now["share"] for step, now in series.items()}),
        _ablated(model.module, keys),
        Fact(
            "restricted loss",
            "The key frequencies of a + b alone give the sum; without them much of it is lost.",
            task="addition",
            effect=round(end["restricted"], 3),
            control=round(end["excluded"], 3),
            unit="nats",
            how="held-out loss of the part of the logits that lies in cos and sin of the key "
            "frequencies of a + b, with their mean; control: training loss of all but that part "
            f"(excluded). Step by step, restricted and excluded: {_listed(series)}",
        ),
    )


def _listed(series: dict[int, dict[str, float]]) -> str:
    return ", ".join(
        f"{step}: {now['restricted']:.2f} {now['excluded']:.2f}" for step, now in series.items()
    )


def _frequencies(module: Any, keys: tuple[int, ...], share: dict[int, float]) -> Fact:
    rng, rows = Random("permuted"), embedding(module)
    permuted = [
        float(shares(rows[rng.sample(range(SIZE), SIZE)]).topk(KEYS).values.sum())
        for _ in range(_DRAWS)
    ]
    steps = ", ".join(f"{step}: {value:.2f}" for step, value in share.items())
    return Fact(
        "key frequencies",
        f"The embedding of numbers turns {', '.join(map(str, keys))} times around.",
        ("embed",),
        "addition",
        round(share[max(share)], 3),
        round(sum(permuted) / _DRAWS, 3),
        "share of squared norm",
        f"discrete Fourier transform of the embedding over the numbers, its mean taken away; the "
        f"{KEYS} largest of {len(FREQUENCIES)} frequencies. Control: the {KEYS} largest when the "
        f"numbers are permuted, mean of {_DRAWS} (at most {max(permuted):.2f}). These frequencies "
        f"by step: {steps}",
    )


def _ablated(module: Any, keys: tuple[int, ...]) -> Fact:
    ids, sums, held = table()

    def accuracy(some: Sequence[int]) -> float:
        found = logits(without(module, some), ids[held])
        return float((found.argmax(1) == sums[held]).float().mean())

    rng, others = Random("frequencies"), [k for k in FREQUENCIES if k not in keys]
    before = accuracy(())
    control = [before - accuracy(rng.sample(others, KEYS)) for _ in range(_DRAWS)]
    return Fact(
        "key frequencies ablated",
        "Without the key frequencies of the embedding most sums are wrong.",
        ("embed",),
        "addition",
        round(before - accuracy(keys), 3),
        round(sum(control) / _DRAWS, 3),
        "accuracy lost",
        f"both waves of each key frequency projected out of the number embeddings, all held-out "
        f"pairs, accuracy {before:.3f} before; control: {_DRAWS} random sets of {KEYS} other "
        f"frequencies (at most {max(control):.3f})",
    )


ORGANISM = Language(
    name="growth/grokking",
    summary="addition modulo 53, with the steps from learning by heart to understanding",
    words=(*SPECIAL, *NUMBERS, "+", "="),
    sizes={
        "num_hidden_layers": 1,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 8,
        "tie_word_embeddings": False,
    },
    context=8,
    recipe=Recipe(
        steps=2600,
        lr=3e-3,
        warmup=10,
        decay=1.0,
        keep=(
            0, 25, 50, 100, 150, 200, 300, 400, 500, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000,
            2200, 2400, 2600,
        ),
    ),
    phases=(Phase(1.0, (("addition", 512),)),),
    limits=(
        "It reads one sum of two numbers below 53, written `3 + 5 =`, and nothing else.",
        "Words but the sum were not trained: what it says after `3` or `3 +` means nothing.",
    ),
    kinds=(Task("addition", "50 + 7 = -> 4, modulo 53", addition),),
    context_weight=0.0,
    findings=findings,
    apart=half,
)  # fmt: skip
