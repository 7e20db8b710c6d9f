"""What training made of the captioner: its prior, its hallucinations, the heads that look.

Heads are ablated here and not by `establish.py`, whose prompts are text alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from underhood.organisms.card import Fact
from underhood.organisms.sight.caption import PATCHES, Captioned, Captioner, answers
from underhood.organisms.sight.caption_scenes import BRIGHT, FAINT, PARTNER

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = ["ablated", "findings", "head_means"]

Head = tuple[int, int]
"""Block and head of the language model."""

_PROMPTS, _SEED = 300, 2
# Random sets of heads in the control, and the most heads that are chosen.
_SETS, _MOST = 20, 4
# Accuracy that the chosen heads must cost.
_LOST = 0.4


def findings(organism: Captioner, model: "Model") -> tuple[Fact, ...]:
    """The prior, the hallucinations, the heads that carry the right colour, where they look."""
    heads, carry = _carriers(organism, model)
    return (_hallucination(organism, model), _prior(organism, model), carry,
            _looks(organism, model, heads))  # fmt: skip


def _hallucination(organism: Captioner, model: "Model") -> Fact:
    prompts = organism.prompts("conflict", _PROMPTS, _SEED)
    said, _ = answers(model, prompts)
    swayed = torch.tensor([a == b for a, b in zip(said, prompts.prior, strict=True)]).double()
    contrast = torch.tensor([scene.contrast for scene in prompts.scenes])
    faint, bright = swayed[contrast < (FAINT + BRIGHT) / 2], swayed[contrast > BRIGHT]
    return Fact(
        "hallucination",
        "Where the right shape is faint and its colour goes against the prior, the caption names "
        "the partner of the left colour, which is not in the picture.",
        (),
        "conflict",
        round(float(faint.mean()), 3),
        round(float(bright.mean()), 3),
        "share of captions that name the partner",
        f"of {_PROMPTS} held-out pictures, {len(faint)} of a contrast below 0.51; "
        f"control: the {len(bright)} above {BRIGHT}",
    )


def _prior(organism: Captioner, model: "Model") -> Fact:
    other = organism.pairs("blind", _PROMPTS, _SEED)
    crossed = replace(other.clean, answers=other.contrast.answers)
    return Fact(
        "language prior",
        "Without a picture the left colour's partner is foretold: "
        + ", ".join(f"{left} - {right}" for left, right in PARTNER.items()) + ".",
        (),
        "blind",
        round(_score(model, other.clean)[1], 3),
        round(_score(model, crossed)[1], 3),
        "mean probability",
        f"of {_PROMPTS} half captions without a picture; control: the partner of another colour",
    )  # fmt: skip


def _carriers(organism: Captioner, model: "Model") -> tuple[tuple[Head, ...], Fact]:
    """Heads chosen on training pictures, one after the other; measured on held-out ones."""
    everyone = [(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    chosen = _choose(
        model, _bright(organism.prompts("conflict", _PROMPTS, _SEED, "train")), everyone
    )
    new = _bright(organism.prompts("conflict", _PROMPTS, _SEED))
    means, before = head_means(model, new), _score(model, new)
    rng, others = Random("carriers"), [head for head in everyone if head not in chosen]
    sets = [chosen, *(tuple(rng.sample(others, len(chosen))) for _ in range(_SETS))]
    lost = []
    for some in sets:
        with ablated(model, some, means):
            lost.append(before[0] - _score(model, new)[0])
    names = tuple(f"a{layer}.h{head}" for layer, head in chosen)
    return chosen, Fact(
        "colour carriers",
        f"{' and '.join(names)} bring the right shape's colour from the picture to the word that "
        "names it.",
        names,
        "conflict",
        round(lost[0], 3),
        round(sum(lost[1:]) / _SETS, 3),
        "accuracy lost",
        f"mean ablation, position by position, on {len(new)} held-out pictures of a contrast above "
        f"{BRIGHT}: accuracy falls from {before[0]:.2f} by {lost[0]:.2f}; control, {_SETS} random "
        f"sets of {len(chosen)} other heads: by {sum(lost[1:]) / _SETS:.2f} "
        f"(at most {max(lost[1:]):.2f})",
    )


def _choose(model: "Model", known: Captioned, among: list[Head]) -> tuple[Head, ...]:
    """The heads, one after the other, each the one that costs the right word most."""
    chosen: tuple[Head, ...] = ()
    means, (before, _) = head_means(model, known), _score(model, known)
    lowest = (before, 1.0)
    while len(chosen) < _MOST and before - lowest[0] < _LOST:
        scores: dict[tuple[Head, ...], tuple[float, float]] = {}
        for some in [(*chosen, head) for head in among if head not in chosen]:
            with ablated(model, some, means):
                scores[some] = _score(model, known)
        chosen = min(scores, key=lambda some: scores[some][1])
        lowest = scores[chosen]
    return tuple(sorted(chosen))


def _looks(organism: Captioner, model: "Model", heads: tuple[Head, ...]) -> Fact:
    """How much of a head's attention, where the right colour is due, lies on the right shape."""
    prompts = _bright(organism.prompts("conflict", _PROMPTS, _SEED))
    side = int(PATCHES**0.5)
    shape = prompts.masks[:, 1].float()
    on = nn.functional.adaptive_max_pool2d(shape[:, None], side).flatten(1) > 0
    run = model.run(prompts.inputs, record=["pattern"])
    # [n, layer, head]: from the last position to the picture's places, which follow <bos>.
    seen = torch.stack(
        [run["pattern", i][:, :, -1, 1 : 1 + PATCHES] for i in range(model.n_layers)], 1
    )
    share = (seen * on[:, None, None]).sum(-1).mean(0)
    theirs = torch.tensor([bool((i, h) in heads) for i in range(model.n_layers)
                           for h in range(model.n_heads)]).view_as(share)  # fmt: skip
    names = tuple(f"a{layer}.h{head}" for layer, head in heads)
    return Fact(
        "where carriers look",
        f"Where the right colour is due, {' and '.join(names)} look at the right shape's places.",
        names,
        "conflict",
        round(float(share[theirs].mean()), 3),
        round(float(share[~theirs].mean()), 3),
        "share of attention",
        f"attention from the last position to the right shape's {on.sum(1).float().mean():.1f} of "
        f"{PATCHES} patches, on {len(prompts)} held-out pictures; control: the other heads",
    )


def _bright(prompts: Captioned) -> Captioned:
    """The pictures in which captions never lie."""
    rows = [i for i, scene in enumerate(prompts.scenes) if scene.contrast > BRIGHT]
    return prompts.rows(rows)


def _score(model: "Model", prompts: Captioned) -> tuple[float, float]:
    """Accuracy, and mean probability of the right word."""
    said, probability = answers(model, prompts)
    right = sum(a == b for a, b in zip(said, prompts.answers, strict=True))
    return right / len(prompts), sum(probability) / len(prompts)


def _outputs(model: "Model") -> list[nn.Module]:
    """The output projection of every block's attention, in the language model."""
    module: Any = model.module
    return [layer.self_attn.o_proj for layer in module.model.language_model.layers]


def head_means(model: "Model", prompts: Captioned) -> list[Tensor]:
    """Per block what its heads write on average, before W_O: `[position, d_model]`."""
    kept: list[Tensor] = []
    with ExitStack() as stack:
        for projection in _outputs(model):
            hook = projection.register_forward_pre_hook(
                lambda module, args: kept.append(args[0].mean(0))
            )
            stack.callback(hook.remove)
        with torch.no_grad():
            model.module(**prompts.inputs)
    return kept


@contextmanager
def ablated(model: "Model", heads: Sequence[Head], means: list[Tensor]) -> Iterator[None]:
    """Inside the block these heads write what they write on average at each position."""
    width = means[0].shape[-1] // model.n_heads

    def hook(layer: int) -> Any:
        def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            for _, head in (found for found in heads if found[0] == layer):
                columns = slice(head * width, (head + 1) * width)
                z[..., columns] = means[layer][:, columns]
            return (z, *args[1:])

        return replace

    with ExitStack() as stack:
        for layer, projection in enumerate(_outputs(model)):
            stack.callback(projection.register_forward_pre_hook(hook(layer)).remove)
        yield
