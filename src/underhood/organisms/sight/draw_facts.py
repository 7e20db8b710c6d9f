"""What training made of the diffusion model: its bias, and two directions of the bottleneck.

One tells crosses from circles, the other makes crosses of circles; they are not the same. Both are
one vector for all places, as a shape can lie anywhere.
"""

from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from underhood.organisms.base import Split
from underhood.organisms.card import Fact
from underhood.organisms.sight.draw import (
    CLASSES,
    MIDDLE,
    Noised,
    Painter,
    a_drawing,
    kept,
    paint,
    recognise,
    some_noise,
    times,
    under,
    wilson,
)

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = ["findings", "reading", "shares", "turning"]

# Drawings of a share, pairs of pictures that a direction is fitted on, random directions.
_PROMPTS, _PAIRS, _RANDOM = 200, 60, 3
_SEED = 2
# What the picture will be is decided above this time; later shifts only spoil it.
_EARLY = 700
# Length of the shift: activations at a place are about 10 long.
_LENGTH = 40.0
# Where `reading` is fitted and tested.
_TIME = 600


def findings(organism: Painter, model: "Model") -> tuple[Fact, ...]:
    """The share of circles; the direction that turns it, and the one that only tells it."""
    _, plain = shares(organism, model)
    random = [_unit(torch.randn(32, 1, 1, generator=torch.Generator().manual_seed(seed)))
              for seed in range(_RANDOM)]  # fmt: skip
    controls = [shares(organism, model, vector)[1] for vector in random]
    return (
        _bias(organism, model),
        _turns(organism, model, plain, controls),
        _tells(organism, model, plain),
    )


def _bias(organism: Painter, model: "Model") -> Fact:
    found = recognise(paint(model, organism.prompts("draw", 2 * _PROMPTS, _SEED).sample))
    shapes = [drawing.shape for drawing in found if drawing is not None]
    circles = shapes.count(CLASSES[0])
    low, high = wilson(circles, len(shapes))
    return Fact(
        "class bias",
        "Four in five drawings or a little more are circles, as were four in five of the training "
        "pictures.",
        (),
        "draw",
        round(circles / max(1, len(shapes)), 3),
        0.5,
        "share of circles",
        f"geometry on {len(shapes)} recognised drawings of {2 * _PROMPTS}; 95 in 100: {low:.3f} to "
        f"{high:.3f}; control: the share without a bias",
    )


def _turns(organism: Painter, model: "Model", plain: float, controls: list[float]) -> Fact:
    vector = turning(model)
    (known, turned), (_, back) = (shares(organism, model, sign * vector) for sign in (1, -1))
    usual = sum(controls) / len(controls)
    return Fact(
        "turning direction",
        f"Shifted along one direction of the bottleneck, {turned:.0%} of what is drawn are "
        f"crosses, and not {plain:.0%}; shifted the other way, {back:.0%}.",
        (f"module:{MIDDLE}",),
        "draw",
        round(turned - plain, 3),
        round(usual - plain, 3),
        "share of crosses gained",
        f"the gradient, with respect to a shift of {MIDDLE}, of how much more the pictures seen in "
        f"{_PAIRS} noised circles look like crosses at the same places, mean over times above "
        f"{_EARLY}; added {_LENGTH:g} long at these; {_PROMPTS} drawings, {known:.0%} of them "
        f"recognised; control: {len(controls)} random directions of the same length, shares of "
        f"crosses {', '.join(f'{crosses:.2f}' for crosses in controls)}",
    )


def _tells(organism: Painter, model: "Model", plain: float) -> Fact:
    """The mean difference: it tells the classes apart, and shifting along it changes little."""
    vector, middle = reading(model)
    right = _told(model, vector, middle)
    _, turned = shares(organism, model, vector)
    return Fact(
        "telling direction",
        "The bottleneck's mean difference between crosses and circles tells them apart, but a "
        "shift along it turns few circles into crosses.",
        (f"module:{MIDDLE}",),
        "restore",
        round(right, 3),
        0.5,
        "share of pictures told",
        f"mean over places of {MIDDLE} at time {_TIME}: {_PAIRS} training pairs of circle and "
        f"cross at one place under one noise, tested on {_PAIRS} held-out ones at the threshold "
        f"midway; control: chance; shifted along it as along the turning direction, {turned:.0%} "
        f"of the drawings are crosses, and {plain:.0%} without",
    )


def turning(model: "Model", pairs: int = _PAIRS) -> Tensor:
    """The direction `[32, 1, 1]` that makes circles look more like crosses, of length 1."""
    module: Any = model.module
    total = torch.zeros(32, 1, 1)
    for time in (time for time in times() if time > _EARLY):
        circles, crosses = _pairs(pairs, "train", time)
        drawings = zip(circles.drawings, crosses.drawings, strict=True)
        change = torch.stack([cross.picture - circle.picture for circle, cross in drawings])
        shift = torch.zeros(32, 1, 1, requires_grad=True)
        hook = module.get_submodule(MIDDLE).register_forward_hook(
            lambda _, args, output, shift=shift: output + shift
        )
        velocity = module(**circles.inputs).sample
        hook.remove()
        # The picture that is seen is noise less velocity: the noise does not depend on the shift.
        looks = -(1 - kept(circles.timestep)).sqrt() * velocity
        total += _unit(torch.autograd.grad((looks * change).sum(), shift)[0])
    return _unit(total)


def reading(model: "Model", pairs: int = _PAIRS) -> tuple[Tensor, float]:
    """The direction `[32, 1, 1]` of crosses less circles, of length 1, and the value midway."""
    circles, crosses = (_middle(model, some) for some in _pairs(pairs, "train", _TIME))
    vector = _unit((crosses - circles).mean(0))
    return vector[:, None, None], float((crosses + circles).mean(0) @ vector) / 2


def _told(model: "Model", vector: Tensor, middle: float) -> float:
    circles, crosses = (_middle(model, some) for some in _pairs(_PAIRS, "test", _TIME))
    far = torch.cat([middle - circles @ vector.flatten(), crosses @ vector.flatten() - middle])
    return float((far > 0).double().mean())


def shares(organism: Painter, model: "Model", vector: Tensor | None = None) -> tuple[float, float]:
    """Share of drawings that geometry recognises, and the share of crosses among these.

    Args:
        organism: The organism.
        model: Its model.
        vector: `[32, 1, 1]`, of length 1: what the bottleneck is shifted along, while it is early.
    """
    shift = None
    if vector is not None:
        shift = {time: _LENGTH * (time > _EARLY) * vector for time in times()}
    noise = organism.prompts("draw", _PROMPTS, _SEED).sample
    found = [d for d in recognise(paint(model, noise, shift=shift)) if d is not None]
    crosses = sum(drawing.shape == CLASSES[1] for drawing in found)
    return len(found) / _PROMPTS, crosses / max(1, len(found))


def _pairs(n: int, split: Split, time: int) -> list[Noised]:
    """Noised circles, and crosses at the same places under the same noise."""
    rng = Random(f"directions:{split}")
    places, noise = [a_drawing(rng, split) for _ in range(n)], some_noise(rng, n)
    drawn = [tuple(place._replace(shape=shape) for place in places) for shape in CLASSES]
    return [under(noise, drawings, time) for drawings in drawn]


def _middle(model: "Model", noised: Noised) -> Tensor:
    """Mean over places of the bottleneck, `[n, 32]`."""
    seen: list[Tensor] = []
    module: Any = model.module
    hook = module.get_submodule(MIDDLE).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        module(**noised.inputs)
    hook.remove()
    return seen[0].mean((2, 3))


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()
